"""The adapter of verl through verl's own functions: estimators, DataProto, losses, agent loops, configuration, Ray."""

import asyncio
import importlib.metadata
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("verl", "ray", "hydra", "transfer_queue"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'capo[verl]'")

import numpy as np
import tiny_model
import verl
import verl_judges
from batches import lengths_to_cu, random_batch, reference
from hydra import compose, initialize_config_dir
from judge_server import FakeServer
from omegaconf import OmegaConf
from tensordict import NonTensorData, NonTensorStack, TensorDict
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, get_policy_loss_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.config import validate_config
from verl.utils.reward_score import default_compute_score
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import response_to_nested

import capo
from capo.integrations import verl as adapter
from capo.integrations import verl_runtime as runtime
from capo.judges import JudgeError
from capo.reference import token_advantages

RULES = ("capo", "vppo", "fapo", "papo", "grpo_process")
HOSTS = ("grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo")
EXAMPLES = Path(__file__).parents[1] / "examples" / "verl"
T = 23


def algorithm(**capo_settings):
    return OmegaConf.create({"norm_adv_by_std_in_grpo": True, "use_kl_in_reward": False, "capo": capo_settings})


def rows(seed=0, groups=3, per_group=4, votes=3, states=("valid", "invalid", "failed")):
    """A batch as verl's agent loops give it: groups interleaved, tools in between, and a critique of each row."""
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=g))

    size = groups * per_group
    mask = torch.zeros(size, T, dtype=torch.int64)
    rewards = torch.zeros(size, T)
    judged = []
    for row in range(size):
        length, at, steps = draw(1, T + 1), 0, []
        while at < length:
            end = min(length, at + draw(1, 6))
            mask[row, at:end] = 1
            if draw(0, 4):
                steps.append((at + (end - at > 2), end))
            at = end + draw(0, 3) * draw(0, 2)
        mask[row, 0] = 1
        rewards[row, length - 1] = draw(0, 2)
        said = [states[draw(0, len(states))] for _ in range(votes)]
        ballots = torch.randint(0, 2, (len(steps), votes), generator=g)
        ballots[:, [k for k, state in enumerate(said) if state != "valid"]] = -1
        judged.append(
            {"steps": [list(s) for s in steps], "votes": ballots.tolist(), "states": said, "length": length, "errors": ["deadline"] * said.count("failed"),
             "judge_tokens": 10, "seconds": 0.5, "problem": None}
        )  # fmt: skip
    uid = np.array([f"prompt-{row % groups}" for row in range(size)], dtype=object)
    return batch_of(mask, rewards, uid, judged)


def batch_of(mask, rewards, uid, judged):
    column = np.empty(len(judged), dtype=object)
    column[:] = judged
    tensors = TensorDict({"response_mask": mask, "token_level_rewards": rewards}, batch_size=len(mask))
    return DataProto(batch=tensors, non_tensor_batch={"uid": uid, "capo": column})


def shaped(data, config, **options):
    """What verl computes with the estimator, and the metrics."""
    with adapter.critiques(data.non_tensor_batch["capo"]) as metrics:
        data = compute_advantage(data, adv_estimator="capo", config=config, **options)
    assert data.batch["advantages"].dtype == torch.float32
    assert torch.equal(data.batch["advantages"], data.batch["returns"])
    return data.batch["advantages"], metrics


def by_verl(data, host, config):
    bare = DataProto(batch=data.batch.clone(), non_tensor_batch={"uid": data.non_tensor_batch["uid"]})
    flag = config.norm_adv_by_std_in_grpo
    return compute_advantage(bare, host, config=config, norm_adv_by_std_in_grpo=flag).batch["advantages"]


def packed(data, rule):
    """The credit of a batch, token by token and without the adapter."""
    mask, judged = data.batch["response_mask"], data.non_tensor_batch["capo"]
    starts, ends, counts, votes = [], [], [], []
    before = 0
    for row, judgement in zip(mask, judged, strict=True):
        live = row.cumsum(0).tolist()
        for (start, end), ballot in zip(judgement["steps"], judgement["votes"], strict=True):
            starts.append(before + (live[start - 1] if start else 0))
            ends.append(before + live[end - 1])
            votes.append(ballot)
        counts.append(len(judgement["steps"]))
        before += live[-1]
    ids = list(dict.fromkeys(data.non_tensor_batch["uid"]))
    return capo.Credit(
        data.batch["token_level_rewards"].sum(1),
        torch.tensor(votes, dtype=torch.int8).reshape(len(votes), -1),
        capo.Steps(torch.tensor(starts), torch.tensor(ends), lengths_to_cu(counts)),
        lengths_to_cu(mask.sum(1)),
        torch.tensor([ids.index(uid) for uid in data.non_tensor_batch["uid"]]),
        rule,
    )


def truth(credit):
    steps = credit.steps
    bounds = steps.starts, steps.ends, steps.cu_steps, credit.cu_seqlens
    return token_advantages(credit.outcomes, credit.votes, *bounds, credit.groups, credit.rule)


# ---- the estimator


def test_verl_finds_the_estimator_by_its_entry_point():
    (plugin,) = [p for p in importlib.metadata.entry_points(group="verl.plugins") if p.name == "capo"]
    assert plugin.load() is adapter
    assert ADV_ESTIMATOR_REGISTRY["capo"] is adapter.capo_advantages


def test_an_older_verl_is_refused_before_anything_is_registered(monkeypatch):
    monkeypatch.setattr(verl, "__version__", "0.8.2")
    with pytest.raises(ImportError, match="needs verl>=0.9 for its trainers; this is 0.8.2"):
        runpy.run_path(adapter.__file__)
    assert ADV_ESTIMATOR_REGISTRY["capo"] is adapter.capo_advantages


def test_without_verl_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ImportError, match=r"pip install 'capo\[verl\]'"):
        runpy.run_path(adapter.__file__)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transfer_queue", None)
    with pytest.raises(ImportError, match=r"needs verl\[verl-core\]"):
        runpy.run_path(runtime.__file__)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("host", HOSTS)
def test_without_penalty_or_critiques_the_advantages_are_verls_bit_for_bit(host, norm):
    config = algorithm(host=host)
    config.norm_adv_by_std_in_grpo = norm
    without = algorithm(host=host, process_weight=0)
    without.norm_adv_by_std_in_grpo = norm
    for seed in range(5):
        data = rows(seed)
        host_advantages = by_verl(data, host, config)
        assert host_advantages.any()
        bare = DataProto(batch=data.batch.clone(), non_tensor_batch={"uid": data.non_tensor_batch["uid"]})
        result = compute_advantage(bare, "capo", config=without).batch
        assert torch.equal(result["advantages"], host_advantages)
        for base in ("rule", "host"):
            config.capo.base = base
            config.capo.max_failure_rate = 1.0
            unheard = rows(seed, states=("invalid", "failed"))
            assert torch.equal(shaped(unheard, config)[0], host_advantages)


@pytest.mark.parametrize("base", ["rule", "host"])
def test_a_group_without_a_critique_keeps_verls_advantages_bit_for_bit(base):
    config = algorithm(base=base, max_failure_rate=1.0)
    data = rows(1)
    silent = data.non_tensor_batch["uid"] == "prompt-1"
    for row in np.flatnonzero(silent):
        judged = data.non_tensor_batch["capo"][row]
        judged["states"] = ["failed"] * 3
        judged["votes"] = [[-1] * 3 for _ in judged["votes"]]
    advantages, metrics = shaped(data, config)
    host = by_verl(data, "grpo", config)
    silent = torch.from_numpy(silent)
    assert torch.equal(advantages[silent], host[silent]) and host[silent].any()
    assert not torch.equal(advantages[~silent], host[~silent])
    assert metrics["capo/host_advantages"] == silent.double().mean()


@pytest.mark.parametrize("vote", ["majority", "union", "average"])
@pytest.mark.parametrize("rule", RULES)
def test_with_critiques_they_equal_the_reference_on_packed_tokens(rule, vote):
    config = algorithm(rule=rule, vote=vote, max_failure_rate=1.0)
    for seed in range(10):
        data = rows(seed)
        credit = packed(data, capo.CreditRule.preset(rule, vote=vote))
        advantages, _ = shaped(data, config)
        live = data.batch["response_mask"].bool()
        assert torch.equal(advantages[live], credit.advantages())
        torch.testing.assert_close(advantages[live].double(), truth(credit), rtol=1e-6, atol=1e-9)
        assert not advantages[~live].any()


def test_base_host_adds_what_the_critiques_change():
    data = rows(2)
    config = algorithm(base="host", max_failure_rate=1.0, normalize="group_mean")
    with_steps = packed(data, capo.CreditRule(normalize="group_mean")).advantages()
    without = packed(data, capo.CreditRule(normalize="group_mean", process_weight=0.0)).advantages()
    live = data.batch["response_mask"].bool()
    expected = by_verl(data, "grpo", config)[live] + (with_steps - without)
    assert torch.equal(shaped(data, config)[0][live], expected) and bool((with_steps != without).any())


def test_rows_may_come_in_any_order_twice_or_with_filling():
    config = algorithm(max_failure_rate=1.0)
    data = rows(3)
    whole, metrics = shaped(data, config)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    mixed = rows(3)
    mixed.reorder(order)
    torch.testing.assert_close(shaped(mixed, config)[0], whole[order], rtol=1e-6, atol=1e-9)
    # verl fills a batch up by rows of one masked token, a copy of the first row in all else, in a group of their own.
    filled = DataProto.concat([rows(3), rows(3).select_idxs([0, 0])])
    filled.batch["response_mask"][-2:] = 0
    filled.batch["token_level_rewards"][-2:] = 0
    filled.non_tensor_batch["uid"][-2:] = "pad"
    advantages, of_filled = shaped(filled, config)
    assert torch.equal(advantages[:-2], whole) and not advantages[-2:].any()
    timeless = {name for name in metrics if "time" not in name}
    assert {name: of_filled[name] for name in timeless} == {name: metrics[name] for name in timeless}
    twice = DataProto.concat([rows(3), rows(3)])
    again = packed(twice, capo.CreditRule())
    assert torch.equal(shaped(twice, config)[0][twice.batch["response_mask"].bool()], again.advantages())


def test_tokens_that_verl_rejects_later_leave_the_statistics():
    """Its rollout correction masks further tokens, after the judge has spoken."""
    config = algorithm(max_failure_rate=1.0)
    data = rows(4)
    keep = torch.rand(data.batch["response_mask"].shape, generator=torch.Generator().manual_seed(1)) > 0.3
    data.batch["response_mask"] *= keep
    data.batch["response_mask"][0] = 0
    advantages, _ = shaped(data, config)
    live = data.batch["response_mask"].bool()
    assert not advantages[~live].any()
    data.non_tensor_batch["capo"][0] = {"steps": [], "votes": []}
    torch.testing.assert_close(advantages[live].double(), truth(packed(data, capo.CreditRule())), rtol=1e-6, atol=1e-9)


def test_metrics_by_hand():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    rewards = torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, 0]])
    judged = [
        {"steps": [[0, 2], [2, 4]], "votes": [[0, 1], [0, 0]], "states": ["valid", "valid"], "errors": [], "length": 4,
         "judge_tokens": 12, "seconds": 0.25, "problem": None},
        {"steps": [[0, 2]], "votes": [[1, -1]], "states": ["valid", "invalid"], "errors": ["empty"], "length": 2,
         "judge_tokens": 6, "seconds": 0.5, "problem": None},
    ]  # fmt: skip
    data = batch_of(mask, rewards, np.array(["a", "a"], dtype=object), judged)
    _, metrics = shaped(data, algorithm(num_votes=2))
    assert metrics.pop("capo/time/shape") > 0
    assert metrics.pop("capo/max_advantage") > 0
    assert metrics == {
        "capo/flag_rate/right": 0.25,
        "capo/flag_rate/wrong": 1.0,
        "capo/vote_agreement": 0.5,
        "capo/critiques/invalid": 1.0,
        "capo/critiques/failed": 0.0,
        "capo/host_advantages": 0.0,
        "capo/undecided": 0.0,
        "capo/dead_tokens": 0.0,
        "capo/judge_tokens_per_token": 3.0,
        "capo/time/judge": 0.5,
    }


def test_an_undecided_outcome_leaves_its_group():
    config = algorithm(max_failure_rate=1.0)
    data = rows(9)
    data.batch["token_level_rewards"][4, 0] = torch.nan
    advantages, metrics = shaped(data, config)
    assert metrics["capo/undecided"] == 1 and not advantages[4].any() and bool(advantages.isfinite().all())
    live = data.batch["response_mask"].bool()
    expected = truth(packed(data, capo.CreditRule()))
    torch.testing.assert_close(advantages[live].double(), expected, rtol=1e-6, atol=1e-9)


def test_outcomes_stay_as_they_were():
    data = rows(5)
    before = data.batch["token_level_rewards"].clone()
    shaped(data, algorithm(max_failure_rate=1.0))
    assert torch.equal(data.batch["token_level_rewards"], before)


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rulee": "capo"}, r"algorithm.capo.rulee is no setting; there are rule, vote"),
        ({"rule": "prime"}, r"algorithm.capo: CreditRule.preset: name must be one of .*'prime'"),
        ({"rule": "rloo"}, r"algorithm.capo.rule='rloo' looks at outcomes only"),
        ({"vote": "loudest"}, r"algorithm.capo: CreditRule: vote must be one of .*'loudest'"),
        ({"host": "gae"}, r"algorithm.capo.host='gae': Input should be 'grpo', "),
        ({"host": "remax"}, r"algorithm.capo.host='remax': "),
        ({"base": "both"}, r"algorithm.capo.base='both': "),
        ({"num_votes": 0}, r"algorithm.capo.num_votes=0: Input should be greater"),
        ({"num_votes": "3"}, r"algorithm.capo.num_votes='3': "),
        ({"process_weight": -1}, r"algorithm.capo: CreditRule: process_weight must be finite and at least 0, got -1"),
        ({"delimiter": ""}, r"algorithm.capo.delimiter='': "),
        ({"max_failure_rate": 2}, r"algorithm.capo.max_failure_rate=2: "),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        shaped(rows(), algorithm(**settings))


def test_batches_that_cannot_be_shaped_are_refused():
    config = algorithm(max_failure_rate=1.0)
    data = rows()
    with pytest.raises(ValueError, match="has no critiques: a trainer of capo hands them over"):
        compute_advantage(rows(), "capo", config=config)
    with pytest.raises(ValueError, match="needs the group of each row"):
        nameless = DataProto(batch=rows().batch)
        with adapter.critiques([None] * len(data)):
            compute_advantage(nameless, "capo", config=config)
    with (
        pytest.raises(ValueError, match="critiques are of 2 rows, but the batch has 12"),
        adapter.critiques([None] * 2),
    ):
        compute_advantage(rows(), "capo", config=config)
    data.non_tensor_batch["capo"][3] = None
    with pytest.raises(ValueError, match="row 3 has no critiques: its agent loop is none of capo's"):
        shaped(data, config)
    data = rows()
    data.non_tensor_batch["capo"] = np.roll(data.non_tensor_batch["capo"], 1)
    with pytest.raises(ValueError, match="rows were mixed up"):
        shaped(data, config)
    data = rows()
    data.non_tensor_batch["capo"][2] = adapter.problem("its judge is on holiday")
    with pytest.raises(JudgeError, match="row 2 could not be judged: its judge is on holiday"):
        shaped(data, config)
    with pytest.raises(ValueError, match="use_kl_in_reward=True does not go with step-level credit: it adds a penalty"):
        shaped(rows(), OmegaConf.merge(config, {"use_kl_in_reward": True}))


def test_too_many_failures_stop_the_training():
    data = rows(0, states=("failed", "valid"))
    states = [state for judged in data.non_tensor_batch["capo"] for state in judged["states"]]
    share = states.count("failed") / len(states)
    shaped(data, algorithm(max_failure_rate=share))
    with pytest.raises(
        JudgeError, match=f"^{states.count('failed')} of the {len(states)} .*: deadline {states.count('failed')}$"
    ):
        shaped(data, algorithm(max_failure_rate=share - 0.01))


def test_critiques_are_gone_after_the_block():
    with pytest.raises(KeyError), adapter.critiques([None]):
        raise KeyError
    with pytest.raises(ValueError, match="has no critiques"):
        compute_advantage(rows(), "capo", config=algorithm())


# ---- verl's losses


def actor(**options):
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_c=1e9, **options)


def test_a_step_from_batch_to_gradient_equals_the_reference():
    data = rows(6)
    config = algorithm(max_failure_rate=1.0)
    advantages, _ = shaped(data, config)
    mask = data.batch["response_mask"]
    lengths = torch.tensor([int(row.nonzero().max()) + 1 for row in mask])
    inside = torch.arange(T) < lengths[:, None]
    batch = random_batch(lengths.tolist(), vocab=19, seed=3).double()
    batch = batch.replace(mask=mask[inside].bool(), credit=advantages[inside].double())
    expected = truth(packed(data, capo.CreditRule()))
    wanted = torch.zeros_like(batch.credit).masked_scatter(batch.mask, expected)
    logits = batch.logits.clone().requires_grad_(True)
    logprobs = logits.log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]

    def padded(values):
        return values.new_zeros(inside.shape).masked_scatter(inside, values)

    loss, _ = get_policy_loss_fn("vanilla")(
        padded(batch.old_logprobs), padded(logprobs), advantages.double(), mask, "token-mean", actor(), None
    )
    loss.backward()
    rule = capo.LossRule(clip_low=0.2, clip_high=0.2, reduce="token_mean")
    (value, *_), grad = reference(batch.replace(credit=wanted), rule)
    torch.testing.assert_close(loss.detach(), value, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(logits.grad, grad, rtol=1e-6, atol=1e-9)
    (value, *_), grad = reference(batch, rule)
    torch.testing.assert_close((loss.detach(), logits.grad), (value, grad), rtol=1e-11, atol=1e-14)


def test_the_loss_of_verls_actor_meets_each_token_with_its_advantage():
    """From whole sequences, whose log-probabilities verl shifts by one, to the gradient of the logits."""
    data = rows(8)
    mask = data.batch["response_mask"]
    advantages, _ = shaped(data, algorithm(max_failure_rate=1.0))
    lengths = [int(row.nonzero().max()) + 1 for row in mask]
    prompts = [1 + number % 3 for number in range(len(lengths))]
    inside = torch.arange(T) < torch.tensor(lengths)[:, None]
    batch = random_batch(lengths, vocab=19, seed=4).double()
    batch = batch.replace(mask=mask[inside].bool(), credit=advantages[inside].double())

    total = sum(lengths) + sum(prompts)
    logits = torch.randn(total, 19, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    predicts, at = [], 0  # the rows whose logits are of a token of a response
    for prompt, length in zip(prompts, lengths, strict=True):
        predicts += range(at + prompt - 1, at + prompt + length - 1)
        at += prompt + length
    logits[predicts] = batch.logits
    labels = torch.zeros(total, dtype=torch.int64)
    labels[predicts] = batch.labels
    logits.requires_grad_(True)
    logprobs = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]

    def nested(values, sizes):
        return torch.nested.as_nested_tensor(list(values.split(sizes)), layout=torch.jagged)

    masks = nested(mask[inside], lengths)
    fields = TensorDict(
        {
            "prompts": nested(torch.zeros(sum(prompts), dtype=torch.int64), prompts),
            "responses": nested(batch.labels, lengths),
            "response_mask": masks,
            "old_log_probs": nested(batch.old_logprobs, lengths),
            "advantages": response_to_nested(advantages.double(), masks),
        },
        batch_size=len(lengths),
    )
    for name, value in {"dp_size": 1, "batch_num_tokens": int(mask.sum()), "global_batch_size": len(lengths)}.items():
        fields[name] = NonTensorData(value)
    loss, _ = ppo_loss(actor(loss_agg_mode="token-mean"), {"log_probs": logprobs}, fields)
    loss.backward()
    rule = capo.LossRule(clip_low=0.2, clip_high=0.2, reduce="token_mean")
    (value, *_), grad = reference(batch, rule)
    torch.testing.assert_close((loss.detach(), logits.grad[predicts]), (value, grad), rtol=1e-11, atol=1e-14)
    elsewhere = torch.ones(total, dtype=torch.bool)
    elsewhere[predicts] = False
    assert not logits.grad[elsewhere].any() and grad.any()


@pytest.mark.parametrize("mode", runtime.LOSSES)
def test_every_loss_that_is_let_through_gives_each_token_its_own_advantage(mode):
    assert gradients_follow_advantages(mode)


def test_the_mean_of_a_response_would_be_noticed():
    assert not gradients_follow_advantages("geo_mean")


def gradients_follow_advantages(mode):
    """On-policy, the gradient of each log-probability has the sign of its advantage, and none where the mask is 0."""
    data = rows(7)
    advantages, _ = shaped(data, algorithm(max_failure_rate=1.0))
    mask = data.batch["response_mask"]
    old = -torch.rand(mask.shape, generator=torch.Generator().manual_seed(0))
    logprobs = old.clone().requires_grad_(True)
    config = actor(policy_loss=PolicyLossConfig(loss_mode=mode, dro_beta=0.1))
    loss, _ = get_policy_loss_fn(mode)(old, logprobs, advantages, mask, "token-mean", config, None)
    loss.backward()
    return torch.equal(-logprobs.grad.sign(), advantages.sign() * mask)


# ---- agent loops


@pytest.fixture(scope="module")
def example():
    """verl's configuration with the example's on top, composed by Hydra. Not to be changed."""
    with initialize_config_dir(str(EXAMPLES), version_base=None):
        config = compose("capo")
    OmegaConf.resolve(config)
    return config


TOKENIZER = tiny_model.make_tokenizer()


def configured(**settings):
    """As much of verl's configuration as an agent loop looks at."""
    given = {"judge": "verl_judges.Spy", "num_votes": 2, **settings}
    return OmegaConf.create({"algorithm": {"adv_estimator": "capo", "capo": given}})


def output_of(parts):
    """What an agent loop gives: texts by the policy, and by tools where the second entry is 0."""
    ids = [(id_, kept) for text, kept in parts for id_ in TOKENIZER(text).input_ids]
    return AgentLoopOutput(
        prompt_ids=[1, 2], response_ids=[i for i, _ in ids], response_mask=[kept for _, kept in ids], metrics={}
    )


class Loop:
    """In place of an agent loop of verl."""

    def __init__(self, config, output):
        self.config, self.tokenizer, self.output = config, TOKENIZER, output

    async def run(self, sampling_params, **kwargs):
        return self.output


class Judged(runtime.CapoAgentMixin, Loop):
    pass


ROW = {
    "raw_prompt": [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": [{"type": "text", "text": "1+2"}]},
    ],
    "reward_model": {"ground_truth": "3"},
    "extra_info": {"question": "1 + 2 = ?", "answer": "1 + 2 = 3"},
}


def judge_of(config, parts, row=ROW):
    """The judgement of a response, and the requests that the judge got."""
    verl_judges.SEEN.clear()
    output = output_of(parts) if isinstance(parts, list) and isinstance(parts[0], tuple) else parts
    made = asyncio.run(Judged(config, output).run({}, **row))
    return made.extra_fields.get("capo"), list(verl_judges.SEEN)


@pytest.mark.parametrize("judge", ["Spy", "Awaited", "ready"])
def test_an_agent_loop_asks_the_judge_about_the_steps_of_its_response(judge):
    text = "One.\n\nwrong.\n\nThree."
    judged, ((request, thread),) = judge_of(configured(judge=f"verl_judges.{judge}"), [(text, 1)])
    assert request.steps == ("One.", "\n\nwrong.", "\n\nThree.")
    assert request.question == "system: Add.\n\nuser: 1+2" and request.reference == "3"
    assert ("capo judge" in thread) == (judge != "Awaited")
    assert judged.pop("seconds") > 0 and judged.pop("judge_tokens") >= 0
    assert judged == {
        "steps": [[0, 4], [4, 12], [12, 20]],
        "votes": [[0, 0], [1, 1], [0, 0]],
        "states": ["valid", "valid"],
        "errors": [],
        "length": 20,
        "problem": None,
    }


def test_what_tools_say_is_in_no_step():
    parts = [("One", 1), (" wrong\n\nwrong", 0), (" two\n\nwrong", 1), ("!", 0)]
    judged, ((request, _),) = judge_of(configured(question="question", reference="answer"), parts)
    assert request.steps == ("One", " two", "\n\nwrong")
    assert request.question == "1 + 2 = ?" and request.reference == "1 + 2 = 3"
    assert judged["steps"] == [[0, 3], [16, 20], [20, 27]] and judged["length"] == 28
    assert judged["votes"] == [[0, 0], [0, 0], [1, 1]]


@pytest.mark.parametrize("parts", [[("", 1)], [("\n\n", 1)], [("said by a tool", 0)]])
def test_a_response_without_steps_is_not_judged(parts):
    judged, seen = judge_of(configured(), parts)
    assert not seen and judged["steps"] == judged["votes"] == judged["states"] == [] and judged["problem"] is None


def test_without_penalty_the_judge_is_not_even_made():
    judged, seen = judge_of(configured(process_weight=0, judge="nowhere.judge"), [("One", 1)])
    assert judged is None and not seen


def test_a_judge_that_gives_up_is_failures_for_the_trainer_to_count():
    judged, _ = judge_of(configured(judge="verl_judges.Broken"), [("wrong", 1)])
    assert judged["states"] == ["failed", "failed"] and judged["votes"] == [[-1, -1]]
    mask = torch.ones(1, 5, dtype=torch.int64)
    data = batch_of(mask, mask.float(), np.array(["a"], dtype=object), [judged])
    with pytest.raises(
        JudgeError, match=r"2 of the 2 critiques of a batch have failed.*: judge_error \(nobody answers\) 2$"
    ):
        shaped(data, configured().algorithm)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge": "verl_judges.Short"}, "ValueError: the judge was asked for 2 critiques of one response, and gave"),
        ({"judge": "verl_judges.Crashing"}, "RuntimeError: out of order"),
        ({"question": "task"}, "algorithm.capo.question='task': extra_info has only question, answer"),
        ({"judge": "verl_judges.nobody"}, "algorithm.capo.judge: cannot import 'verl_judges.nobody'"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_told_by_the_trainer(settings, message):
    judged, _ = judge_of(configured(**settings), [("One", 1)])
    assert set(judged) == {"problem"} and message in judged["problem"]


def test_several_sequences_a_session_are_refused():
    outputs = [output_of([("One", 1)]), output_of([("Two", 1)])]
    made = asyncio.run(Judged(configured(), outputs).run({}, **ROW))
    assert all("gives several sequences" in output.extra_fields["capo"]["problem"] for output in made)
    with pytest.raises(ValueError, match="row a_3_1 is a further sequence of a session"):
        runtime._refuse_parts(["a_3_0", "a_3_1"])
    runtime._refuse_parts(["a_0_0", "a_10_0", "pad0_1_0"])


@pytest.mark.parametrize("nothing", [None, []])
def test_a_session_without_output_stays_one(nothing):
    assert asyncio.run(Judged(configured(), nothing).run({}, **ROW)) is nothing


class Manager:
    def __init__(self):
        self.asked = []

    def generate_sequences(self, prompts):
        self.asked.append(prompts)

    def other(self):
        return "as it was"


def test_validation_uses_the_agents_without_a_judge():
    manager = Manager()
    wrapped = runtime._UnjudgedValidation(manager, "capo_single_turn_agent")

    def names(validate, given):
        prompts = TensorDict({"index": torch.arange(2)}, batch_size=2)
        if validate is not None:
            prompts["validate"] = NonTensorData(validate)
        if given:
            prompts["agent_name"] = NonTensorStack(*given)
        wrapped.generate_sequences(prompts)
        assert len(manager.asked) == 1
        asked = manager.asked.pop()
        return asked["agent_name"] if "agent_name" in asked.keys() else None  # noqa: SIM118

    assert names(None, None) is None and names(False, None) is None
    assert names(True, None) == "single_turn_agent"
    mixed = ["capo_tool_agent", "tool_agent"]
    assert names(True, mixed).tolist() == ["tool_agent", "tool_agent"] and names(False, mixed).tolist() == mixed
    assert wrapped.other() == "as it was"


# ---- configuration


def test_the_example_is_a_configuration_of_verl(example):
    validate_config(example, use_reference_policy=False, use_critic=False)
    settings = runtime.check(example)
    assert settings.rule == "capo" and settings.judge_options["model"] == "Qwen/Qwen3-8B"
    assert example.trainer.use_v1 and example.trainer.v1.trainer_mode == "capo_sync"
    environment = example.ray_kwargs.ray_init.runtime_env.env_vars
    assert environment.VERL_USE_EXTERNAL_MODULES == runtime.__name__


def test_the_data_of_the_example_is_rewarded_by_verl_and_read_by_the_judge(example):
    make = runpy.run_path(str(EXAMPLES / "make_gsm8k.py"))
    row = make["row"]({"question": "How many?", "answer": "500 + 572 = 1072.\n#### 1,072"}, 7, "train")
    answer = row["reward_model"]["ground_truth"]
    said = {"so #### 1,072": 1.0, "so #### 1072": 1.0, "so #### 1,073": 0.0}
    assert {text: default_compute_score(row["data_source"], text, answer) for text in said} == said
    settings = runtime.check(example)
    assert runtime._question(settings, row) == "How many?"
    assert runtime._reference(settings, row) == "500 + 572 = 1072.\n#### 1,072"


def test_the_script_of_the_example_starts_verl_with_options_that_compose(tmp_path):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" "$@"\n')
    stub.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "GPUS": "2",
        "JUDGE_URL": "https://judge/v1",
        "JUDGE": "a/b",
    }
    command = ["bash", EXAMPLES / "run.sh", "algorithm.capo.rule=vppo"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert said[:4] == ["0,1", "-m", "verl.trainer.main_ppo", "--config-path"]
    assert said[4:7] == [str(EXAMPLES), "--config-name", "capo"]
    with initialize_config_dir(said[4], version_base=None):
        config = compose(said[6], overrides=said[7:])
    assert config.trainer.n_gpus_per_node == 2 and runtime.check(config).rule == "vppo"
    assert config.algorithm.capo.judge_options.url == "https://judge/v1"
    assert config.algorithm.capo.judge_options.model == "a/b"


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_the_trainers_are_verls_under_names_of_their_own(mode, example, monkeypatch):
    mine, base = get_trainer_cls(f"capo_{mode}"), get_trainer_cls(mode)
    assert issubclass(mine, base) and mine.__mro__[1] is runtime.CapoTrainerMixin
    seen = []
    monkeypatch.setattr(base, "__init__", lambda self, config: seen.append(config.trainer.v1.trainer_mode))
    trainer = mine(OmegaConf.merge(example, {"trainer": {"v1": {"trainer_mode": f"capo_{mode}"}}}))
    assert seen == [mode] and trainer.capo_settings.rule == "capo"


def changed(config, *changes):
    """As options of the command line, with or without a ``+``."""
    config = config.copy()
    OmegaConf.set_struct(config, False)
    return OmegaConf.merge(config, OmegaConf.from_dotlist(list(changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("algorithm.adv_estimator=grpo", "algorithm.adv_estimator='grpo' .* verl would run its own estimator"),
        ("critic.enable=true", "critic.enable=True .* a critic learns the return of every token"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=geo_mean", "loss_mode='geo_mean' .* takes the mean advantage"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=clip_cov", "loss_mode='clip_cov' .* checked with vanilla"),
        ("distillation.enabled=true", "distillation.enabled=True .* has advantages of its own"),
        ("algorithm.use_kl_in_reward=true", "use_kl_in_reward=True does not go with step-level credit"),
        ("algorithm.capo.judge=null", "algorithm.capo.judge=None .* who names wrong steps is missing"),
        ("algorithm.capo.judge=verl_judges.no_judge", "algorithm.capo.judge: verl_judges.no_judge with judge_options"),
        ("algorithm.capo.judge=nowhere.Judge", "algorithm.capo.judge: cannot import 'nowhere.Judge'"),
        (
            "algorithm.capo.judge=verl_judges.ready",
            "algorithm.capo.judge_options: verl_judges.ready is a judge already",
        ),
        ("algorithm.capo.judge_options.url=ftp://x", "algorithm.capo.judge: capo.judges.openai.OpenAIJudge with"),
        ("algorithm.capo.judge_options.colour=red", "algorithm.capo.judge: capo.judges.openai.OpenAIJudge with"),
        ("algorithm.capo.rule=dr_grpo", "algorithm.capo.rule='dr_grpo' looks at outcomes only"),
    ],
)
def test_what_does_not_go_with_step_level_credit_is_refused(changes, message, example):
    config = changed(example, changes)
    with pytest.raises(ValueError, match=message):
        runtime.check(config)
    with pytest.raises(ValueError, match=message):
        runtime.CapoTrainerSync(config)


def test_with_penalty_0_all_losses_go_and_no_judge_is_needed(example):
    loss = "actor_rollout_ref.actor.policy_loss.loss_mode=geo_mean"
    config = changed(example, "algorithm.capo.process_weight=0", "algorithm.capo.judge=null", loss)
    assert not runtime.check(config).active


def test_verls_legacy_trainer_is_refused_by_the_estimator(example):
    """It gives the estimator no critiques; with penalty 0 it needs none."""
    with pytest.raises(ValueError, match="trainer.use_v1=True"):
        compute_advantage(rows(), example.algorithm.adv_estimator, config=example.algorithm)


# ---- Ray


@pytest.mark.slow
def test_a_step_of_verls_trainer_with_workers_of_ray(tmp_path):
    """Every worker finds the plugin; judge and rewards are asked in them, and advantages come out of TransferQueue."""
    tiny_model.save(tmp_path / "model")
    with FakeServer() as server:
        changes = [
            f"actor_rollout_ref.model.path={tmp_path / 'model'}",
            f"algorithm.capo.judge_options.url={server.url}",
            "data.train_batch_size=2",
            "actor_rollout_ref.rollout.n=4",
            "actor_rollout_ref.rollout.agent.num_workers=1",
            "reward.num_workers=1",
            "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
            "transfer_queue.backend.SimpleStorage.total_storage_size=1000",
        ]
        with initialize_config_dir(str(EXAMPLES), version_base=None):
            OmegaConf.save(compose("capo", overrides=changes), tmp_path / "config.yaml", resolve=True)
        environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": runtime.__name__, "OMP_NUM_THREADS": "1"}
        script = Path(__file__).with_name("verl_ray.py")
        command = [sys.executable, "-W", "ignore", script, tmp_path / "config.yaml", tmp_path / "result.json"]
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-4000:]
        asked = len(server.requests)
    told = json.loads((tmp_path / "result.json").read_text())
    assert told["trainer"] == "CapoTrainerSync" and told["mode"] == "sync"
    assert asked == 8 and told["judged_in_validation"] == [False]
    assert len(told["uid"]) == 9 and told["uid"][0].startswith("pad") and not any(told["advantages"][0])

    ids = [torch.tensor(row) for row in told["responses"][1:]]
    outcomes = [float(TOKENIZER.decode(row, skip_special_tokens=True).endswith("#### 3")) for row in ids]
    assert [sum(row) for row in told["rm_scores"]] == [0, *outcomes] and len(set(outcomes)) == 2
    token_bytes = capo.TokenBytes.from_tokenizer(TOKENIZER)
    steps = capo.segment(torch.cat(ids), lengths_to_cu(list(map(len, ids))), token_bytes)
    flags = [["wrong" in step for step in row] for row in capo.steps.step_texts(torch.cat(ids), steps, token_bytes)]
    expected = capo.shape(outcomes, flags, groups=told["uid"][1:], token_ids=ids, token_bytes=token_bytes)
    for row, wanted in zip(told["advantages"][1:], expected, strict=True):
        assert torch.equal(torch.tensor(row), wanted)
    assert told["metrics"]["capo/critiques/failed"] == 0 and told["metrics"]["capo/vote_agreement"] == 1
