"""The adapter of verl through verl's own functions: estimators, DataProto, losses, agent loops, configuration, Ray."""

import asyncio
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("verl", "ray", "hydra", "transfer_queue"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'capo[verl]'")

import numpy as np
import verl.trainer.config
from batches import lengths_to_cu, random_batch, reference
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tensordict import NonTensorData, NonTensorStack, TensorDict
from tiny_model import make_tokenizer
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, DictConfigWrap
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, get_policy_loss_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.config import ActorConfig

import capo
from capo.integrations import verl as adapter
from capo.integrations import verl_runtime as runtime
from capo.judges import JudgeError, JudgeReply
from capo.judges.scripted import ScriptedJudge
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
            {"steps": [list(s) for s in steps], "votes": ballots.tolist(), "states": said, "length": length,
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
    torch.testing.assert_close(
        advantages[live].double(), truth(packed(data, capo.CreditRule())), rtol=1e-6, atol=1e-9
    )


def test_metrics_by_hand():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    rewards = torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, 0]])
    judged = [
        {"steps": [[0, 2], [2, 4]], "votes": [[0, 1], [0, 0]], "states": ["valid", "valid"], "length": 4,
         "judge_tokens": 12, "seconds": 0.25, "problem": None},
        {"steps": [[0, 2]], "votes": [[1, -1]], "states": ["valid", "invalid"], "length": 2,
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
    with pytest.raises(ValueError, match="critiques are of 2 rows, but the batch has 12"), adapter.critiques([None] * 2):
        compute_advantage(rows(), "capo", config=config)
    data.non_tensor_batch["capo"][3] = None
    with pytest.raises(ValueError, match="row 3 has no critiques .* its agent loop is none of capo's"):
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
    with pytest.raises(JudgeError, match=f"{states.count('failed')} of the {len(states)} critiques of a batch have failed"):
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
    config = actor()
    config.policy_loss["loss_mode"] = mode
    if mode == "bypass_mode":
        config.policy_loss["rollout_correction"] = {"loss_type": "ppo_clip", "bypass_mode": True, "rollout_is": None}
    loss, _ = get_policy_loss_fn(mode)(old, logprobs, advantages, mask, "token-mean", config, None)
    loss.backward()
    return torch.equal(-logprobs.grad.sign(), advantages.sign() * mask)
