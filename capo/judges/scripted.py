"""A judge without a model: a checker that knows the truth, and noise of known rates on top.

For tests, examples and dry runs. Prompts are rendered and replies are real text, read by the real parser, so that all around
a judge is exercised as it would be by a model. Tokens are counted in words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from capo.critique import render
from capo.judges import JudgeReply, JudgeRequest


@dataclass(frozen=True)
class ScriptedJudge:
    """A `Judge` that asks a checker and errs at given rates, independently per vote and step.

    Deterministic: a reply depends on the seed, the request's content and the vote's number, not on the batch, its order
    or earlier calls. So two requests of equal content get equal replies.

    Args:
        checker: for a request, one bool per step, True for each wrong step.
        false_alarm: probability that a right step is flagged.
        missed: probability that a wrong step is not flagged.
        invalid: probability that the reply is garbled, in one of several ways.
        failed: probability that no reply comes.
        seed: of all randomness.

    Raises:
        ValueError: a rate is outside [0, 1], or ``invalid + failed`` is above 1.
    """

    checker: Callable[[JudgeRequest], Sequence[bool]]
    false_alarm: float = 0.0
    missed: float = 0.0
    invalid: float = 0.0
    failed: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("false_alarm", "missed", "invalid", "failed"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ScriptedJudge: {name} must be in [0, 1], got {getattr(self, name)}")
        if self.invalid + self.failed > 1:
            raise ValueError(f"ScriptedJudge: invalid {self.invalid} and failed {self.failed} add up to more than 1")

    def critique(self, requests: Sequence[JudgeRequest], num_votes: int, first: int = 0) -> list[list[JudgeReply]]:
        """``num_votes`` replies per request; raises ValueError if the checker's answer has not one bool per step."""
        return [self._replies(request, num_votes, first) for request in requests]

    def _replies(self, request: JudgeRequest, num_votes: int, first: int) -> list[JudgeReply]:
        wrong = self.checker(request)
        if len(wrong) != len(request.steps):
            raise ValueError(f"ScriptedJudge: the checker gave {len(wrong)} labels for {len(request.steps)} steps")
        digest = request.fingerprint(self.seed)
        nonce = request.marks(self.seed).nonce
        prompt = render(request.question, request.reference, request.steps, nonce)
        # All votes share the prompt, so it is paid for once.
        lengths = [len(prompt.split())] + [0] * (num_votes - 1)
        return [
            self._reply(wrong, nonce, length, Random(f"{digest}/{vote}"))
            for vote, length in zip(range(first, first + num_votes), lengths, strict=False)
        ]

    def _reply(self, wrong: Sequence[bool], nonce: str, prompt_tokens: int, rng: Random) -> JudgeReply:
        fate = rng.random()
        if fate < self.failed:
            return JudgeReply.failure("scripted failure")
        flips = [rng.random() < (self.missed if is_wrong else self.false_alarm) for is_wrong in wrong]
        flagged = [i for i, (is_wrong, flip) in enumerate(zip(wrong, flips, strict=True)) if bool(is_wrong) != flip]
        write = write_garbled if fate < self.failed + self.invalid else write_critique
        text = write(flagged, len(wrong), nonce, rng)
        return JudgeReply.read(
            text, len(wrong), nonce, prompt_tokens=prompt_tokens, completion_tokens=len(text.split())
        )


def write_critique(flagged: Sequence[int], num_steps: int, nonce: str | None, rng: Random) -> str:
    """A reply as judges write it, which parses to exactly the flagged steps; its surface varies with ``rng``.

    Args:
        flagged: 0-based indices of the steps to call wrong, ascending; the verdict is Yes if there are none.
        num_steps: number of steps of the response.
        nonce: see `capo.critique.render`.
        rng: chooses among the variants the paper shows and others seen in the wild (CAPO, appendix F).
    """
    begin, end = _tags(nonce)
    lines = [_judgment("No" if flagged else "Yes", rng)]
    if flagged and rng.random() < 0.3:
        lines.append(f"Going through the solution, the trouble starts in step_{flagged[0]}.")
    if flagged or rng.random() < 0.5:
        lines.append(f"{begin}{_items(flagged, nonce, rng)}{end}")
    if rng.random() < 0.5:
        other = rng.randrange(num_steps) if num_steps else 0
        lines.append(f"Explanation: see step_{other} and what follows from it; <step_{other}> is where to look.")
    if rng.random() < 0.2:
        lines.insert(0, f"<think>Perhaps {begin}0{end}? Let me see.</think>")
    return rng.choice(["\n", "\n\n"]).join(lines)


def write_garbled(flagged: Sequence[int], num_steps: int, nonce: str | None, rng: Random) -> str:
    """A reply that never parses, garbled in one of the ways judges garble; arguments as in `write_critique`."""
    begin, end = _tags(nonce)
    no = _judgment("No", rng)
    first = flagged[0] if flagged else 0
    return rng.choice(
        [
            "",
            "I'm sorry, but I cannot help with marking this solution.",
            "<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>",
            '{"verdict": "incorrect", "steps": [0]}',
            f"{no}\nThe mistake is in step {first}.",  # no list
            f"{no}\n{begin}{first}, ",  # cut off
            f"{no}\n{begin}the first step{end}",
            f"{no}\n{begin}{first}.0{end}",
            f"{no}\n{begin}{num_steps}{end}",  # counted from 1
            f"<think>{no}\n{begin}{first}{end}",  # reasoning that never ends
        ]
    )


def _tags(nonce: str | None) -> tuple[str, str]:
    suffix = "" if nonce is None else f":{nonce}"
    return f"<incorrect_steps{suffix}>", f"</incorrect_steps{suffix}>"


def _judgment(verdict: str, rng: Random) -> str:
    word = rng.choice(["Judgment", "Judgement"])
    question = "Is the solution correct (Yes/No)?"
    return rng.choice(
        [
            f"{word}: {question} {verdict}",
            f"{word}: {question} **{verdict}**",
            f"**{word}:** {question} {verdict}.",
            f"**{word}: {question} {verdict}**",
            f"{word}: {verdict}",
        ]
    )


def _items(flagged: Sequence[int], nonce: str | None, rng: Random) -> str:
    style = rng.choice(["{}", "step_{}", "<step_{}>"] + ([] if nonce is None else [f"<step_{{}}:{nonce}>"]))
    items = [style.format(index) for index in flagged]
    runs_on = len(flagged) > 2 and all(after == before + 1 for before, after in pairwise(flagged))
    if runs_on and rng.random() < 0.5:
        return f"{items[0]}-{items[-1]}"
    if items and rng.random() < 0.1:
        items.append(items[0])
    return rng.choice([",", ", "]).join(items)
