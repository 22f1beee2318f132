"""Judges: what reads responses and names their wrong steps. One file per engine; `scripted` needs no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from capo.critique import Critique, CritiqueError, parse


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


@dataclass(frozen=True)
class JudgeReply:
    """One answer to a request, in one of three states.

    Args:
        text: the reply as it came; None if none came.
        critique: what it says; None unless the state is valid.
        error: None if valid, the `capo.critique.Reason` if invalid, what went wrong with the call if failed.
        prompt_tokens: length of the prompt; 0 where the engine shares one prompt and another reply has it.
        completion_tokens: length of the reply.
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
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        seconds: float = 0.0,
    ) -> JudgeReply:
        """The reply with its text parsed, valid or invalid; the arguments are those of `capo.critique.parse`."""
        critique, error = None, None
        try:
            critique = parse(text, num_steps, nonce, trust=trust)
        except CritiqueError as problem:
            error = problem.reason.value
        return cls(text, critique, error, prompt_tokens, completion_tokens, seconds, nonce)


class Judge(Protocol):
    """Anything that critiques responses."""

    def critique(self, requests: list[JudgeRequest], num_votes: int) -> list[list[JudgeReply]]:
        """``num_votes`` independent replies to each request, in the order of the requests.

        A call that fails for good is a reply in state ``failed``, not an exception and not a gap in the list.
        """
        ...
