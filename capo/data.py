"""The built-in task: chains of single-digit operations modulo 10, endless, exactly checkable, learnt in seconds on a CPU.

A problem ``7+5*3=`` is worked from left to right, one step a line pair, and ends with the answer::

    7+5=2\\n\\n2*3=6\\n\\n#6<eos>

Every character is a token, ``\\n\\n`` is one token. The demos a model is warm-started on hold misconceptions: some facts
(``7+5``) have a fixed wrong result, used most of the time and carried on from. So the warm-started model makes few, but
systematic mistakes, and most responses are wrong because of one or two steps: what step-level credit is for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from capo.config import TaskConfig
from capo.judges import JudgeRequest
from capo.steps import TokenBytes

DELIMITER = "\n\n"
OPERATORS = "+-*"
_TOKENS = [*"0123456789", *OPERATORS, "=", "#", DELIMITER]
_HELD_OUT_SHARE = 16  # one problem in so many


@dataclass(frozen=True)
class Problem:
    """A prompt with what is known about it.

    Args:
        question: the prompt's text.
        solution: the reference solution, as a faultless response would put it.
        answer: the final answer.
    """

    question: str
    solution: str
    answer: str


class ArithmeticTask:
    """Problems, demos, tokens and the exact checker of the built-in task.

    Whether a problem is held out depends on nothing but the problem, so that no seed mixes the two sets.

    Args:
        config: length of the chains, operators, misconceptions.
        seed: which facts the demos get wrong, and how.
    """

    def __init__(self, config: TaskConfig, seed: int) -> None:
        self.config = config
        self.token_bytes = TokenBytes([*(token.encode() for token in _TOKENS), b""], eos_ids=[len(_TOKENS)])
        self.eos_id = len(_TOKENS)
        self.vocab_size = len(_TOKENS) + 1
        self.prompt_length = 2 * config.steps + 2
        self.response_length = 6 * config.steps + 3
        self._ids = {token: id_ for id_, token in enumerate(_TOKENS)}
        self._operators = torch.tensor([OPERATORS.index(operator) for operator in dict.fromkeys(config.operators)])
        a, b = torch.arange(10)[:, None], torch.arange(10)[None]
        self._true = torch.stack([a + b, a - b, a * b]) % 10  # [operator, a, b]
        self._table: list[list[list[int]]] = self._true.tolist()
        generator = torch.Generator().manual_seed(seed)
        misconceived = torch.rand(self._true.shape, generator=generator) < config.misconceptions
        shift = torch.randint(1, 10, self._true.shape, generator=generator)
        self._believed = torch.where(misconceived, (self._true + shift) % 10, self._true)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; raises ValueError at a character that is no token."""
        ids = []
        for piece in re.findall(f"{DELIMITER}|.", text, re.DOTALL):
            if piece not in self._ids:
                raise ValueError(f"{piece!r} in {text!r:.80} is no token of this task")
            ids.append(self._ids[piece])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; EOS has none."""
        return self.token_bytes.join(ids).decode()

    def problems(self, count: int, generator: torch.Generator, held_out: bool = False) -> list[Problem]:
        """Random problems, from the held-out set or from the rest; held-out ones may repeat in tiny tasks."""
        start, operators, operands = self._draw(count, generator, held_out)
        solutions, results = self._work_out(start, operators, operands, self._true.expand(count, -1, -1, -1))
        return [
            Problem(self.decode(prompt), self.decode(solution), str(answer))
            for prompt, solution, answer in zip(
                self._prompts(start, operators, operands).tolist(), solutions.tolist(), results.tolist(), strict=True
            )
        ]

    def demos(self, count: int, generator: torch.Generator) -> Tensor:
        """Prompts with worked solutions, misconceptions included. int64 [count, prompt_length + response_length]"""
        start, operators, operands = self._draw(count, generator, held_out=False)
        # Each demo has its own moods: whether it falls for a misconception is drawn per fact.
        falls_for_it = torch.rand(count, *self._true.shape, generator=generator) < self.config.misconception_rate
        facts = torch.where(falls_for_it, self._believed, self._true)
        solutions, _ = self._work_out(start, operators, operands, facts)
        return torch.cat([self._prompts(start, operators, operands), solutions], 1)

    def check(self, request: JudgeRequest) -> list[bool]:
        """Which steps are wrong, exactly: True per wrong step.

        Step i must apply the question's i-th operation to the result that the step before has written, whatever that is,
        and get it right; the last step must repeat that result. So a step is not wrong for building on an earlier error.
        Where the step before has no readable result, the operand it hands on is not checked.
        """
        start, *rest = list(request.question.removesuffix("="))
        tasks = list(zip(rest[::2], rest[1::2], strict=True))
        wrong = []
        before: str | None = start
        for index, text in enumerate(request.steps):
            step = text.strip()
            if index < len(tasks):
                match = re.fullmatch(r"([0-9])([+*-])([0-9])=([0-9])", step)
                wrong.append(
                    match is None
                    or (match[2], match[3]) != tasks[index]
                    or before not in (None, match[1])
                    or self._table[OPERATORS.index(match[2])][int(match[1])][int(match[3])] != int(match[4])
                )
                before = match[4] if match else None
            else:
                match = re.fullmatch(r"#([0-9])", step)
                wrong.append(index > len(tasks) or match is None or before not in (None, match[1]))
        return wrong

    def _draw(self, count: int, generator: torch.Generator, held_out: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Problems of one set as start [count], operators [count, K], operands [count, K]."""
        found: list[Tensor] = []
        missing = count
        for _ in range(1000):
            if missing <= 0:
                break
            size = 2 * missing * (_HELD_OUT_SHARE if held_out else 1) + 16
            start = torch.randint(0, 10, (size, 1), generator=generator)
            chosen = torch.randint(0, len(self._operators), (size, self.config.steps), generator=generator)
            operands = torch.randint(1, 10, (size, self.config.steps), generator=generator)
            drawn = torch.cat([start, self._operators[chosen], operands], 1)
            drawn = drawn[(_hash(drawn) % _HELD_OUT_SHARE == 0) == held_out][:missing]
            found.append(drawn)
            missing -= len(drawn)
        if missing > 0:
            raise ValueError(f"the task is too small: no {'held-out' if held_out else 'training'} problems to be found")
        start, operators, operands = torch.cat(found).split([1, self.config.steps, self.config.steps], 1)
        return start[:, 0], operators, operands

    def _prompts(self, start: Tensor, operators: Tensor, operands: Tensor) -> Tensor:
        pairs = torch.stack([operators + 10, operands], 2).flatten(1)
        return torch.cat([start[:, None], pairs, torch.full_like(start[:, None], self._ids["="])], 1)

    def _work_out(self, start: Tensor, operators: Tensor, operands: Tensor, facts: Tensor) -> tuple[Tensor, Tensor]:
        """Solutions by each row's own table of facts [count, operator, a, b], and their answers."""
        rows = torch.arange(len(start))
        equals, mark, end, eos = (
            torch.full_like(start, id_) for id_ in (self._ids["="], self._ids["#"], self._ids[DELIMITER], self.eos_id)
        )
        columns, value = [], start
        for operator, operand in zip(operators.t(), operands.t(), strict=True):
            result = facts[rows, operator, value, operand]
            columns += [value, operator + 10, operand, equals, result, end]
            value = result
        return torch.stack([*columns, mark, value, eos], 1), value


def _hash(rows: Tensor) -> Tensor:
    """A non-negative hash of each row of small integers; multiplication wraps around."""
    mixed = torch.full((len(rows),), 0x2545F491, dtype=torch.int64)
    for column in rows.t():
        mixed = (mixed ^ column) * 0x5851F42D4C957F2D
        mixed = mixed ^ ((mixed >> 29) & 0x7FFFFFFFF)
    return (mixed >> 16) & 0x7FFFFFFF
