"""Credit: outcomes, votes, steps, groups and a rule; everything that token advantages are made of."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from capo import ops
from capo.steps import Steps

Vote = Literal["majority", "strict_majority", "intersection", "union", "average"]
Reward = Literal["step", "step_suffix", "prefix", "flawed", "share"]
Normalize = Literal["group_tokens", "group_mean", "responses", "responses_mean", "leave_one_out", "group_steps"]


def _one_of(where: str, name: str, value: object, known: tuple) -> None:
    if value not in known:
        raise ValueError(f"{where}: {name} must be one of {', '.join(map(str, known))}, got {value!r}")


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


@dataclass(frozen=True)
class CreditRule:
    """How outcomes and votes become token advantages; ``CreditRule.preset(name)`` gives the published rules.

    Args:
        vote: step weight from the n valid votes of a step, c of them flagging it. ``majority``: 1 if 2c >= n (a tie
            flags); ``strict_majority``: 2c > n; ``intersection``: c = n; ``union``: c >= 1; ``average``: c / n.
            No valid vote gives weight 0. With one vote all are the paper's "greedy".
        outcome_weight: C, weight of the outcome.
        process_weight: P, weight of the steps. At 0 the steps have no influence, bit for bit. C > P keeps every token
            of a right response above every token of a wrong one.
        reward: what is rewarded. ``step``: a token, R = C * outcome - P * weight of its step (Eq. 1 of the paper);
            ``step_suffix``: a step, R as before, and a token gets the sum over its own and all later steps
            (DeepSeekMath's process supervision); ``prefix``: a token, C in right responses, P before the first flagged
            step of wrong ones, else 0 (VPPO); ``flawed``: a response, C or -C by outcome, less P if right with a
            flagged step (FAPO); ``share``: a response, C times its normalised outcome plus P times the share of
            unflagged steps, normalised over the right responses only (PAPO).
        normalize: over what. ``group_tokens``: (R - mean) / std over all tokens of the group, population std (Eq. 2);
            ``group_mean``: R - mean over all tokens of the group; ``responses``: (R - mean) / std over the mean rewards
            of the responses, sample std (GRPO); ``responses_mean``: R - that mean (Dr. GRPO); ``leave_one_out``: R -
            mean over the other responses (RLOO); ``group_steps``: (R - mean) / std over all steps of the group,
            population std; goes with ``step_suffix`` and only with it.
        std_floor: the std is at least this.
        clamp: advantages are clamped to [-clamp, clamp]; None: not at all.

    A response counts as right if its outcome is above 0, and a step as flagged if its weight is at least 0.5. A group
    whose rewards are all equal (compared exactly) gets advantage 0. An outcome of NaN is undecided: that response gets
    advantage 0 and its group is formed without it.

    Raises:
        ValueError: unknown name, number out of range, or a combination that no rule defines.
    """

    vote: Vote = "majority"
    outcome_weight: float = 2.0
    process_weight: float = 1.0
    normalize: Normalize = "group_tokens"
    std_floor: float = 0.0
    clamp: float | None = None
    reward: Reward = "step"

    def __post_init__(self) -> None:
        _one_of("CreditRule", "vote", self.vote, get_args(Vote))
        _one_of("CreditRule", "reward", self.reward, get_args(Reward))
        _one_of("CreditRule", "normalize", self.normalize, get_args(Normalize))
        for name in ("outcome_weight", "process_weight", "std_floor"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"CreditRule: {name} must be finite and at least 0, got {value!r}")
        if self.clamp is not None and not (self.clamp > 0 and math.isfinite(self.clamp)):
            raise ValueError(f"CreditRule: clamp must be finite and above 0, or None, got {self.clamp!r}")
        if (self.reward == "step_suffix") != (self.normalize == "group_steps"):
            raise ValueError(
                f"CreditRule: reward='step_suffix' and normalize='group_steps' belong together, "
                f"got reward={self.reward!r} with normalize={self.normalize!r}"
            )
        if self.reward == "share" and self.normalize != "responses":
            raise ValueError(f"CreditRule: reward='share' needs normalize='responses', got {self.normalize!r}")

    @classmethod
    def preset(cls, name: str, **changes) -> CreditRule:
        """A published rule by name, with fields changed on request.

        ``capo`` (arXiv 2508.02298), ``grpo`` (2402.03300), ``dr_grpo`` (2503.20783), ``rloo`` (2402.14740), ``opo``
        (2505.23585), ``grpo_process`` (2402.03300, process supervision), ``vppo`` (2601.18984), ``fapo``
        (2510.22543), ``papo`` (2603.26535).
        """
        _one_of("CreditRule.preset", "name", name, tuple(_PRESETS))
        return dataclasses.replace(cls(**_PRESETS[name]), **changes)


_OUTCOME_ONLY = {"outcome_weight": 1.0, "process_weight": 0.0}
_PRESETS: dict[str, dict] = {
    "capo": {},
    "grpo": {**_OUTCOME_ONLY, "normalize": "responses"},
    "dr_grpo": {**_OUTCOME_ONLY, "normalize": "responses_mean"},
    "rloo": {**_OUTCOME_ONLY, "normalize": "leave_one_out"},
    "opo": {**_OUTCOME_ONLY, "normalize": "group_mean"},
    "grpo_process": {
        "outcome_weight": 0.0,
        "process_weight": 1.0,
        "reward": "step_suffix",
        "normalize": "group_steps",
    },
    "vppo": {"outcome_weight": 1.0, "process_weight": 0.5, "reward": "prefix", "normalize": "responses_mean"},
    "fapo": {"outcome_weight": 1.0, "process_weight": 1.0, "reward": "flawed", "normalize": "responses"},
    "papo": {"outcome_weight": 1.0, "process_weight": 1.0, "reward": "share", "normalize": "responses"},
}


@dataclass(frozen=True, eq=False)
class Credit:
    """Outcomes, votes, steps and groups of B packed responses, and the rule that makes token advantages of them.

    Args:
        outcomes: [B] float, the verifier's answers (1 right, 0 wrong; other rewards are allowed; NaN is undecided).
        votes: [M, K] int8, one column a critique: 1 flagged, 0 clear, -1 abstained.
        steps: the M steps.
        cu_seqlens: [B + 1] int32 or int64, cumulative response lengths; response i holds the tokens
            ``cu_seqlens[i]:cu_seqlens[i + 1]``.
        groups: [B] integer, the group of each response: any ids, ragged sizes, in any order.
        rule: how the above becomes advantages.

    Raises:
        ValueError: shapes, dtypes or values that contradict each other, named.
    """

    outcomes: Tensor
    votes: Tensor
    steps: Steps
    cu_seqlens: Tensor
    groups: Tensor
    rule: CreditRule = CreditRule()

    def __post_init__(self) -> None:
        num_responses = self.cu_seqlens.numel() - 1
        num_steps = self.steps.starts.numel()
        if self.cu_seqlens.dim() != 1 or num_responses < 0 or self.cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"Credit: cu_seqlens must be int32 or int64 [B + 1], got {_shape(self.cu_seqlens)}")
        if self.outcomes.shape != (num_responses,) or not self.outcomes.is_floating_point():
            raise ValueError(
                f"Credit: outcomes must be float [{num_responses}] (cu_seqlens says {num_responses} responses), "
                f"got {_shape(self.outcomes)}"
            )
        if self.votes.dim() != 2 or self.votes.shape[0] != num_steps or self.votes.dtype != torch.int8:
            raise ValueError(f"Credit: votes must be int8 [{num_steps}, K], got {_shape(self.votes)}")
        if self.steps.cu_steps.shape != (num_responses + 1,):
            raise ValueError(
                f"Credit: steps.cu_steps must have {num_responses + 1} entries, got {_shape(self.steps.cu_steps)}"
            )
        if self.groups.shape != (num_responses,) or self.groups.is_floating_point() or self.groups.dtype == torch.bool:
            raise ValueError(f"Credit: groups must be integer [{num_responses}], got {_shape(self.groups)}")
        devices = {t.device for t in (self.outcomes, self.votes, self.steps.starts, self.cu_seqlens, self.groups)}
        if len(devices) > 1:
            raise ValueError(f"Credit: tensors on different devices: {sorted(map(str, devices))}")

    def advantages(self) -> Tensor:
        """The advantage of every token. float32 [N]

        Equals, for the paper's rule, with ``R`` the token rewards ``C * outcome - P * weight`` of one group::

            (R - R.mean()) / R.std(correction=0)

        (``capo.reference.token_advantages`` is the definition of all rules). Statistics are O(steps), in float64.

        Raises:
            ValueError: steps outside their response or out of order, votes outside -1..1, an infinite outcome.
        """
        return ops.credit(self)
