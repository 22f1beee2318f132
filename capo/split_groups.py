"""Advantages where a group's responses lie on several processes: they exchange five numbers a response, never tokens.

The numbers are the count, mean and sum of squared deviations of the response's token rewards, which add up without
cancellation, and their smallest and largest, by which a constant group is recognised exactly.

Dimension key: A responses of all processes, B of this one, N packed tokens of this one, G groups.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from capo import reference
from capo.credit import Credit, CreditRule

MOMENTS = 5  # numbers per response


def response_moments(credit: Credit) -> Tensor:
    """What other processes need to know of each response. float64 [B, 5]

    Count, mean, sum of squared deviations, minimum and maximum of its token rewards. A response without tokens has the
    reward of a token outside all steps as its mean; an undecided one has NaN.

    Raises:
        ValueError: a rule that these do not suffice for, or contradictory credit, see `Credit.advantages`.
    """
    rewards, base = _token_rewards(credit)
    lengths = credit.cu_seqlens.diff().long()
    count = lengths.double()
    total, lowest, highest = (torch.segment_reduce(rewards, how, lengths=lengths) for how in ("sum", "min", "max"))
    mean = torch.where(lowest == highest, lowest, total / count)
    mean = torch.where(lengths == 0, base, mean)
    deviations = (rewards - mean.repeat_interleave(lengths)).square()
    squares = torch.segment_reduce(deviations, "sum", lengths=lengths)
    return torch.stack([count, torch.where(credit.outcomes.isnan(), math.nan, mean), squares, lowest, highest], 1)


def gathered_advantages(credit: Credit, moments: Tensor, groups: Tensor) -> Tensor:
    """The advantages of this process's tokens, of groups that may reach over all processes. float32 [N]

    Equals ``credit.advantages()`` but for rounding in float64, where all responses are here.

    Args:
        credit: this process's responses.
        moments: float64 [A, 5], `response_moments` of all processes' responses, in the same order everywhere.
        groups: integer [A], the group of each of them.
    """
    rule = credit.rule
    rewards, _ = _token_rewards(credit)
    everyone, ids = moments.cpu(), groups.cpu().long()  # so that all processes add up alike, whatever their device
    decided = ~everyone[:, 1].isnan()
    names, group = ids[decided].unique(return_inverse=True)
    statistics = _Groups(everyone[decided], group, len(names), rule)

    lengths = credit.cu_seqlens.diff().long()
    undecided = credit.outcomes.isnan()
    # A group without any decided response is not among the names; whatever is found in its place goes unused.
    place = torch.searchsorted(names, credit.groups.cpu().long()).clamp(max=max(len(names) - 1, 0))
    if len(names) == 0:
        return torch.zeros_like(rewards, dtype=torch.float32)
    center, scale = statistics.center[place].to(rewards.device), statistics.scale[place].to(rewards.device)
    if rule.normalize == "leave_one_out":
        own = response_moments(credit)[:, 1]
        others = statistics.others[place].to(rewards.device)
        center = (statistics.total[place].to(rewards.device) - own) / others
    scale = torch.where(undecided, math.inf, scale)
    dead = scale.isinf().repeat_interleave(lengths)
    values = (rewards - center.repeat_interleave(lengths)) / scale.repeat_interleave(lengths)
    limit = math.inf if rule.clamp is None else rule.clamp
    return torch.where(dead, 0.0, values.clamp(-limit, limit)).float()


class _Groups:
    """What is subtracted and divided by in each group; a scale of infinity makes all its advantages 0. float64 [G]"""

    def __init__(self, moments: Tensor, group: Tensor, num_groups: int, rule: CreditRule) -> None:
        count, mean, squares, lowest, highest = moments.unbind(1)
        zeros = torch.zeros(num_groups, dtype=torch.float64)

        def add(values: Tensor) -> Tensor:
            return zeros.index_add(0, group, values)

        def reach(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
            return (
                torch.full_like(zeros, math.inf).scatter_reduce(0, group, low, "amin"),
                torch.full_like(zeros, -math.inf).scatter_reduce(0, group, high, "amax"),
            )

        if rule.normalize in ("group_tokens", "group_mean"):
            tokens = add(count)
            self.center = add(torch.where(count > 0, count * mean, 0.0)) / tokens
            low, high = reach(lowest, highest)
            constant = low >= high  # also where there are no tokens: infinity and its negative
            spread = squares + count * (mean - self.center[group]).square()
            std = (add(torch.where(count > 0, spread, 0.0)) / tokens).sqrt()
        else:
            members = add(torch.ones_like(mean))
            self.total, self.others = add(mean), members - 1
            self.center = self.total / members
            constant = _equal(*reach(torch.minimum(lowest, mean), torch.maximum(highest, mean)))
            std = (add((mean - self.center[group]).square()) / self.others).sqrt()
            if rule.normalize == "responses":
                constant |= _equal(*reach(mean, mean))
            if rule.normalize != "responses_mean":
                constant |= members == 1
        scale = std.clamp(min=rule.std_floor) if rule.normalize in ("group_tokens", "responses") else zeros + 1
        self.scale = torch.where(constant, math.inf, scale)


def _equal(low: Tensor, high: Tensor) -> Tensor:
    """Whether values differ by no more than the rounding of the means among them; as in `capo.reference`."""
    return high - low <= 1e-12 * torch.maximum(low.abs(), high.abs())


def _token_rewards(credit: Credit) -> tuple[Tensor, Tensor]:
    """The reward of every token, and of a token outside all steps in each response. float64 [N], [B]"""
    rule, steps = credit.rule, credit.steps
    if rule.reward in ("step_suffix", "share"):
        raise ValueError(
            f"a rule with reward={rule.reward!r} needs the steps of whole groups in one process; choose the numbers of "
            "responses per process and per prompt so that no group is split"
        )
    lengths = credit.cu_seqlens.diff().long()
    outcomes = credit.outcomes.detach().float()
    reference.check_credit(
        outcomes, credit.votes, steps.starts, steps.ends, steps.cu_steps, credit.cu_seqlens, int(lengths.sum())
    )
    outcomes = outcomes.double()
    c, p = rule.outcome_weight, rule.process_weight
    weights = reference.step_weights(credit.votes, rule.vote)
    flagged = weights >= 0.5
    response = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    step_response = torch.arange(len(lengths), device=lengths.device).repeat_interleave(steps.cu_steps.diff())
    right = outcomes > 0
    if rule.reward == "step":
        base = c * outcomes
        sizes = steps.ends - steps.starts
        first = steps.starts - (sizes.cumsum(0) - sizes)
        tokens = first.repeat_interleave(sizes) + torch.arange(int(sizes.sum()), device=sizes.device)
        weight = torch.zeros(len(response), dtype=torch.float64, device=sizes.device)
        weight[tokens] = weights.repeat_interleave(sizes)
        return base[response] - p * weight, base
    if rule.reward == "prefix":
        base = torch.where(right, c, torch.where(outcomes.isnan(), math.nan, p))
        end = torch.full_like(credit.cu_seqlens[:-1], torch.iinfo(credit.cu_seqlens.dtype).max).long()
        end = end.scatter_reduce(0, step_response[flagged], steps.starts[flagged], "amin")
        reached = torch.arange(len(response), device=response.device) >= end[response]
        return torch.where(reached & ~right[response], 0.0, base[response]), base
    any_flagged = torch.zeros_like(right).index_fill(0, step_response[flagged], True)
    base = torch.where(right, torch.where(any_flagged, c - p, c), torch.where(outcomes.isnan(), math.nan, -c)).double()
    return base[response], base


def without_steps(credit: Credit) -> Credit:
    """The same credit, but for the process weight: 0."""
    return dataclasses.replace(credit, rule=dataclasses.replace(credit.rule, process_weight=0.0))
