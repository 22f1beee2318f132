"""Step-level credit in slime, by paths on its command line.

    --custom-reward-post-process-path capo.integrations.slime.post_process
    --custom-advantage-function-path capo.integrations.slime.advantages

with CAPO_CREDIT in the environment of its processes. The first runs where all samples of a rollout are together: it asks the
judge and computes the advantages of the tokens. They go to the trainer's ranks as the samples' rewards, the one channel
that slime does not cut down; the second takes them out again, cut for context parallelism.

Layout C: a list of 1-D tensors, one a sample, position t for token t of the response.

Read: THUDM/slime at 00c2d6db0f23a4900be6e80a8eb81eebf9e1ebff (slime/backends/megatron_utils/loss.py) and
0d234f3e3a83c81b7d37209994e0b994deacbb24 (slime/utils/types.py); slime/ray/rollout.py, slime/utils/ppo_utils.py and
slime/backends/megatron_utils/cp_utils.py of the same time.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from capo.shaping import KL_IN_REWARD, SEQUENCE_RATIO, StepCredit, configured_credit, question_text, refuse

VOTES = "capo_votes"  # in a sample's metadata: votes that were asked for before `post_process`
ESTIMATORS = ("grpo", "cispo", "gspo")

_log = logging.getLogger(__name__)


async def judge(sample: Any) -> None:
    """Ask the judge about one sample, in a reward function of yours, while others are still sampled.

    ::

        async def reward(args, sample, **kwargs):
            score, _ = await asyncio.gather(my_score(sample), capo.integrations.slime.judge(sample))
            return score
    """
    credit = configured_credit()
    if credit.active:
        (votes,) = await credit.votes_async(*_questions([sample]))
        sample.metadata[VOTES] = votes.tolist()


def post_process(args: Any, samples: list[Any]) -> tuple[list[float], list[Any]]:
    """Rewards as slime normalises them; for a sample with step-level credit, a list: that number, then all advantages.

    Raises:
        ValueError: settings that do not go with step-level credit, with the reason.
    """
    credit = configured_credit()
    check(credit, args)
    raw = [sample.get_reward_value(args) for sample in samples]
    rewards = _normalised(args, raw)
    if not credit.active:
        return raw, rewards
    masks = [_mask(sample) for sample in samples]
    host = [torch.full((sample.response_length,), reward) for sample, reward in zip(samples, rewards, strict=True)]
    shaped = credit.shape(host, raw, _votes(credit, samples), _groups(args, samples), masks)
    _log.info("%s", credit.take_metrics())
    return raw, [
        own if after is before else [own, *after.tolist()]
        for own, before, after in zip(rewards, host, shaped, strict=True)
    ]


def advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """Set ``advantages`` and ``returns`` to lists of float32 tensors, and make single numbers of ``rewards`` again."""
    rewards, like = rollout_data["rewards"], rollout_data["kl"]
    values = []
    for place, (reward, kl) in enumerate(zip(rewards, like, strict=True)):
        if isinstance(reward, list):
            row = torch.tensor(reward[1:], dtype=torch.float32, device=kl.device)
            if len(row) != len(kl):
                row = _cut(row, rollout_data["total_lengths"][place], rollout_data["response_lengths"][place])
            if len(row) != len(kl):
                raise ValueError(f"sample {place} has {len(kl)} tokens in this process, but {len(row)} advantages")
            values.append(row)
        else:
            values.append(torch.ones_like(kl) * torch.tensor(reward, dtype=torch.float32, device=kl.device))
    rollout_data["rewards"] = [reward[0] if isinstance(reward, list) else reward for reward in rewards]
    rollout_data["advantages"] = values
    rollout_data["returns"] = list(values)


def check(credit: StepCredit, args: Any) -> None:
    """Raise ValueError for settings that do not go with step-level credit.

    The estimator matters even at process weight 0: `advantages` takes its place.
    """
    estimator, kl = args.advantage_estimator, args.kl_coef
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"advantage_estimator={estimator!r} does not go with capo.integrations.slime: checked with grpo and cispo, in "
            "which a response has one advantage to begin with"
        )
    refuse(
        credit,
        advantage_estimator=(estimator, SEQUENCE_RATIO if estimator == "gspo" else None),
        kl_coef=(kl, KL_IN_REWARD if kl and credit.base == "rule" else None),
    )


def _normalised(args: Any, raw: list[float]) -> list[float]:
    """What slime makes of the rewards where no function post-processes them."""
    if not args.rewards_normalization:
        return raw
    rewards = torch.tensor(raw, dtype=torch.float)
    whole = len(raw) == args.n_samples_per_prompt * args.rollout_batch_size
    rewards = rewards.reshape(-1, args.n_samples_per_prompt) if whole else rewards.view(-1, len(raw))
    rewards = rewards - rewards.mean(dim=-1, keepdim=True)
    if args.grpo_std_normalization:
        rewards = rewards / (rewards.std(dim=-1, keepdim=True) + 1e-6)
    return rewards.flatten().tolist()


def _groups(args: Any, samples: list[Any]) -> int | list[Any]:
    ids = [sample.group_index for sample in samples]
    return args.n_samples_per_prompt if None in ids else ids


def _votes(credit: StepCredit, samples: list[Any]) -> list[Tensor]:
    known = [(sample.metadata or {}).get(VOTES) for sample in samples]
    asked = [sample for sample, votes in zip(samples, known, strict=True) if votes is None]
    found = iter(credit.votes(*_questions(asked)))
    return [next(found) if votes is None else torch.tensor(votes, dtype=torch.int32) for votes in known]


def _questions(samples: list[Any]) -> tuple[list[Any], list[str], list[Any], list[Any]]:
    ids = [sample.tokens[len(sample.tokens) - sample.response_length :] for sample in samples]
    labels = [None if sample.label is None else str(sample.label) for sample in samples]
    return ids, [question_text(sample.prompt) for sample in samples], labels, [_mask(sample) for sample in samples]


def _mask(sample: Any) -> Tensor:
    if sample.remove_sample:
        return torch.zeros(sample.response_length, dtype=torch.bool)
    if sample.loss_mask is None:
        return torch.ones(sample.response_length, dtype=torch.bool)
    return torch.tensor(sample.loss_mask, dtype=torch.bool)


def _cut(row: Tensor, total_length: int, response_length: int) -> Tensor:
    from slime.backends.megatron_utils.cp_utils import slice_log_prob_with_cp

    return slice_log_prob_with_cp(row, total_length, response_length)
