"""Votes that are not asked for: those that cannot change a decision, and those that cannot change an advantage.

Both are exact. A vote is left out only if the step weights it could change, whatever it and all others left out had said
and however many of them were invalid, do not decide a token's advantage.

Dimension key: B responses, K critiques.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from capo.credit import CreditRule, Vote
from capo.critique import Critique
from capo.judges import Judge, JudgeReply, JudgeRequest

# What of a response's step weights a credit rule looks at.
Matters = Literal["every", "first", "any"]
_MATTERS: dict[str, Matters] = {"prefix": "first", "flawed": "any"}


def votes_missing(valid: int, flagged: int, left: int, vote: Vote) -> int:
    """How many of the votes still open are needed at the least to decide a step; 0 if it is decided.

    Decided means: the weight is the same whatever the open votes say, and however many of them abstain.

    Args:
        valid: votes so far that count, n.
        flagged: those of them that flag the step, c.
        left: votes that are still open.
        vote: the rule, see `capo.CreditRule`.
    """
    clear = valid - flagged
    # To flag: so many flags that even if all other votes are clear (or, at n = 0, abstain) the rule flags. The other way
    # round to clear. `total` is the largest n there can be.
    total = valid + left
    if vote == "majority":
        needed = min(math.ceil(total / 2) - flagged, total // 2 + 1 - clear)
    elif vote == "strict_majority":
        needed = min(total // 2 + 1 - flagged, math.ceil(total / 2) - clear)
    elif vote == "intersection":
        needed = min(left if not clear else left + 1, 1 - clear)
    elif vote == "union":
        needed = min(1 - flagged, left if not flagged else left + 1)
    else:  # the average moves with every vote
        needed = left
    return min(max(needed, 0), left)


def response_votes_missing(
    critiques: Sequence[Critique | None],
    num_steps: int,
    left: int,
    vote: Vote,
    matters: Matters = "every",
    quorum: int = 1,
) -> int:
    """How many more votes are needed at the least to decide what matters of a response; 0 if it is decided.

    It is not decided before it has its quorum, and it is decided once it can no longer have one.

    Args:
        critiques: the votes so far, None for those that abstain.
        num_steps: of the response.
        left: votes that are still open.
        vote: the rule.
        matters: ``every`` step's weight, the ``first`` flagged step, or whether ``any`` is flagged.
        quorum: see `collect`.
    """
    valid = sum(critique is not None for critique in critiques)
    short = quorum - valid
    if not num_steps or short > left:
        return 0
    return max(short, _votes_missing(critiques, num_steps, valid, left, vote, matters))


def _votes_missing(
    critiques: Sequence[Critique | None], num_steps: int, valid: int, left: int, vote: Vote, matters: Matters
) -> int:
    flags = [0] * num_steps
    for critique in critiques:
        for index in critique.flagged if critique is not None else ():
            flags[index] += 1
    missing = [votes_missing(valid, count, left, vote) for count in flags]
    if matters == "every":
        return max(missing)
    if not any(missing):
        return 0
    first = next(i for i, needed in enumerate(missing) if needed)  # the first undecided step
    known = flags if matters == "any" else flags[:first]
    if any(not missing[i] and _flags(valid, count, vote) for i, count in enumerate(known)):
        return 0
    return min(needed for needed in missing if needed) if matters == "any" else missing[first]


def _flags(valid: int, flagged: int, vote: Vote) -> bool:
    """Whether a decided step is flagged."""
    if valid == 0:
        return False
    return {
        "majority": 2 * flagged >= valid,
        "strict_majority": 2 * flagged > valid,
        "intersection": flagged == valid,
        "union": flagged > 0,
        "average": 2 * flagged >= valid,
    }[vote]


def needs_votes(
    rule: CreditRule, outcomes: Sequence[float], num_steps: Sequence[int], groups: Sequence[int]
) -> list[bool]:
    """Which responses' votes can change an advantage under the rule. [B]

    None without a process weight, without steps, or with an undecided outcome. ``prefix`` looks at wrong responses only,
    ``flawed`` and ``share`` at right ones; normalising over the responses of a group, or over its right ones, needs two
    of them. All other votes count, also those of groups whose outcomes are all equal.

    Args:
        rule: the credit rule.
        outcomes: [B] NaN is undecided.
        num_steps: [B] steps per response.
        groups: [B] the group of each response.
    """
    decided: dict[int, int] = {}
    right: dict[int, int] = {}
    for outcome, group in zip(outcomes, groups, strict=True):
        decided[group] = decided.get(group, 0) + (not math.isnan(outcome))
        right[group] = right.get(group, 0) + (outcome > 0)

    def needed(outcome: float, steps: int, group: int) -> bool:
        if rule.process_weight == 0 or steps == 0 or math.isnan(outcome):
            return False
        if rule.normalize in ("responses", "leave_one_out") and decided[group] < 2:
            return False
        if rule.reward == "prefix":
            return not outcome > 0
        if rule.reward == "flawed":
            return outcome > 0
        if rule.reward == "share":
            return outcome > 0 and right[group] > 1
        return True

    return [needed(*response) for response in zip(outcomes, num_steps, groups, strict=True)]


@dataclass(frozen=True)
class Votes:
    """What was asked and answered.

    Args:
        replies: per response, at most K; fewer where the rest could change nothing.
        asked: replies asked for. Equal responses to equal questions are asked about once.
        full: replies that K votes on every response would have been.
    """

    replies: list[list[JudgeReply]]
    asked: int
    full: int

    @classmethod
    def concat(cls, parts: Sequence[Votes]) -> Votes:
        """Those of several calls as of one."""
        replies = [row for part in parts for row in part.replies]
        return cls(replies, sum(part.asked for part in parts), sum(part.full for part in parts))


def collect(
    judge: Judge,
    requests: Sequence[JudgeRequest],
    num_votes: int,
    rule: CreditRule,
    outcomes: Sequence[float] | None = None,
    groups: Sequence[int] | None = None,
    *,
    adaptive: bool = True,
    share: bool = True,
    quorum: int = 1,
) -> Votes:
    """Ask a judge for as few votes as decide the advantages of all responses.

    The advantages are those of K votes on every response, bit for bit, if the judge's i-th vote on a request does not
    depend on how votes are asked for; and the decisions follow from the votes there are in any case.

    Args:
        judge: any.
        requests: [B] the responses.
        num_votes: K.
        rule: the credit rule that will use the votes.
        outcomes, groups: [B] see `needs_votes`; None: every response is judged.
        adaptive: ask in rounds, and no more about a response once what matters of it is decided. False: K votes on each.
        share: responses that are equal, with equal questions, are judged once.
        quorum: see `capo.critique.vote_table`, which is to be given the same.

    Raises:
        capo.judges.JudgeError: from the judge.
    """
    wanted: Iterable[bool] = [True] * len(requests)
    if outcomes is not None and groups is not None and adaptive:
        wanted = needs_votes(rule, outcomes, [len(request.steps) for request in requests], groups)
    owner: dict[JudgeRequest | int, int] = {}
    owners = [owner.setdefault(request if share else i, i) for i, request in enumerate(requests)]
    open_ones = sorted({owners[i] for i, want in enumerate(wanted) if want})
    replies: list[list[JudgeReply]] = [[] for _ in requests]
    matters = _MATTERS.get(rule.reward, "every")

    def missing(index: int) -> int:
        left = num_votes - len(replies[index])
        if not adaptive:
            return left
        critiques = [reply.critique for reply in replies[index]]
        return response_votes_missing(critiques, len(requests[index].steps), left, rule.vote, matters, quorum)

    asked = 0
    while rounds := _by_size(open_ones, missing, replies):
        for (first, size), members in rounds.items():
            answers = judge.critique([requests[i] for i in members], size, first=first)
            asked += size * len(members)
            for index, answer in zip(members, answers, strict=True):
                replies[index].extend(answer)
        open_ones = [i for members in rounds.values() for i in members]
    given: set[int] = set()
    rows = []
    for own, want in zip(owners, wanted, strict=True):
        rows.append(_copies(replies[own], again=own in given) if want else [])
        if want:
            given.add(own)
    return Votes(rows, asked, num_votes * len(requests))


def _copies(replies: list[JudgeReply], again: bool) -> list[JudgeReply]:
    """The replies; a second time without tokens and time, which were spent once."""
    if not again:
        return replies
    return [dataclasses.replace(reply, prompt_tokens=0, completion_tokens=0, seconds=0.0) for reply in replies]


def _by_size(
    open_ones: list[int], missing: Callable[[int], int], replies: list[list[JudgeReply]]
) -> dict[tuple[int, int], list[int]]:
    """Responses that need votes, by the number of the first one and how many."""
    rounds: dict[tuple[int, int], list[int]] = {}
    for index in open_ones:
        if size := missing(index):
            rounds.setdefault((len(replies[index]), size), []).append(index)
    return rounds
