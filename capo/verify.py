"""Verifiers: is a response's final answer right? Three states, so that a fault never becomes a reward."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction


class Outcome(Enum):
    """What a verifier says of a response's final answer."""

    RIGHT = "right"
    WRONG = "wrong"
    UNDECIDED = "undecided"  # the verifier could not tell; the response leaves its group

    @property
    def reward(self) -> float:
        """1, 0 or NaN, as ``capo.Credit`` takes it."""
        return {"right": 1.0, "wrong": 0.0, "undecided": float("nan")}[self.value]


class AnswerTooLong(ValueError):
    """A number with more digits than the verifier compares."""


_NUMBER = r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?"
_LATEX_FRACTION = r"(?P<sign>[+-]?)\\[dt]?frac\{(?P<over>[+-]?[0-9]+)\}\{(?P<under>[0-9]+)\}"
_VALUE = re.compile(rf"{_LATEX_FRACTION}|(?P<top>{_NUMBER})(?: ?/ ?(?P<bottom>[0-9]+))?", re.ASCII)


@dataclass(frozen=True)
class Verifier:
    """Compares final answers that are plain numbers: integers, decimals and fractions, exactly.

    The answer of a response is the last complete one of: what follows ``#`` (``####``) to the end of its line, and
    ``\\boxed{...}``. Complete means that the braces close and a number is in it, and nothing else but ``$``, blanks, or a
    full stop at its end. Numbers are ``-12``, ``1,234``, ``0.5``, ``3/4``, ``\\frac{3}{4}`` in ASCII digits, compared as
    fractions. A response without such an answer is wrong. Nothing is evaluated.

    Args:
        max_digits: a longer number is not compared, and the outcome is undecided.
    """

    max_digits: int = 100

    def __post_init__(self) -> None:
        # Python itself refuses to convert more than 4300 digits.
        if not 1 <= self.max_digits <= 4000:
            raise ValueError(f"Verifier: max_digits must be in 1..4000, got {self.max_digits}")

    def verify(self, responses: Sequence[str], answers: Sequence[str]) -> list[Outcome]:
        """The outcome of each response against its known answer.

        Args:
            responses: texts.
            answers: known answers, bare (``3/4``) or in one of the forms above. One that is no number makes the outcome
                undecided, whatever the response says.

        Raises:
            ValueError: the lengths differ.
        """
        if len(responses) != len(answers):
            raise ValueError(f"verify: {len(responses)} responses, but {len(answers)} answers")
        return [self._outcome(response, answer) for response, answer in zip(responses, answers, strict=True)]

    def _outcome(self, response: str, answer: str) -> Outcome:
        try:
            known = _value(answer, self.max_digits)
            known = final_answer(answer, self.max_digits) if known is None else known
            if known is None:
                return Outcome.UNDECIDED
            return Outcome.RIGHT if final_answer(response, self.max_digits) == known else Outcome.WRONG
        except AnswerTooLong:
            return Outcome.UNDECIDED


def final_answer(text: str, max_digits: int = 100) -> Fraction | None:
    """The last complete answer in a text, or None; see `Verifier`.

    Raises:
        AnswerTooLong: that answer has more than ``max_digits`` digits.
    """
    for _, written in sorted(_after_hashes(text) + _boxes(text), reverse=True):
        value = _value(written, max_digits)
        if value is not None:
            return value
    return None


def _after_hashes(text: str) -> list[tuple[int, str]]:
    """Position and content of what follows the last ``#`` of every line."""
    found, start = [], 0
    for line in text.split("\n"):
        mark = line.rfind("#") + 1
        if mark:
            found.append((start + mark, line[mark:]))
        start += len(line) + 1
    return found


def _boxes(text: str) -> list[tuple[int, str]]:
    r"""Position and content of every ``\boxed{...}`` whose braces close and that holds no other box; linear time."""
    boxes: list[tuple[int, str]] = []
    open_braces: list[int] = []  # for each open brace, where the content of its box begins; 0: no box
    for match in re.finditer(r"\\boxed\{|[{}]", text):
        if match[0] != "}":
            open_braces.append(match.end() if match[0] != "{" else 0)
        # A box around another one begins before it and ends after it; only the inner one can be a number.
        elif open_braces and (begin := open_braces.pop()) and (not boxes or begin > boxes[-1][0]):
            boxes.append((begin, text[begin : match.start()]))
    return boxes


def _value(written: str, max_digits: int) -> Fraction | None:
    match = _VALUE.fullmatch(written.strip().removesuffix(".").strip("$ \t"))
    if match is None:
        return None
    if sum(map(str.isdigit, match[0])) > max_digits:
        raise AnswerTooLong(f"a number of more than {max_digits} digits")
    if match["over"]:
        value, divisor = Fraction(match["over"]), int(match["under"])
        value = -value if match["sign"] == "-" else value
    else:
        value, divisor = Fraction(match["top"].replace(",", "")), int(match["bottom"] or 1)
    return value / divisor if divisor else None
