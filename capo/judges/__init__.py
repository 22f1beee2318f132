"""Judges: what reads responses and names their wrong steps. One file per engine; `scripted` needs no model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple, Protocol

from capo.critique import Critique, CritiqueError, parse, parse_json


class JudgeError(Exception):
    """The judge cannot be used, or fails too often: the run has to stop. Not for one reply that fails."""


class Fault(str, Enum):
    """Why a reply does not count, beside the `capo.critique.Reason` of its text and ``http_`` with a status."""

    # invalid: there is a reply, but it is not to be read
    TRUNCATED = "truncated"  # ended by the token limit
    FILTERED = "filtered"  # ended by the server's content filter
    NO_CONTENT = "no_content"  # no text: a refusal or a tool call
    # failed: there is no reply
    CONNECTION = "connection"  # refused, reset, TLS, DNS, protocol
    DEADLINE = "deadline"  # time ran out
    BAD_BODY = "bad_body"  # status 200, but no JSON of a chat completion
    BAD_CHOICES = "bad_choices"  # more choices than asked for, none, or wrong numbers
    WRONG_ID = "wrong_id"  # the answer to another request
    TOO_LARGE = "too_large"  # a body over the limit
    TOO_LONG = "prompt_too_long"  # the prompt does not fit the model


class Marks(NamedTuple):
    """What the content of a request and a seed decide.

    Args:
        nonce: of its prompt.
        seed: of sampling its first vote; the votes after it have the numbers after it, as engines have it that number the
            replies of one call on (vLLM).
    """

    nonce: str
    seed: int


@dataclass(frozen=True)
class JudgeRequest:
    """One response to judge.

    Args:
        question: the task given to the policy.
        reference: a correct solution or the bare answer; None if there is none.
        steps: the texts of the response's steps, in order.
    """

    question: str
    reference: str | None
    steps: tuple[str, ...]

    def fingerprint(self, seed: int) -> str:
        """64 hex digits made of the content and a seed: where a request's nonce and random numbers come from.

        A request of the same content has the same prompt and the same votes. A response cannot hold its own nonce: it
        would have to hold its own hash.
        """
        content = [seed, self.question, self.reference, *self.steps]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def marks(self, seed: int) -> Marks:
        """Nonce and sampling seed, by `fingerprint`."""
        digest = self.fingerprint(seed)
        return Marks(digest[:12], int(digest[12:19], 16))


@dataclass(frozen=True)
class JudgeReply:
    """One answer to a request, in one of three states.

    Args:
        text: the reply as it came; None if none came.
        critique: what it says; None unless the state is valid.
        error: None if valid; a `capo.critique.Reason` or `Fault` if invalid; a `Fault` or ``http_STATUS`` if failed.
        prompt_tokens: length of the prompt; 0 where the engine shares one prompt and another reply has it.
        completion_tokens: length of the reply; where the server tells only the sum of several, a share by characters.
        seconds: from call to reply.
        nonce: what the prompt's tags carried; without it the text cannot be read again.
    """

    text: str | None
    critique: Critique | None
    error: str | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    nonce: str | None = None

    @property
    def state(self) -> Literal["valid", "invalid", "failed"]:
        """``valid``: a critique; ``invalid``: text that is none; ``failed``: no text. Only valid replies vote."""
        if self.text is None:
            return "failed"
        return "invalid" if self.critique is None else "valid"

    @classmethod
    def read(
        cls,
        text: str,
        num_steps: int,
        nonce: str | None,
        *,
        trust: Literal["list", "verdict"] = "list",
        fault: Fault | None = None,
        structured: bool = False,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        seconds: float = 0.0,
    ) -> JudgeReply:
        """The reply with its text parsed, valid or invalid.

        Args:
            text, num_steps, nonce, trust: as in `capo.critique.parse`.
            fault: why the text is not to be read at all; makes the reply invalid.
            structured: the text is to be read by `capo.critique.parse_json`.
            prompt_tokens, completion_tokens, seconds: see `JudgeReply`.
        """
        critique, error = None, None if fault is None else fault.value
        if fault is None:
            try:
                critique = (parse_json if structured else parse)(text, num_steps, nonce, trust=trust)
            except CritiqueError as problem:
                error = problem.reason.value
        return cls(text, critique, error, prompt_tokens, completion_tokens, seconds, nonce)

    @classmethod
    def failure(cls, reason: str, *, seconds: float = 0.0, nonce: str | None = None) -> JudgeReply:
        """A call that gave no reply, and why."""
        return cls(None, None, reason, seconds=seconds, nonce=nonce)


class Judge(Protocol):
    """Anything that critiques responses."""

    def critique(self, requests: list[JudgeRequest], num_votes: int, first: int = 0) -> list[list[JudgeReply]]:
        """``num_votes`` independent replies to each request, in the order of the requests.

        A call that fails for good is a reply in state ``failed``, not an exception and not a gap in the list.

        Args:
            requests: what to judge.
            num_votes: how many replies to each.
            first: the number of the first vote, where earlier calls asked for the votes before it: the votes of two
                calls must be independent.

        Raises:
            JudgeError: no reply can be expected at all, or too few come.
        """
        ...


def check_sampling(judge: str, temperature: float, top_p: float, **counts: int) -> None:
    """Raise ValueError unless the numbers can be sampled with; ``counts`` must be at least 1."""
    if not 0 <= temperature <= 100 or not 0 < top_p <= 1:
        raise ValueError(f"{judge}: temperature must be in [0, 100], top_p in (0, 1], got {temperature!r}, {top_p!r}")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{judge}: {name} must be at least 1, got {count!r}")


def check_votes(num_votes: int, first: int) -> None:
    """Raise ValueError unless both are at least 0."""
    if num_votes < 0 or first < 0:
        raise ValueError(f"critique: num_votes and first must be at least 0, got {num_votes} and {first}")
