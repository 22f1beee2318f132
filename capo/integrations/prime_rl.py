"""Step-level credit in prime-rl's GRPO.

    CAPO_CREDIT=my_lib.credit python -m capo.integrations.prime_rl @ orchestrator.toml

is ``orchestrator @ orchestrator.toml`` with `capo_algorithm` before the algorithm that ``grpo`` names. prime-rl takes no
algorithms by path; the orchestrator is the one process that has them.

Layout C: each node of a trace has one advantage for each of its sampled tokens, and no others.

Read: PrimeIntellect-ai/prime-rl main of August 2026, 0.8 (src/prime_rl/orchestrator/algo: base.py, grpo.py, routing.py, in
the form in which ``score_group`` is given episodes), and docs/algorithms.md of that time.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from capo.shaping import StepCredit, configured_credit, question_text, setting

_PLACES = ("prime_rl.orchestrator.algo", "prime_rl.orchestrator.train.algo")

Texts = Callable[[Any], tuple[str, "str | None"]]


def capo_algorithm(base: type, credit: StepCredit | None = None, texts: Texts | None = None) -> type:
    """A class with step-level credit before ``GRPOAlgorithm``, or another that gives a trace one advantage.

    Args:
        base: the algorithm.
        credit: the judge, and how its votes count; None takes that of CAPO_CREDIT, when an algorithm is made.
        texts: of a trace, the question and a correct solution or answer (or None); by default the ``prompt`` or
            ``question`` of its task's data, or else what precedes the first sampled token, and the ``answer``.
    """
    return type(
        f"Capo{base.__name__}",
        (_CapoMixin, base),
        {"_capo_credit": credit, "_capo_texts": staticmethod(texts) if texts else None, "__module__": __name__},
    )


def install(credit: StepCredit | None = None, texts: Texts | None = None) -> None:
    """Let prime-rl's ``grpo`` be `capo_algorithm` of what it is, in this process."""
    for place in _PLACES:
        try:
            classes = importlib.import_module(place).ALGORITHM_CLASSES
        except (ModuleNotFoundError, AttributeError):
            continue
        if not issubclass(classes["grpo"], _CapoMixin):
            classes["grpo"] = capo_algorithm(classes["grpo"], credit, texts)
        return
    raise ImportError(f"capo.integrations.prime_rl finds no ALGORITHM_CLASSES in {' or '.join(_PLACES)}")


class _CapoMixin:
    _capo_credit: StepCredit | None = None
    _capo_texts: Texts | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.capo_credit = self._capo_credit or configured_credit()
        kind = getattr(self, "action_loss_type", "rl")
        if self.capo_credit.active and kind != "rl":
            raise ValueError(
                f"action_loss_type={kind!r} does not go with step-level credit: its loss has no advantages"
            )

    async def score_group(self, episodes: list[Any]) -> None:
        await super().score_group(episodes)  # type: ignore[misc]
        credit = self.capo_credit
        traces = [trace for episode in episodes for trace in episode.traces if any(map(_credited, trace.nodes))]
        if not credit.active or not traces:
            return
        ids, masks = zip(*map(_positions, traces), strict=True)
        texts = self._capo_texts or functools.partial(task_texts, credit)
        questions, references = zip(*map(texts, traces), strict=True)
        votes = await credit.votes_async(ids, questions, references, masks)
        host = [_host(trace, mask) for trace, mask in zip(traces, masks, strict=True)]
        rewards = [trace.reward for trace in traces]
        shaped = credit.shape(host, rewards, votes, [0] * len(traces), list(masks))
        for trace, before, after, mask in zip(traces, host, shaped, masks, strict=True):
            if after is not before:
                _assign(trace, after, mask)


def task_texts(credit: StepCredit, trace: Any) -> tuple[str, str | None]:
    """The question and the answer that a trace's task has."""
    data = setting(trace, "task.data")
    answer = setting(data, "answer")
    for name in ("prompt", "question"):
        if (found := setting(data, name)) is not None:
            return question_text(found), None if answer is None else str(answer)
    before: list[int] = []
    for node in trace.nodes:
        if any(node.mask):
            break
        before += node.token_ids
    return credit.text(before), None if answer is None else str(answer)


def _credited(node: Any) -> bool:
    return node.advantages is not None and any(node.mask)


def _positions(trace: Any) -> tuple[list[int], Tensor]:
    """All tokens of a trace, node by node, and which of them have an advantage; what lies between nodes ends a step."""
    ids: list[int] = []
    mask: list[bool] = []
    for node in trace.nodes:
        ids += [*node.token_ids, 0]
        mask += [*(map(bool, node.mask) if _credited(node) else [False] * len(node.token_ids)), False]
    return ids, torch.tensor(mask, dtype=torch.bool)


def _host(trace: Any, mask: Tensor) -> Tensor:
    values = [value for node in trace.nodes if _credited(node) for value in node.advantages]
    return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter_(mask, torch.tensor(values, dtype=torch.float64))


def _assign(trace: Any, advantages: Tensor, mask: Tensor) -> None:
    values = advantages[mask].tolist()
    for node in trace.nodes:
        if _credited(node):
            count = sum(map(bool, node.mask))
            node.advantages, values = values[:count], values[count:]


def main() -> None:
    """prime-rl's orchestrator with `install`; the arguments are the same."""
    install()
    importlib.import_module("prime_rl.orchestrator.orchestrator").main()


if __name__ == "__main__":
    main()
