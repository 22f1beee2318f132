"""Canaries: responses whose wrong steps are known, judged in each update, so that a judge that is fooled, broken or gone shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from capo.credit import Vote
from capo.critique import vote_table
from capo.judges import Judge, JudgeError, JudgeRequest
from capo.judges.check import Labelled, quality

_DIGITS = "0123456789"


def make_canaries(
    solved: Sequence[JudgeRequest], checker: Callable[[JudgeRequest], Sequence[bool]], rng: Random
) -> list[Labelled]:
    """Every other response as it is, and the rest with the last digit of one step changed.

    Args:
        solved: right responses, whose steps hold digits.
        checker: for a request, one bool per step, True for each wrong step.
        rng: chooses step and digit.
    """
    canaries = []
    for number, request in enumerate(solved):
        if number % 2:
            steps = list(request.steps)
            place = rng.randrange(len(steps))
            steps[place] = _with_another_digit(steps[place], rng)
            request = JudgeRequest(request.question, request.reference, tuple(steps))
        canaries.append(Labelled(request, tuple(checker(request))))
    return canaries


def _with_another_digit(step: str, rng: Random) -> str:
    place = max(i for i, char in enumerate(step) if char in _DIGITS)
    return step[:place] + rng.choice(_DIGITS.replace(step[place], "")) + step[place + 1 :]


def ask_canaries(
    judge: Judge, canaries: Sequence[Labelled], num_votes: int, vote: Vote, quorum: int = 1, least: float = 0.0
) -> dict[str, float | None]:
    """How many canaries are judged right, as metrics.

    ``capo/canaries/right`` is the share of those without a wrong step that have no flagged one, ``capo/canaries/wrong`` the
    share of the others whose first flagged step is the first wrong one, both of those with a quorum of valid critiques;
    ``capo/canaries/unheard`` is the share without. None where there are none.

    Args:
        judge: any.
        canaries: see `make_canaries`.
        num_votes: K, all of which are asked for.
        vote, quorum: as for the policy's responses, see `capo.CreditRule` and `capo.critique.vote_table`.
        least: each of the two shares must reach it.

    Raises:
        JudgeError: from the judge; or a share is below the least.
    """
    replies = judge.critique([one.request for one in canaries], num_votes)
    counts = [len(one.wrong) for one in canaries]
    votes = vote_table([[reply.critique for reply in row] for row in replies], counts, num_votes, quorum)
    found = quality(votes, vote, canaries)
    for kind, share in (("without", found.all_right), ("with", found.first_error)):
        if share is not None and share < least:
            raise JudgeError(
                f"{share:.0%} of the canaries {kind} a wrong step are judged right, min_canaries={least:g} asks for more"
            )
    return {
        "capo/canaries/right": found.all_right,
        "capo/canaries/wrong": found.first_error,
        "capo/canaries/unheard": found.unheard,
    }
