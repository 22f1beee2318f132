"""Verifiers: is a response's final answer right? Three states, so that a fault never becomes a reward."""

from __future__ import annotations

import importlib.util
import math
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from capo.answers import (
    FORMS,
    MAX_CHARS,
    AnswerTooLong,
    Number,
    Words,
    choice,
    chosen,
    clean,
    extract,
    is_unreadable_number,
    read,
)
from capo.errors import VerifierError

if TYPE_CHECKING:
    from typing_extensions import Self

    from capo.verify_pool import Pool

__all__ = ["AnswerTooLong", "Outcome", "Verifier", "VerifierError", "extract", "final_answer"]


class Outcome(Enum):
    """What a verifier says of a response's final answer."""

    RIGHT = "right"
    WRONG = "wrong"
    UNDECIDED = "undecided"  # the verifier could not tell; the response leaves its group

    @property
    def reward(self) -> float:
        """1, 0 or NaN, as ``capo.Credit`` takes it."""
        return {"right": 1.0, "wrong": 0.0, "undecided": float("nan")}[self.value]


# Known answers for the test of what is read without Math-Verify: known answer, response, verdict.
_PLAIN_PAIRS = (
    ("42", r"so \boxed{42}", "right"),
    ("42", r"so \boxed{43}", "wrong"),
    ("42", "no answer", "wrong"),
    ("1/2", "#### 0.5", "right"),
    ("0.5", r"\boxed{50\%}", "right"),
    (r"\frac{3}{4}", r"\boxed{\dfrac34}", "right"),
    ("1,234", "A: 1234", "right"),
    ("-3", "The answer is \u22123.", "right"),
    ("3", "The answer is -3.", "wrong"),
    ("1000", r"\boxed{3} is a step, \boxed{1\,000}", "right"),
    ("3", r"\boxed{3} is a step, \boxed{1\,000}", "wrong"),
    ("B", "The answer is (B).", "right"),
    ("B", "The answer is (C).", "wrong"),
    ("Monday", r"\boxed{\text{monday}}", "right"),
    ("Monday", r"\boxed{\text{Sunday}}", "wrong"),
    ("5 cm", r"\boxed{5\text{ cm}}", "right"),
    ("5 cm", r"\boxed{5\text{ m}}", "unit"),
    ("", r"\boxed{5}", "parse"),
    ("9007199254740992", "#### 9007199254740993", "wrong"),
    ("1" * 101, "#### 1", "size"),
    ("x+1", r"\boxed{x+1}", "right"),
)


class Verifier:
    r"""Compares the final answers of responses with known answers.

    Plain numbers, letters of a multiple choice and words are read and compared here, exactly, and nothing is evaluated.
    Anything else goes to Math-Verify, in processes with limits that are started when they are first needed; an answer
    that hits a limit is undecided. Any thread may call one verifier, and several at once; in asyncio use
    ``asyncio.to_thread``. Keep one verifier and ``close`` it, or use it as a context manager: its processes take a
    second to start. They end with the verifier and with the interpreter. docs/verify.md has the forms, the states and
    the limits.

    Args:
        max_digits: a number with more digits is undecided; at most 1000.
        forms: where an answer is looked for, see `capo.answers.extract`; the first form that occurs counts. Known
            answers may be bare besides.
        engine: ``math-verify`` for what is not plain; ``plain`` for none: what is not plain is then no answer, and the
            response wrong; ``auto``: Math-Verify if it is installed, else such responses are undecided.
        timeout: seconds of wall clock that one comparison may take, from the moment it begins.
        cpu: seconds of processor time that it may take.
        memory_mib: MiB of address space that it may add.
        workers: comparisons at a time, at most. Only as many as there are cores are started, unless those hang.

    Raises:
        ValueError: an argument is out of range.
        ImportError: the engine is ``math-verify``, which is not installed or does not run on this system.
        VerifierError: known answers come out wrong.
    """

    def __init__(
        self,
        *,
        max_digits: int = 100,
        forms: Sequence[str] = ("boxed", "hashes", "answer"),
        engine: Literal["auto", "plain", "math-verify"] = "auto",
        timeout: float = 5.0,
        cpu: float = 3.0,
        memory_mib: int = 256,
        workers: int = 64,
    ) -> None:
        if not 1 <= max_digits <= 1000:
            raise ValueError(f"Verifier: max_digits must be in 1..1000, got {max_digits}")
        if isinstance(forms, str) or not forms or set(forms) - set(FORMS):
            raise ValueError(f"Verifier: forms must be some of {', '.join(FORMS)}, got {forms!r}")
        if engine not in ("auto", "plain", "math-verify"):
            raise ValueError(f"Verifier: engine must be auto, plain or math-verify, got {engine!r}")
        for name, seconds in (("timeout", timeout), ("cpu", cpu)):
            if not (math.isfinite(seconds) and 0.01 <= seconds <= 3600):
                raise ValueError(f"Verifier: {name} must be in 0.01..3600 seconds, got {seconds}")
        if not 16 <= memory_mib <= 1 << 20:
            raise ValueError(f"Verifier: memory_mib must be in 16..{1 << 20}, got {memory_mib}")
        if not 1 <= workers <= 400:
            raise ValueError(f"Verifier: workers must be in 1..400, got {workers}")
        self.max_digits, self.forms, self.engine = max_digits, tuple(forms), engine
        self._limits: dict[str, Any] = {"timeout": timeout, "cpu": cpu, "memory": memory_mib << 20, "workers": workers}
        self._pool = None if engine == "plain" else self._find_pool()
        self._reading = _Reading(self.forms, max_digits, self._pool is not None, engine == "plain")
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0
        self._test()

    def _find_pool(self) -> Pool | None:
        """The pool, not started; None without Math-Verify, if that is allowed."""
        missing = ""
        if importlib.util.find_spec("math_verify") is None:
            missing = "math-verify is not installed: pip install 'capo[verify]'"
        elif os.name != "posix":
            missing = "math-verify needs limits on processes that this system does not have"
        if missing:
            if self.engine == "math-verify":
                raise ImportError(f"Verifier: {missing}")
            return None
        from capo.verify_pool import Limits, Pool

        pool = Pool(Limits(**self._limits, start=120.0, stall=max(60.0, 4 * self._limits["timeout"])))
        weakref.finalize(self, pool.close)  # at the latest when the interpreter ends
        return pool

    def _test(self) -> None:
        for known, response, wanted in _PLAIN_PAIRS:
            verdict = _Reading(("boxed", "hashes", "answer"), 100, compares=False, strict=True).verdict(response, known)
            if verdict != wanted:
                raise VerifierError(
                    f"the verifier's self-test failed: {response!r} against {known!r} is {verdict}, not {wanted}"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "max_digits": self.max_digits,
            "forms": self.forms,
            "engine": self.engine,
            "timeout": self._limits["timeout"],
            "cpu": self._limits["cpu"],
            "memory_mib": self._limits["memory"] >> 20,
            "workers": self._limits["workers"],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def start(self) -> None:
        """Start Math-Verify and test it now rather than with the first answer that needs it.

        Raises:
            VerifierError: it does not start, or known answers come out wrong.
        """
        if self._pool is not None:
            self._pool.start()

    def close(self) -> None:
        """End the processes; a closed verifier still reads plain answers."""
        if self._pool is not None:
            self._pool.close()

    @property
    def counts(self) -> Counter[str]:
        """Outcomes so far: ``right``, ``wrong``, ``undecided/REASON``; ``compared``: how many Math-Verify was asked
        about.

        The reasons: ``parse`` (the known answer is not understood), ``size``, ``unit``, ``engine`` (there is no
        Math-Verify), ``timeout``, ``memory``, ``crash``.
        """
        with self._lock:
            return self._counts.copy()

    @property
    def seconds(self) -> float:
        """Wall clock spent in `verify` so far, in seconds."""
        with self._lock:
            return self._seconds

    def verify(self, responses: Sequence[str], answers: Sequence[str]) -> list[Outcome]:
        """The outcome of each response against its known answer, in order.

        Args:
            responses: texts.
            answers: known answers, bare (``3/4``) or in one of the forms. One that is not understood makes the outcome
                undecided, whatever the response says.

        Raises:
            ValueError: the lengths differ.
            VerifierError: Math-Verify is needed, but does not start, or the verifier was closed.
        """
        if len(responses) != len(answers):
            raise ValueError(f"verify: {len(responses)} responses, but {len(answers)} answers")
        began = time.perf_counter()
        verdicts = [
            self._reading.verdict(response, answer) for response, answer in zip(responses, answers, strict=True)
        ]
        # The samples of a group often give the same answer: each pair is compared once.
        pairs = list(dict.fromkeys(verdict for verdict in verdicts if isinstance(verdict, tuple)))
        compared = dict(zip(pairs, self._pool.compare(pairs) if self._pool is not None else (), strict=True))
        words = [compared[verdict] if isinstance(verdict, tuple) else verdict for verdict in verdicts]
        with self._lock:
            self._seconds += time.perf_counter() - began
            self._counts.update(word if word in ("right", "wrong") else f"undecided/{word}" for word in words)
            self._counts["compared"] += sum(isinstance(verdict, tuple) for verdict in verdicts)
        outcomes = {"right": Outcome.RIGHT, "wrong": Outcome.WRONG}
        return [outcomes.get(word, Outcome.UNDECIDED) for word in words]


@dataclass(frozen=True)
class _Reading:
    """How answers are read.

    Args:
        forms, max_digits: see `Verifier`.
        compares: what is not plain is compared elsewhere.
        strict: what is not plain is no answer.
    """

    forms: tuple[str, ...]
    max_digits: int
    compares: bool
    strict: bool

    def verdict(self, response: str, answer: str) -> str | tuple[str, str]:
        """A word, or the pair of answers that is to be compared by Math-Verify."""
        try:
            known_text, known = self._known(answer)
        except AnswerTooLong:
            return "size"
        if not known_text:
            return "parse"
        given_text = extract(response, self.forms)
        if given_text is None:
            return "wrong"
        letter = choice(known_text)
        if letter is not None:
            return "right" if chosen(given_text[:MAX_CHARS]) == letter else "wrong"
        try:
            given = read(given_text, self.max_digits)
        except AnswerTooLong:
            return "size"
        if isinstance(known, Number) and isinstance(given, Number):
            return {True: "right", False: "wrong", None: "unit"}[known.equals(given)]
        if clean(known_text) == clean(given_text):
            return "right"
        if known is not None and given is not None:
            return "right" if known == given else "wrong"  # words
        if is_unreadable_number(known_text):
            return "parse"
        if is_unreadable_number(given_text):
            return "wrong"
        if self.compares:
            return known_text, given_text
        return "wrong" if self.strict and known is not None else "engine"

    def _known(self, answer: str) -> tuple[str, Number | Words | None]:
        """A known answer as text, bare or taken out of its working, and as a plain value."""
        bare = answer.strip()
        if len(bare) <= MAX_CHARS:
            value = read(bare, self.max_digits)
            if value is not None:
                return bare, value
        text = extract(answer, self.forms) or bare
        return text, read(text, self.max_digits)


def final_answer(text: str, max_digits: int = 100) -> Fraction | None:
    """The final answer of a text, found by `capo.answers.extract`, if it is a number; a percentage as its hundredth.

    Raises:
        AnswerTooLong: that answer has more than ``max_digits`` digits.
    """
    written = extract(text)
    value = read(written, max_digits) if written is not None else None
    if not isinstance(value, Number):
        return None
    return value.value / 100 if value.percent else value.value
