import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import capo
import capo.train
from capo import checkpoint, cli, rundir
from capo.config import load_config
from capo.data import ArithmeticTask
from capo.errors import UsageError
from capo.judges import JudgeError, JudgeReply
from capo.judges.scripted import ScriptedJudge
from capo.learn import Batch, accumulate, learn, minibatches, response_logprobs
from capo.metrics import MetricsLog, outcome_metrics, read_metrics
from capo.models import build_model, stream, warm_start
from capo.rollout import response_logits, sample
from capo.samples import read_samples
from capo.train import TrainingError, train
from capo.verify import Outcome, Verifier

# Small enough for a run in about a second; a policy that knows nothing suffices wherever learning is not the point.
SMALL = [
    "task.steps=2",
    "task.held_out=8",
    "model.layers=1",
    "model.hidden=16",
    "model.heads=2",
    "model.mlp=16",
    "model.init_std=0.3",
    "warm_start.steps=3",
    "warm_start.batch=8",
    "warm_start.warmup=1",
    "prompts=4",
    "group_size=4",
    "updates=4",
    "learning_rate=1e-2",
    "eval_every=2",
    "save_every=2",
    "keep_checkpoints=9",
    "device=cpu",
]
TIMES = re.compile("step_time|capo/time/")


def small(tmp_path, *overrides, name="run"):
    return load_config(None, [*SMALL, f"output={tmp_path / name}", *overrides])


def run(config, resume=False):
    return train(config, resume=resume, console=Console(file=io.StringIO()))


def contents(result, update=None):
    """Weights and moments of a run's checkpoint, and its log without times and evaluations."""
    folder = checkpoint.checkpoint_path(result.run_dir / "checkpoints", result.update if update is None else update)
    tensors = {
        f"{name}/{key}": value
        for name in ("model", "optimizer")
        for key, value in checkpoint._read_tensors(folder / f"{name}.safetensors").items()
    }
    rows = [
        {key: value for key, value in row.items() if not TIMES.match(key) and key != "eval/accuracy"}
        for row in read_metrics(result.run_dir / "metrics.jsonl")
    ]
    # Those of an update that was the last of its call are there only if it was.
    rows += [row for row in read_metrics(result.run_dir / "samples.jsonl") if row["step"] % 2 == 0]
    return tensors, rows


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_training_raises_accuracy(tmp_path):
    """An easier task than the example's: two additions. Held-out accuracy goes from about 0.4 to about 0.8."""
    overrides = (
        "task.steps=2 task.operators=+ task.held_out=200 warm_start.steps=200 warm_start.learning_rate=6e-3 "
        "warm_start.warmup=10 prompts=8 group_size=8 learning_rate=5e-4 updates=10 eval_every=10"
    )
    result = run(load_config(None, [*overrides.split(), f"output={tmp_path / 'run'}"]))
    assert 0.25 < result.before < 0.55
    assert result.after > result.before + 0.2
    rows = read_metrics(result.run_dir / "metrics.jsonl")
    assert rows[-1]["reward"] > rows[1]["reward"]
    # The judge flags more steps in wrong responses than in right ones; its noise alone would flag a fifth.
    assert rows[-1]["capo/flag_rate/wrong"] > rows[-1]["capo/flag_rate/right"] > 0.1
    assert (result.run_dir / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ["capo", "grpo", "dr_grpo", "rloo", "opo", "grpo_process", "vppo", "fapo", "papo"])
def test_every_method_runs(tmp_path, method):
    result = run(small(tmp_path, f"method={method}", "updates=1"))
    (_, row) = read_metrics(result.run_dir / "metrics.jsonl")
    assert row["step"] == 1 and row["entropy"] > 0 and row["capo/bad_updates"] == 0 and "kl" not in row


def test_metrics_are_valid_json_with_the_usual_names(tmp_path):
    result = run(small(tmp_path, "loss.kl_coef=0.1", "judge.invalid=0.2", "judge.failed=0.2"))
    text = (result.run_dir / "metrics.jsonl").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 2, 4]
    trl = "loss reward reward_std frac_reward_zero_std entropy kl clip_ratio/region_mean completions/mean_length "
    trl += (
        "completions/clipped_ratio sampling/sampling_logp_difference/mean grad_norm learning_rate step_time num_tokens"
    )
    own = "flag_rate/wrong vote_agreement critiques/invalid critiques/failed undecided dead_tokens max_advantage "
    own += "judge_tokens_per_token idle_minibatches bad_updates time/sample time/judge time/learn"
    for row in rows[1:]:
        assert {*trl.split(), *(f"capo/{name}" for name in own.split())} <= row.keys()
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["capo/critiques/invalid"] > 0 and row["capo/critiques/failed"] > 0
    assert rows[4]["kl"] > rows[1]["kl"] > 0
    assert rows[1]["num_tokens"] < rows[2]["num_tokens"]
    assert load_config(result.run_dir / "config.yaml") == small(
        tmp_path, "loss.kl_coef=0.1", "judge.invalid=0.2", "judge.failed=0.2"
    )


# ---- the gradient


def batch_of(config, prompts=6, seed=0):
    """A model and an update with random advantages, one response and one group without any."""
    task = ArithmeticTask(config.task, 0)
    model = build_model(config.model, task, 1)
    problems = task.problems(prompts, torch.Generator().manual_seed(seed))
    rollouts = sample(
        model,
        [task.encode(problem.question) for problem in problems],
        4,
        max_new_tokens=task.response_length,
        eos_id=task.eos_id,
        generator=torch.Generator().manual_seed(seed),
    )
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn(len(rollouts.token_ids), generator=generator)
    dead = torch.tensor([1, 8, 9, 10, 11])
    advantages[rollouts.token_index(dead)] = 0
    old, _ = response_logprobs(model, rollouts, config)
    old = old + 0.3 * torch.randn(old.shape, generator=generator)
    return model, Batch(rollouts, advantages, old, old - 0.1 if config.loss.kl_coef else None)


def gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


LOSSES = {
    "sequence_mean": (),
    "token_mean": ("loss.reduce=token_mean",),
    "constant": ("loss.reduce=constant", "loss.constant=100.0"),
    "sequence ratio": ("loss.ratio=sequence",),
    "kl": ("loss.kl_coef=0.1",),
    "entropy": ("loss.entropy_coef=0.01",),
}


def test_samples_are_those_of_the_evaluated_updates(tmp_path):
    result = run(small(tmp_path, "updates=5", "judge.adaptive=false", "judge.invalid=0.3", "judge.failed=0.3"))
    rows = read_metrics(result.run_dir / "samples.jsonl")
    assert [row["step"] for row in rows] == [2] * 4 + [4] * 4 + [5] * 4
    samples = read_samples(result.run_dir / "samples.jsonl")
    assert [shown.id for shown in samples[:4]] == ["2/0", "2/1", "2/2", "2/3"]
    states = set()
    for shown, row in zip(samples, rows, strict=True):
        assert "".join(run.text for part in shown.parts for run in part.runs) == "".join(row["tokens"])
        assert sum(run.num_tokens for part in shown.parts for run in part.runs) == len(row["advantages"])
        assert len(shown.replies) == len(row["votes"][0])
        for number, reply in enumerate(row["critiques"]):
            votes = {step[number] for step in row["votes"]}
            valid = reply["error"] is None
            assert votes <= {0, 1} if valid else votes == {-1}
            states.add("valid" if valid else "failed" if reply["text"] is None else "invalid")
    assert states == {"valid", "invalid", "failed"}


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_does_not_depend_on_the_micro_batch(tmp_path, loss):
    whole = None
    for micro_batch in ("null", "1", "3", "8", "100"):
        config = small(tmp_path, *LOSSES[loss], f"micro_batch={micro_batch}")
        model, batch = batch_of(config)
        rows = torch.arange(len(batch.rollouts.truncated))
        metrics = accumulate(model, batch, rows, config)
        if whole is None:
            whole, expected = gradient(model), metrics
            assert whole.abs().max() > 1e-3
        torch.testing.assert_close(gradient(model), whole, rtol=1e-4, atol=1e-6)
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_is_that_of_one_policy_loss_over_the_minibatch(tmp_path, loss):
    config = small(tmp_path, *LOSSES[loss], "micro_batch=3")
    model, batch = batch_of(config)
    rows = torch.arange(4, 20)
    metrics = accumulate(model, batch, rows, config)
    actual = gradient(model)
    model.zero_grad()
    index, chosen = batch.rollouts.token_index(rows), batch.rollouts.select(rows)
    output = capo.policy_loss(
        response_logits(model, chosen),
        chosen.token_ids,
        batch.advantages[index],
        batch.old_logprobs[index],
        chosen.cu_seqlens,
        config.loss_rule(),
        ref_logprobs=None if batch.ref_logprobs is None else batch.ref_logprobs[index],
    )
    output.loss.backward()
    torch.testing.assert_close(actual, gradient(model), rtol=1e-4, atol=1e-6)
    assert metrics["loss"] == pytest.approx(output.loss.item(), rel=1e-4)
    assert metrics["clip_ratio/region_mean"] == pytest.approx(output.clip_fraction.item(), rel=1e-4)
    assert metrics["clip_ratio/region_mean"] > 0


def test_responses_without_gradient_are_not_even_read(tmp_path, monkeypatch):
    config = small(tmp_path)
    model, batch = batch_of(config)
    seen = []
    monkeypatch.setattr(
        "capo.learn.response_logits",
        lambda model, part: seen.append(len(part.truncated)) or response_logits(model, part),
    )
    accumulate(model, batch, torch.arange(24), config)
    assert sum(seen) == 24 - 5


def test_nothing_moves_where_nothing_is_learnt(tmp_path):
    """All rewards of each group equal: no step at all, whatever momentum and weight decay would do."""
    config = small(tmp_path, "weight_decay=0.5")
    model, batch = batch_of(config, prompts=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    _, finite = learn(model, optimizer, batch, config)  # fills the moments
    before = [parameter.detach().clone() for parameter in model.parameters()]
    flat = Batch(batch.rollouts, torch.zeros_like(batch.advantages), batch.old_logprobs, None)
    metrics, also_finite = learn(model, optimizer, flat, config)
    assert finite and also_finite and metrics["capo/idle_minibatches"] == config.minibatches
    assert metrics["loss"] is None and metrics["grad_norm"] is None
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_minibatches_and_epochs_are_optimiser_steps(tmp_path):
    config = small(tmp_path, "minibatches=4", "epochs=3")
    model, batch = batch_of(config, prompts=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    metrics, _ = learn(model, optimizer, batch, config)
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert steps == {9} and metrics["capo/idle_minibatches"] == 3  # the third group of four is dead


def test_gradients_are_scaled_down_to_the_norm(tmp_path):
    moved = []
    for norm in (1e-3, 1e6):
        config = small(tmp_path, f"max_grad_norm={norm}", "minibatches=1")
        model, batch = batch_of(config, prompts=4)
        before = torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
        metrics, _ = learn(model, torch.optim.SGD(model.parameters(), lr=1.0), batch, config)
        after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        moved.append((after - before).norm().item())
    assert moved[0] == pytest.approx(1e-3, rel=1e-2)
    assert moved[1] == pytest.approx(metrics["grad_norm"], rel=1e-3) and moved[1] > 0.01


def test_a_bad_minibatch_ends_its_update(tmp_path, monkeypatch):
    original, calls = capo.policy_loss, []

    def broken(*args, **kwargs):
        calls.append(1)
        output = original(*args, **kwargs)
        return output._replace(loss=output.loss * math.nan)

    monkeypatch.setattr(capo, "policy_loss", broken)
    config = small(tmp_path, "minibatches=4")
    model, batch = batch_of(config, prompts=4)
    _, finite = learn(model, torch.optim.AdamW(model.parameters()), batch, config)
    assert not finite and len(calls) == 1


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_logprobs_are_those_of_the_temperature(tmp_path, temperature):
    config = small(tmp_path, f"temperature={temperature}")
    model, batch = batch_of(config)
    logprobs, _ = response_logprobs(model, batch.rollouts, config)
    logits = response_logits(model, batch.rollouts).detach() / temperature
    expected = logits.log_softmax(-1).gather(1, batch.rollouts.token_ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    result = run(small(tmp_path, f"temperature={temperature}", "updates=1"))
    assert read_metrics(result.run_dir / "metrics.jsonl")[1]["sampling/sampling_logp_difference/max"] < 1e-4


def test_learning_rate_warms_up_and_stays(tmp_path):
    result = run(small(tmp_path, "warmup=2", "learning_rate=0.01"))
    rates = [row["learning_rate"] for row in read_metrics(result.run_dir / "metrics.jsonl")[1:]]
    assert rates == [0.005, 0.01, 0.01, 0.01]


def test_penalty_of_zero_is_the_outcome_only_rule_bit_for_bit(tmp_path):
    """The judge runs, errs and fails, and its votes move nothing."""
    warm = ("warm_start.steps=60", "warm_start.learning_rate=1e-2", "warm_start.batch=32", "task.steps=1")
    judged_all = ("credit.process_weight=0", "judge.failed=0.1", "judge.adaptive=false")
    with_judge = run(small(tmp_path, *warm, *judged_all, name="votes"))
    without = run(
        small(
            tmp_path,
            *warm,
            "method=opo",
            "credit.normalize=group_tokens",
            "credit.outcome_weight=2",
            "judge.num_votes=0",
            name="outcome",
        )
    )
    (one, rows), (other, other_rows) = contents(with_judge), contents(without)
    assert same(one, other)
    assert any(row.get("grad_norm", 0) > 0 for row in rows)  # something was learnt
    judged = re.compile("capo/(flag_rate|vote|critiques|judge|conflict)|votes|step_weights|critiques")
    assert any(judged.match(key) for key in rows[1])
    rows, other_rows = (
        [{k: v for k, v in row.items() if not judged.match(k)} for row in r] for r in (rows, other_rows)
    )
    assert rows == other_rows
    # And a penalty does make a difference.
    third = run(small(tmp_path, *warm, name="capo"))
    assert not same(one, contents(third)[0])


# ---- resume, stop, fail


@pytest.mark.parametrize(("kl_coef", "stops"), [(0.0, (2, 5)), (0.1, (1, 2, 4, 5))])
def test_resume_is_bitwise_the_run_without_interruption(tmp_path, kl_coef, stops):
    options = (f"loss.kl_coef={kl_coef}", "warmup=3", "weight_decay=0.01", "judge.failed=0.1")
    whole = run(small(tmp_path, *options, "updates=5", name="whole"))
    for number, updates in enumerate(stops):
        result = run(small(tmp_path, *options, f"updates={updates}", name="parts"), resume=number > 0)
    (one, rows), (other, other_rows) = contents(whole), contents(result)
    assert len(one) > 10 and same(one, other)
    assert rows == other_rows
    assert (result.before, result.after) == (whole.before, whole.after)


@pytest.mark.parametrize("where", ["verify", "learn", "accuracy"])
def test_a_killed_run_resumes_from_its_last_checkpoint_bit_for_bit(tmp_path, monkeypatch, where):
    class Killed(BaseException):
        pass

    whole = run(small(tmp_path, "updates=5", name="whole"))
    original, calls = getattr(capo.train, where), 0

    def dies(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == {"verify": 4, "learn": 4, "accuracy": 3}[where]:  # update 4
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(capo.train, where, dies)
        with pytest.raises(Killed):
            run(small(tmp_path, "updates=5"))
    log = tmp_path / "run" / "metrics.jsonl"
    assert [row["step"] for row in read_metrics(log)] == [0, 1, 2, 3]
    with log.open("a") as file:
        file.write('{"step": 4, "lo')  # half a line, as a kill may leave it
    result = run(small(tmp_path, "updates=5"), resume=True)
    (one, rows), (other, other_rows) = contents(whole), contents(result)
    assert same(one, other) and rows == other_rows


def test_stop_signal_saves_once_and_the_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    whole = run(small(tmp_path, "updates=5", "save_every=5", name="whole"))

    def interrupted(*args, **kwargs):
        monkeypatch.setattr(capo.train, "learn", learn)
        os.kill(os.getpid(), signal.SIGTERM)
        return learn(*args, **kwargs)

    monkeypatch.setattr(capo.train, "learn", interrupted)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stopped = run(small(tmp_path, "updates=5", "save_every=5"))
    assert stopped.stopped and stopped.update == 1
    assert checkpoint.saved_updates(stopped.run_dir / "checkpoints") == [0, 1]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    result = run(small(tmp_path, "updates=5", "save_every=5"), resume=True)
    assert not result.stopped
    (one, rows), (other, other_rows) = contents(whole), contents(result)
    assert same(one, other) and rows == other_rows


def test_a_process_that_is_killed_resumes_bit_for_bit(tmp_path):
    path, log = tmp_path / "config.yaml", tmp_path / "run" / "metrics.jsonl"
    path.write_text(small(tmp_path, "updates=1000000", "threads=1").to_yaml())
    process = subprocess.Popen([sys.executable, "-m", "capo.cli", "train", str(path)])
    for _ in range(600):
        if len(read_metrics(log)) > 3:
            break
        time.sleep(0.1)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    updates = checkpoint.saved_updates(tmp_path / "run" / "checkpoints")[-1] + 2
    assert updates >= 4
    result = run(small(tmp_path, f"updates={updates}", "threads=1"), resume=True)
    whole = run(small(tmp_path, f"updates={updates}", "threads=1", name="whole"))
    (one, rows), (other, other_rows) = contents(whole), contents(result)
    assert same(one, other) and rows == other_rows


def test_second_signal_interrupts_at_once(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(capo.train, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(small(tmp_path))


def test_a_signal_in_the_warm_start_ends_it(tmp_path, monkeypatch):
    def interrupted(self, count, generator):
        os.kill(os.getpid(), signal.SIGTERM)
        return demos(self, count, generator)

    demos = ArithmeticTask.demos
    monkeypatch.setattr(ArithmeticTask, "demos", interrupted)
    result = run(small(tmp_path))
    assert result.stopped and result.before is None and result.update == 0
    monkeypatch.setattr(ArithmeticTask, "demos", demos)
    assert run(small(tmp_path)).update == 4  # the folder may be used again


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["loss", "loss alone", "gradient"])
def test_bad_updates_are_skipped_counted_and_end_the_run(tmp_path, monkeypatch, bad, what):
    original, after = capo.policy_loss, {"calls": 0}

    def broken(logits, *args, **kwargs):
        output = original(logits, *args, **kwargs)
        after["calls"] += 1
        if after["calls"] == 1:  # the first update is sound
            return output
        if what == "loss":
            return output._replace(loss=output.loss * bad)
        if what == "loss alone":
            return output._replace(loss=output.loss + bad)
        output.loss.register_hook(lambda gradient: gradient * bad)
        return output

    monkeypatch.setattr(capo, "policy_loss", broken)
    config = small(tmp_path, "updates=9", "max_bad_updates=3", "save_every=1", "minibatches=1")
    with pytest.raises(TrainingError, match="3 updates in a row"):
        run(config)
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    assert [row.get("capo/bad_updates") for row in rows] == [None, 0, 1, 2, 3]
    after_first, after_last = (
        checkpoint._read_tensors(checkpoint.checkpoint_path(config.run_dir / "checkpoints", n) / "model.safetensors")
        for n in (1, 4)
    )
    assert same(after_first, after_last) and all(value.isfinite().all() for value in after_last.values())


def test_a_bad_update_now_and_then_does_not_end_the_run(tmp_path, monkeypatch):
    original, calls = capo.policy_loss, 0

    def broken(*args, **kwargs):
        nonlocal calls
        calls += 1
        output = original(*args, **kwargs)
        return output._replace(loss=output.loss * math.nan) if calls % 3 == 1 else output

    monkeypatch.setattr(capo, "policy_loss", broken)
    result = run(small(tmp_path, "max_bad_updates=2", "minibatches=1"))
    assert read_metrics(result.run_dir / "metrics.jsonl")[-1]["capo/bad_updates"] == 2


def test_a_save_that_fails_is_loud_and_leaves_the_checkpoints(tmp_path, monkeypatch):
    original, calls = checkpoint.save_file, 0

    def full(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > 3:  # start and update 0 are written
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        run(small(tmp_path))
    monkeypatch.undo()
    assert checkpoint.saved_updates(tmp_path / "run" / "checkpoints") == [0]
    torch.set_num_threads(1)
    assert run(small(tmp_path), resume=True).update == 4


def test_a_damaged_checkpoint_is_not_resumed_from(tmp_path):
    result = run(small(tmp_path, "updates=2"))
    path = checkpoint.checkpoint_path(result.run_dir / "checkpoints", 2) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(checkpoint.CheckpointError, match="model.safetensors is damaged.*remove .*00000002 to resume"):
        run(small(tmp_path), resume=True)
    shutil.rmtree(path.parent)
    assert run(small(tmp_path), resume=True).update == 4


def test_metrics_that_cannot_be_written_are_a_warning(tmp_path):
    output = io.StringIO()
    log = MetricsLog(tmp_path / "metrics.jsonl", -1, Console(file=output, width=500))
    log.write({"step": 1, "x": math.nan, "y": None, "z": math.inf})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "x": null, "z": null}\n'
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    log.write({"step": 2})
    assert "training goes on" in output.getvalue()


def test_a_damaged_log_is_an_error_unless_it_is_the_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step"')
    assert read_metrics(path) == [{"step": 0}]
    for damaged in ('{"step": 0}\n{"step"\n{"step": 2}\n', '{"step": 0}\n[]\n', "3\n"):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="not a line of metrics"):
            read_metrics(path)


# ---- the run folder


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    config = small(tmp_path)
    with rundir.lock(config.run_dir), pytest.raises(UsageError, match="another run is at work"):
        run(config)
    run(config)
    with pytest.raises(UsageError, match="holds a run already"):
        run(config)


def test_folders_that_do_not_fit_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(capo.train, "build_model", None)
    with pytest.raises(UsageError, match="no checkpoint to resume from"):
        run(small(tmp_path), resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        run(small(tmp_path, name="file"))
    assert not (tmp_path / "run").exists()


def test_resume_with_other_settings_is_refused_and_names_them(tmp_path):
    run(small(tmp_path, "updates=2"))
    with pytest.raises(UsageError, match="other settings of learning_rate, seeds.rl;"):
        run(small(tmp_path, "learning_rate=1", "seeds.rl=5"), resume=True)


def test_resume_with_fewer_updates_than_done_is_refused_before_any_work(tmp_path, monkeypatch):
    done = run(small(tmp_path, "updates=2"))
    assert run(small(tmp_path, "updates=2"), resume=True) == done  # as many: there is nothing left to do
    monkeypatch.setattr(capo.train, "build_model", None)
    with pytest.raises(UsageError, match="updates=1, but .*run has done 2 updates"):
        run(small(tmp_path, "updates=1"), resume=True)
    assert checkpoint.saved_updates(tmp_path / "run" / "checkpoints")[-1] == 2


def test_odd_folder_names(tmp_path):
    assert run(small(tmp_path, "updates=1", name="a b/ünï {method}")).run_dir.name == "ünï capo"


@pytest.fixture
def nothing_runs(monkeypatch):
    """The warm start, the first evaluation and the first update fail the test."""

    def ran(*args, **kwargs):
        pytest.fail("the run has begun")

    for name in ("warm_start", "load_warm_start", "accuracy", "learn", "verify"):
        monkeypatch.setattr(capo.train, name, ran)


JUDGE = ("judge.kind=transformers", f"judge.transformers.path={Path(__file__).parent}")  # a folder without a model


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("device=cuda",), "device=cuda, but PyTorch sees no GPU; choose device=cpu"),
        ((*JUDGE, "judge.transformers.device=cuda:1"), "judge.transformers.device=cuda:1, but PyTorch sees no GPU"),
        (JUDGE, "judge.transformers.path=.*: "),
        (("judge.kind=openai", "judge.openai.url=http://localhost:1/v1", "judge.openai.model=m",
          "judge.openai.api_key_env=CAPO_NO_KEY"), "judge.openai: .*CAPO_NO_KEY"),
        (("rollout.engine=vllm",), "rollout.engine=vllm: vLLM: not installed"),
        (("rollout.context=5",), "rollout.engine=transformers: .*max_new_tokens=15 .* a context of 5"),
        (("rollout.context=10000",), "rollout.engine=transformers: .*context=10000, but the model has"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_before_anything_runs(
    tmp_path, monkeypatch, nothing_runs, overrides, says
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("capo.rollout_vllm.vllm_why_not", lambda: "not installed")
    monkeypatch.delenv("CAPO_NO_KEY", raising=False)
    with pytest.raises(UsageError, match=says):
        run(small(tmp_path, *overrides))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_gpu_that_is_not_there_is_refused_by_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [capo.train._device("d", name) for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        "cuda",
        "cuda",
        "cuda:1",
        "cpu",
    ]
    with pytest.raises(UsageError, match=r"d=cuda:2, but PyTorch sees 2 GPUs; choose d=cpu"):
        capo.train._device("d", "cuda:2")


@pytest.mark.parametrize("setting", ["output", "warm_start.cache"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, nothing_runs, setting):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=rf"{setting}=.*file/a: cannot write there: Not a directory; choose another"):
        run(small(tmp_path, f"{setting}={tmp_path / 'file' / 'a'}"))


def test_a_folder_without_room_is_refused_before_anything_runs(tmp_path, monkeypatch, nothing_runs):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(UsageError, match="output=.*run: cannot write there: No space left on device"):
        run(small(tmp_path))


class Model:
    """A judge in place of a model: replies in one state."""

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def critique(self, requests, num_votes, first=0):
        self.asked.append((len(requests), num_votes))
        if isinstance(self.reply, Exception):
            raise self.reply
        return [[self.reply] * num_votes for _ in requests]


@pytest.mark.parametrize(
    "reply", [JudgeReply.failure("connection"), JudgeReply.failure("prompt_too_long"), JudgeError("connection is gone")]
)
def test_a_judge_that_does_not_reply_stops_the_run_before_anything_runs(tmp_path, monkeypatch, nothing_runs, reply):
    judge = Model(reply)
    monkeypatch.setattr(capo.train, "make_judge", lambda *args: judge)
    with pytest.raises(UsageError, match=r"judge.kind=transformers: .*(connection|prompt_too_long)"):
        run(small(tmp_path, *JUDGE))
    assert judge.asked == [(1, 1)]


@pytest.mark.parametrize(
    "overrides", [("method=grpo",), ("credit.process_weight=0",), ("method=opo", "judge.num_votes=0")]
)
def test_a_judge_that_is_not_needed_is_not_asked(tmp_path, monkeypatch, overrides):
    judge = Model(JudgeError("asked"))
    monkeypatch.setattr(capo.train, "make_judge", lambda *args: judge)
    assert run(small(tmp_path, *JUDGE, *overrides, "updates=1")).update == 1


def test_a_judge_that_replies_nonsense_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(capo.train, "make_judge", lambda *args: Model(JudgeReply.read("what?", 1, None)))
    result = run(small(tmp_path, *JUDGE, "updates=1"))
    (_, row) = read_metrics(result.run_dir / "metrics.jsonl")
    assert row["capo/critiques/invalid"] > 0 and row["capo/critiques/valid"] == 0


def test_an_update_in_which_nothing_is_decided_moves_nothing(tmp_path, monkeypatch):
    class Undecided(Verifier):
        def verify(self, responses, answers):
            return [Outcome.UNDECIDED] * len(responses)

    monkeypatch.setattr(capo.train, "Verifier", Undecided)
    # No response is cut off: that alone would make it wrong.
    Changed(lambda part: dataclasses.replace(part, truncated=torch.zeros_like(part.truncated)), monkeypatch)
    result = run(small(tmp_path, "updates=2", "weight_decay=0.5", "max_undecided=1"))
    rows = read_metrics(result.run_dir / "metrics.jsonl")[1:]
    assert [row["capo/idle_minibatches"] for row in rows] == [2, 2] and not any("reward" in row for row in rows)
    assert [row["capo/undecided"] for row in rows] == [16, 16]
    assert same(contents(result, 0)[0], contents(result, 2)[0])


# ---- verifier and judge


def test_undecided_responses_leave_their_group_and_are_counted(tmp_path, monkeypatch):
    seen = []

    class Undecided(Verifier):
        def verify(self, responses, answers):
            return [[Outcome.RIGHT, Outcome.WRONG, Outcome.UNDECIDED][i % 4 % 3] for i in range(len(responses))]

    monkeypatch.setattr(capo.train, "Verifier", Undecided)
    monkeypatch.setattr(capo.train, "learn", lambda *args: seen.append(args[2]) or learn(*args))
    result = run(small(tmp_path, "updates=1", "judge.num_votes=0", "method=grpo"))
    row = read_metrics(result.run_dir / "metrics.jsonl")[1]
    truncated = seen[0].rollouts.truncated
    undecided = torch.tensor([i % 4 == 2 for i in range(16)]) & ~truncated  # a truncated response is wrong
    assert undecided.any() and row["capo/undecided"] == undecided.sum()
    dead = seen[0].advantages[seen[0].rollouts.token_index(undecided.nonzero()[:, 0])]
    assert len(dead) and (dead == 0).all()
    right = (torch.tensor([i % 4 % 3 == 0 for i in range(16)]) & ~truncated).sum()
    assert row["reward"] == pytest.approx(right / (16 - undecided.sum()))


def test_outcome_metrics_by_hand():
    nan = math.nan
    metrics = outcome_metrics(torch.tensor([1.0, 0.0, nan, nan, nan, 1.0, 1.0, 1.0, nan]), torch.arange(9) // 3)
    assert metrics["reward"] == pytest.approx(4 / 5) and metrics["capo/undecided"] == 4
    assert metrics["reward_std"] == pytest.approx((math.sqrt(0.5) + 0) / 2)
    assert metrics["frac_reward_zero_std"] == 0.5
    close = outcome_metrics(torch.tensor([1.0, 1.0 - 2**-20, 0.0, 0.0]), torch.arange(4) // 2)
    assert close["frac_reward_zero_std"] == 0.5  # exactly 0, not nearly
    assert outcome_metrics(torch.tensor([nan, nan]), torch.zeros(2, dtype=torch.int64))["reward"] is None


def test_a_judge_that_never_answers_changes_nothing_but_the_counts(tmp_path):
    silent = run(small(tmp_path, "judge.failed=1", name="silent"))
    deaf = run(small(tmp_path, "credit.process_weight=0", "judge.failed=1", name="deaf"))
    (one, rows), (other, _) = contents(silent), contents(deaf)
    assert same(one, other)
    assert rows[1]["capo/critiques/failed"] == 16 * 5 and "capo/flag_rate/wrong" not in rows[1]


# ---- warm start, streams, command line


def test_warm_start_is_shared_through_the_cache(tmp_path):
    cache = f"warm_start.cache={tmp_path / 'cache'}"
    one, other = (run(small(tmp_path, cache, "updates=0", f"method={m}", name=m)) for m in ("capo", "grpo"))
    start = [checkpoint._read_tensors(result.run_dir / "start" / "model.safetensors") for result in (one, other)]
    assert same(*start) and len(list((tmp_path / "cache").iterdir())) == 1
    uncached = run(small(tmp_path, "updates=0", name="uncached"))
    assert same(start[0], checkpoint._read_tensors(uncached.run_dir / "start" / "model.safetensors"))
    # What the result depends on makes another entry, what it does not depend on does not.
    for change in ("seeds.data=1", "seeds.warm_start=1", "warm_start.steps=4", "model.mlp=24", "seeds.rl=1"):
        run(small(tmp_path, cache, "updates=0", change, name=change))
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_a_diverging_warm_start_is_an_error(tmp_path):
    config = small(tmp_path)
    task = ArithmeticTask(config.task, 0)
    model = build_model(config.model, task, 0)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="at step 1"):
        warm_start(model, task, config)


def test_building_a_model_leaves_the_random_state_alone(tmp_path):
    config = small(tmp_path)
    task = ArithmeticTask(config.task, 0)
    state = torch.get_rng_state()
    one, other, third = (build_model(config.model, task, seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), third.parameters(), strict=True))


def test_streams_are_distinct_and_fixed():
    seeds = {stream(seed, purpose, n) for seed in range(5) for purpose in ("sample", "prompts") for n in range(50)}
    assert len(seeds) == 500 and all(0 <= seed < 2**63 for seed in seeds)
    assert stream(0, "sample", 1) == 185666025334031809  # a change here would change every run


def test_command_line(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text(small(tmp_path, "updates=1").to_yaml())
    done = CliRunner().invoke(cli.app, ["train", str(path)])
    assert done.exit_code == 0, done.output
    assert re.search(r"accuracy: 0\.\d+ before, 0\.\d+ after 1 updates", done.stdout)
    assert str(tmp_path / "run") in done.stdout
    done = CliRunner().invoke(cli.app, ["train", str(path), "updates=2", "--resume"])
    assert done.exit_code == 0 and "after 2 updates" in done.stdout
    assert f"go on with: capo train {path}" not in done.stdout
    monkeypatch.setattr(capo.train, "learn", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or learn(*args))
    done = CliRunner().invoke(cli.app, ["train", str(path), "updates=9", "--resume"])
    assert done.exit_code == 0 and "after 3 updates" in done.stdout
    assert f"go on with: capo train {path} updates=9 --resume" in done.stdout
    damaged = checkpoint.checkpoint_path(tmp_path / "run" / "checkpoints", 3) / "optimizer.safetensors"
    damaged.unlink()
    done = CliRunner().invoke(cli.app, ["train", str(path), "updates=9", "--resume"])
    assert done.exit_code == 1 and "optimizer.safetensors is missing" in done.output


def test_the_process_works_the_same_in_a_bare_environment(tmp_path):
    config = small(tmp_path, "updates=2", "threads=1")
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    bare = {"LANG": "C", "LC_ALL": "C", "PYTHONOPTIMIZE": "1", "PYTHONHASHSEED": "7", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "capo.cli", "train", str(path)], check=False, capture_output=True, text=True, timeout=120,
        env={**os.environ, **bare}, stdin=subprocess.DEVNULL, close_fds=True,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    here = run(small(tmp_path, "updates=2", "threads=1", name="here"))
    (one, rows), (other, other_rows) = contents(here), contents(here._replace(run_dir=tmp_path / "run"))
    assert same(one, other) and rows == other_rows


def test_a_reader_that_leaves_is_no_traceback(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(small(tmp_path).to_yaml())
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "capo.cli", "train", str(path), "--dry-run"], stdout=write, check=False,
        stderr=subprocess.PIPE, text=True, timeout=120,
    )  # fmt: skip
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


class Changed:
    """The engine that training builds, its rollouts passed through a function."""

    def __init__(self, change, monkeypatch):
        build = capo.train.build_engine
        monkeypatch.setattr(capo.train, "build_engine", lambda *args: self.wrap(build(*args)))
        self.change, self.closed = change, 0

    def wrap(self, engine):
        self.engine, self.sync = engine, engine.sync
        return self

    def sample(self, prompts, n, seed):
        return self.change(self.engine.sample(prompts, n, seed))

    def close(self):
        self.closed += 1
        self.engine.close()


def test_responses_and_prompts_that_are_dropped_leave_ragged_groups(tmp_path, monkeypatch):
    def change(rollouts):
        rows = torch.tensor([row for row in range(16) if row not in (0, 4, 5, 6, 7, 15)])
        part = rollouts.select(rows)
        return dataclasses.replace(part, dropped={"logprobs_length": 2, "prompt_too_long": 1})

    seen = []
    monkeypatch.setattr(capo.train, "Credit", lambda **fields: seen.append(fields) or capo.Credit(**fields))
    engine = Changed(change, monkeypatch)
    result = run(small(tmp_path, "updates=2", "minibatches=4"))
    assert seen[0]["groups"].tolist() == [0] * 3 + [2] * 4 + [3] * 3
    row = read_metrics(result.run_dir / "metrics.jsonl")[1]
    assert (row["capo/dropped/logprobs_length"], row["capo/dropped/prompt_too_long"]) == (2, 1)
    assert row["capo/idle_minibatches"] >= 1 and row["capo/undecided"] == 0
    assert engine.closed == 1


def test_minibatches_are_whole_prompts_also_where_responses_are_missing():
    index = torch.tensor([0, 0, 2, 2, 2, 3])
    for count, expected in ((1, [[0, 1, 2, 3, 4, 5]]), (2, [[0, 1], [2, 3, 4, 5]]), (4, [[0, 1], [], [2, 3, 4], [5]])):
        config = load_config(None, ["prompts=4", f"minibatches={count}"])
        assert [rows.tolist() for rows in minibatches(index, config)] == expected


@pytest.mark.parametrize("shift", [-1.0, math.nan])
def test_a_sampler_that_is_not_the_policy_stops_the_run(tmp_path, monkeypatch, shift):
    engine = Changed(lambda part: dataclasses.replace(part, logprobs=part.logprobs + shift), monkeypatch)
    with pytest.raises(TrainingError, match=r"more than rollout.max_mismatch=0.5: the engine transformers does not"):
        run(small(tmp_path))
    assert engine.closed == 1
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0]


def test_importance_cap_weighs_by_what_the_sampler_reported(tmp_path, monkeypatch):
    def weights(name, *overrides):
        return contents(run(small(tmp_path, "updates=1", "rollout.max_mismatch=1", *overrides, name=name)))[0]

    plain = weights("plain")
    Changed(lambda part: dataclasses.replace(part, logprobs=part.logprobs - math.log(2)), monkeypatch)
    assert same(weights("off"), plain)
    assert same(weights("one", "loss.importance_cap=1"), plain)  # the ratio 2, cut to 1
    assert not same(weights("three", "loss.importance_cap=3"), plain)
    (_, row) = read_metrics(tmp_path / "three" / "metrics.jsonl")
    assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(2, rel=1e-4)
    assert row["sampling/sampling_logp_difference/mean"] == pytest.approx(math.log(2), rel=1e-4)


def test_judging_beside_sampling_gives_what_one_after_the_other_gives(tmp_path, monkeypatch):
    class Now:
        """Does at once what it is given."""

        def __init__(self, *_, **__):
            pass

        def submit(self, function, *args):
            future = Future()
            future.set_result(function(*args))
            return future

        __enter__ = __exit__ = lambda self, *_: self

    overrides = "rollout.chunks=4", "judge.invalid=0.2", "loss.kl_coef=0.1", "updates=2"
    beside = contents(run(small(tmp_path, *overrides, name="beside")))
    monkeypatch.setattr(capo.train, "ThreadPoolExecutor", Now)
    after = contents(run(small(tmp_path, *overrides, name="after")))
    assert same(beside[0], after[0]) and beside[1] == after[1]


def test_the_choice_of_a_backend_holds_beside_sampling(tmp_path, monkeypatch):
    seen = []
    segment = capo.train.segment
    monkeypatch.setattr(capo.train, "segment", lambda *args: seen.append(capo.backends._choice.get()) or segment(*args))
    with capo.use_backend("torch"):
        run(small(tmp_path, "updates=1", "rollout.chunks=2"))
    assert seen == ["torch"] * 3


def test_one_chunk_is_judged_while_the_next_is_sampled(tmp_path, monkeypatch):
    judging, sampling = threading.Event(), threading.Event()
    calls = []

    class Slow(ScriptedJudge):
        def critique(self, requests, num_votes, first=0):
            judging.set()
            assert sampling.wait(20)
            return super().critique(requests, num_votes, first)

    def change(rollouts):
        calls.append(len(rollouts.truncated))
        if len(calls) == 2:
            assert judging.wait(20)
            sampling.set()
        return rollouts

    monkeypatch.setattr("capo.judges.scripted.ScriptedJudge", Slow)
    Changed(change, monkeypatch)
    run(small(tmp_path, "updates=1", "rollout.chunks=2"))
    assert calls == [8, 8]
