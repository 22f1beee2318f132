"""Token advantages for any trainer: outcomes and votes in, advantages out in the layout that the tokens came in.

Dimension key: B responses, T columns, P positions of a layout, N response tokens (positions that the mask keeps),
M steps, K critiques.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import importlib
import inspect
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from capo.credit import Credit, CreditRule
from capo.critique import Critique, vote_table
from capo.judges import JudgeReply, JudgeRequest
from capo.steps import Steps, TokenBytes, segment, step_texts

CREDIT_VARIABLE = "CAPO_CREDIT"
MAX_VOTES = 127  # K, what a code of `StepCredit.votes` has room for

_log = logging.getLogger(__name__)


def shape(
    outcomes: Tensor | Sequence[float | None],
    votes: Any,
    *,
    groups: int | Tensor | Sequence[Any],
    rule: str | CreditRule = "capo",
    token_ids: Tensor | Sequence[Any] | None = None,
    token_bytes: TokenBytes | None = None,
    delimiter: str | bytes = "\n\n",
    steps: Steps | Sequence[Sequence[tuple[int, int]]] | None = None,
    mask: Tensor | Sequence[Any] | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> Any:
    r"""The advantage of every token, in the layout of ``token_ids`` (of ``mask``, where there are no ids).

    Equivalent to ``capo.Credit(...).advantages()`` on the tokens that the mask keeps, put back where they came from; all
    other positions get 0. The layouts:

    * padded ``[B, T]``: a window of responses or whole sequences with their prompts, padded on either side. ``mask``
      says what the policy wrote.
    * a list of B lists or 1-D tensors of any lengths; without a mask all their tokens count.
    * packed ``[P]`` with ``cu_seqlens``; without a mask all tokens count.

    Position t of the result belongs to token t. A trainer whose losses are shifted by one takes ``result[:, 1:]`` or
    ``result.roll(-1, 1)``.

    Args:
        outcomes: [B], what the verifier says: 1 right, 0 wrong, other rewards are allowed; None and NaN are undecided.
        votes: what the judge says, one of

            * a list of B lists of `capo.critique.Critique`, None for a critique that is invalid or failed;
            * a list of B lists with an entry for each step: True or 1 flagged, False or 0 clear, -1 abstained, or a list
              of K of these; None in place of a list is no critique;
            * an integer or bool tensor, [M] or [M, K], for the steps of all responses end to end;
            * None: no critiques at all.
        groups: the number n of responses per prompt, for groups of n consecutive rows, or [B] ids of any kind.
        rule: a `capo.CreditRule` or the name of a preset.
        token_ids: integers in one of the layouts, as sampled.
        token_bytes: the bytes of every token id; steps are found in the ids, where a masked token ends a step.
        delimiter: what separates steps, see `capo.segment`.
        steps: in place of ``token_bytes``: a list of B lists of (start, end) positions in the row, or a `capo.Steps` in
            the coordinates of the kept tokens end to end.
        mask: bool or 0/1, in the layout of ``token_ids``.
        cu_seqlens: [B + 1], cumulative lengths of packed rows.

    Returns:
        float32 advantages: a tensor for a padded or packed layout, a list of 1-D tensors for a list.

    Raises:
        ValueError: arguments of the wrong kind, or that contradict each other, named.
    """
    rows = Rows.of(token_ids, mask, cu_seqlens)
    values = _outcomes(outcomes, rows)
    found = _steps(steps, token_ids, token_bytes, delimiter, rows)
    credit = Credit(
        outcomes=values,
        votes=_votes(votes, found.cu_steps.diff().tolist()).to(rows.device),
        steps=found,
        cu_seqlens=rows.cu_seqlens,
        groups=_groups(groups, rows),
        rule=CreditRule.preset(rule) if isinstance(rule, str) else rule,
    )
    return rows.unpack(credit.advantages())


class Rows:
    """B rows of a layout, and the way from its P positions to the N tokens that count, and back.

    Args:
        live: bool [P], which positions count; rows lie end to end.
        bounds: int64 [B + 1], cumulative row lengths.
        shape: (B, T) of a padded layout, None of a packed one, "list" of a list.
    """

    def __init__(self, live: Tensor, bounds: Tensor, shape: tuple[int, int] | str | None = None) -> None:
        self.live, self.bounds, self.shape = live, bounds, shape
        self.before = torch.cat([bounds.new_zeros(1), live.cumsum(0)])  # live positions before each
        self.cu_seqlens = self.before[bounds]

    @classmethod
    def of(cls, token_ids: Any, mask: Any, cu_seqlens: Any) -> Rows:
        """The rows of what `shape` was given; raises ValueError where that is no layout."""
        name, like = ("mask", mask) if token_ids is None else ("token_ids", token_ids)
        if like is None:
            raise ValueError("shape: token_ids or mask is needed, to know where the responses are")
        if isinstance(like, Tensor) and like.dim() == 2:
            if cu_seqlens is not None:
                raise ValueError(f"shape: cu_seqlens belongs to packed tokens, but {name} is padded {list(like.shape)}")
            if mask is None:
                raise ValueError(
                    f"shape: mask is needed with padded token_ids {list(like.shape)}: 1 where the policy wrote"
                )
            bounds = torch.arange(len(like) + 1, device=like.device) * like.shape[1]
            return cls(_live(mask, like), bounds, (like.shape[0], like.shape[1]))
        if isinstance(like, Tensor) and like.dim() == 1:
            if cu_seqlens is None:
                raise ValueError(f"shape: cu_seqlens is needed with packed {name} {list(like.shape)}")
            bounds = torch.as_tensor(cu_seqlens, dtype=torch.int64, device=like.device)
            falls = bounds.dim() != 1 or bounds.numel() == 0 or bool((bounds.diff() < 0).any())
            if falls or bounds[0] != 0 or bounds[-1] != len(like):
                raise ValueError(
                    f"shape: cu_seqlens must rise from 0 to {len(like)}, the length of {name}; got {bounds.tolist()!s:.80}"
                )
            return cls(_live(mask, like), bounds)
        flat, lengths = _flat(like, name)
        if mask is not None and token_ids is not None:
            if isinstance(mask, Tensor) or list(map(len, mask)) != lengths:
                raise ValueError("shape: mask must be a list of rows as long as those of token_ids")
            mask = _flat(mask, "mask")[0]
        elif mask is not None:
            mask = flat
        bounds = torch.tensor([0, *lengths], device=flat.device).cumsum(0)
        return cls(_live(mask, flat), bounds, "list")

    @property
    def device(self) -> torch.device:
        return self.live.device

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def steps(self, starts: Tensor, ends: Tensor, cu_steps: Tensor) -> Steps:
        """Steps given by positions of the layout, in the coordinates of the tokens that count."""
        return Steps(self.before[starts], self.before[ends], cu_steps)

    def segment(
        self, token_ids: Tensor, token_bytes: TokenBytes, delimiter: Any, max_steps: int | None = None
    ) -> Steps:
        """The steps of the tokens that count; none reaches over a position that does not.

        Args:
            token_ids: [P], flat as ``live``.
            token_bytes, delimiter: see `capo.segment`.
            max_steps: at most so many in each unbroken stretch of tokens that count.
        """
        positions = self.live.nonzero()[:, 0]
        begins = torch.ones_like(positions, dtype=torch.bool)
        begins[1:] = positions.diff() != 1
        inner = self.cu_seqlens[1:-1]
        begins[inner[inner < len(positions)]] = True
        runs = torch.cat([begins.nonzero()[:, 0], self.cu_seqlens[-1:]])  # unmasked stretches within a row
        steps = segment(token_ids[self.live], runs, token_bytes, delimiter, max_steps=max_steps)
        return Steps(steps.starts, steps.ends, steps.cu_steps[torch.searchsorted(runs, self.cu_seqlens)])

    def vote_codes(self, steps: Steps, votes: Tensor) -> Any:
        """What `StepCredit.votes` gives, in the layout.

        Args:
            steps: M steps, in the coordinates of the tokens that count.
            votes: int8 [M, K].
        """
        codes = torch.zeros(int(self.cu_seqlens[-1]), dtype=torch.int32, device=self.device)
        of_step = 1 + 2 * ((votes == 1).sum(1) + (MAX_VOTES + 1) * (votes >= 0).sum(1)).to(torch.int32)
        sizes = steps.ends - steps.starts
        first = steps.starts - (sizes.cumsum(0) - sizes)
        tokens = first.repeat_interleave(sizes) + torch.arange(int(sizes.sum()), device=self.device)
        codes[tokens] = of_step.repeat_interleave(sizes)
        codes[steps.starts[sizes > 0]] += 1
        return self.unpack(codes)

    def read_votes(self, codes: Tensor) -> tuple[Steps, Tensor]:
        """The steps and votes that codes stand for, int8 [M, K]; a position that does not count ends a step.

        Args:
            codes: [P], flat as ``live``, of any dtype that holds integers up to 2**15.

        Raises:
            ValueError: numbers that are no codes: rounded to a half-precision dtype, or something else altogether.
        """
        positions = self.live.nonzero()[:, 0]
        whole = codes[self.live].to(torch.int64)
        begins, flagged = (whole - 1) & 1, (whole - 1) >> 1
        valid, flagged = flagged >> 7, flagged & MAX_VOTES
        bad = (whole != codes[self.live]) | (whole < 0) | (whole > 0) & ((flagged > valid) | (valid > MAX_VOTES))
        if bad.any():
            raise ValueError(
                f"votes hold {codes[self.live][bad][0].item()!r}, which is no code of StepCredit.votes; a channel of half "
                "precision rounds them"
            )
        inside = whole > 0
        starts = inside & (begins == 1)
        starts[1:] |= inside[1:] & (~inside[:-1] | (positions.diff() != 1))
        edges = self.cu_seqlens[:-1]
        edges = edges[edges < len(whole)]
        starts[edges] |= inside[edges]
        first = starts.nonzero()[:, 0]
        sizes = torch.bincount((starts.cumsum(0) - 1)[inside], minlength=len(first))
        columns = torch.arange(int(valid.max()) if len(first) else 0, device=self.device)
        votes = (columns < flagged[first, None]).to(torch.int8)
        votes[columns >= valid[first, None]] = -1
        return Steps(first, first + sizes, torch.searchsorted(first, self.cu_seqlens)), votes

    def unpack(self, values: Tensor) -> Any:
        """Values of the tokens that count, [N], in the layout; 0 elsewhere."""
        flat = values.new_zeros(self.live.shape).masked_scatter_(self.live, values)
        if self.shape is None:
            return flat
        if isinstance(self.shape, str):
            return list(flat.split(self.bounds.diff().tolist()))
        return flat.view(self.shape)


class StepCredit:
    """What every adapter of `capo.integrations` is given: a judge, and how its votes become advantages.

    Two calls: `votes` asks the judge, wherever a trainer has the sampled ids; `shape` puts the trainer's own advantages
    right, wherever it has those. What goes from one to the other is one integer a token, which may be padded, shifted,
    sliced and sent like any other number of that token.

    Args:
        judge: critiques responses, see `capo.judges.Judge`; its ``critique`` may also be ``async def``. None goes with
            a rule of process weight 0 only.
        token_bytes: the bytes of every token id of the policy.
        rule: a `capo.CreditRule` or the name of a preset; one that uses steps, or of process weight 0 on purpose.
        base: ``rule``: the rule's advantages (the paper). ``host``: the trainer's own, plus what the critiques change
            under the rule. Either way a group without a valid critique keeps the trainer's own, bit for bit.
        num_votes: K, critiques of each response, at most 127.
        delimiter: what separates steps, see `capo.segment`.
        max_steps: at most so many steps in an unbroken stretch of tokens that the policy wrote.

    Raises:
        ValueError: settings that are out of range or do not go together; no judge.
    """

    def __init__(
        self,
        judge: Any,
        token_bytes: TokenBytes | None,
        *,
        rule: str | CreditRule = "capo",
        base: str = "rule",
        num_votes: int = 5,
        delimiter: str | bytes = "\n\n",
        max_steps: int | None = None,
    ) -> None:
        self.judge, self.token_bytes = judge, token_bytes
        self.rule = CreditRule.preset(rule) if isinstance(rule, str) else rule
        self.base, self.num_votes, self.delimiter, self.max_steps = base, num_votes, delimiter, max_steps
        if base not in ("rule", "host"):
            raise ValueError(f"StepCredit: base must be rule or host, got {base!r}")
        if not 1 <= num_votes <= MAX_VOTES:
            raise ValueError(f"StepCredit: num_votes must be in 1..{MAX_VOTES}, got {num_votes!r}")
        if isinstance(rule, str) and not self.active:
            raise ValueError(
                f"StepCredit: rule={rule!r} looks at outcomes only, so the trainer's own advantages would stay. Choose one "
                "that uses steps (capo, vppo, fapo, papo, grpo_process), or say so by a CreditRule of process_weight=0"
            )
        if self.active and not callable(getattr(judge, "critique", None)):
            raise ValueError(
                f"StepCredit: judge must have a method critique(requests, num_votes), see capo.judges.Judge, got {judge!r:.80}"
            )
        if self.active and not isinstance(token_bytes, TokenBytes):
            raise ValueError(f"StepCredit: token_bytes must be a capo.TokenBytes, got {token_bytes!r:.80}")
        self._counts: Counter[str] = Counter()

    @property
    def active(self) -> bool:
        """Whether steps have any influence; if not, the judge is not asked and nothing is changed."""
        return self.rule.process_weight > 0

    def votes(
        self,
        token_ids: Sequence[Any],
        questions: Sequence[str],
        references: Sequence[str | None] | None = None,
        masks: Sequence[Any] | None = None,
    ) -> list[Tensor]:
        """The judge's votes on every token: 0 outside all steps, else a code of its step's votes.

        Waits for the judge, which runs in a thread of its own, so that an event loop of the caller is not in its way.

        Args:
            token_ids: B lists or 1-D tensors: responses, or whole sequences with masks.
            questions: B texts, what the policy was asked.
            references: B texts, a correct solution or answer; None where there is none.
            masks: what the policy wrote, as long as ``token_ids``; None: all of it.

        Returns:
            B int32 tensors on the CPU, as long as ``token_ids``. A code is 1 + begin + 2 * (flagged + 128 * valid), of
            whether the token begins its step, and of the number of votes against that step and of all on it.

        Raises:
            ValueError: lists of different lengths, unknown ids, or a judge that gives not as many replies as asked.
            JudgeError: the judge is of no use at all.
        """
        ids = [torch.as_tensor(row, dtype=torch.int64, device="cpu") for row in token_ids]
        if not self.active:
            return [torch.zeros_like(row, dtype=torch.int32) for row in ids]
        references = [None] * len(ids) if references is None else references
        if not len(ids) == len(questions) == len(references):
            raise ValueError(
                f"StepCredit.votes: {len(ids)} responses, but {len(questions)} questions and {len(references)} references"
            )
        live = None if masks is None else [torch.as_tensor(mask, device="cpu").long() for mask in masks]
        rows = Rows.of(ids, live, None)
        flat = torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int64)
        steps = rows.segment(flat, self.token_bytes, self.delimiter, self.max_steps)  # type: ignore[arg-type]
        texts = step_texts(flat[rows.live], steps, self.token_bytes)  # type: ignore[arg-type]
        asked = [row for row, of_row in enumerate(texts) if of_row]
        replies: list[list[JudgeReply]] = [[] for _ in ids]
        for row, of_row in zip(asked, self._ask(asked, questions, references, texts), strict=True):
            replies[row] = of_row
        critiques = [[reply.critique for reply in row] for row in replies]
        table = vote_table(critiques, steps.cu_steps.diff().tolist(), self.num_votes)
        return rows.vote_codes(steps, table)

    async def votes_async(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """`votes`, while the event loop goes on."""
        return await asyncio.to_thread(self.votes, *args, **kwargs)

    def shape(self, host: Any, outcomes: Any, votes: Any, groups: Any, mask: Any = None) -> Any:
        """The trainer's advantages with step-level credit, in its layout and dtype.

        Args:
            host: the trainer's own advantages: padded [B, T], or B 1-D tensors. Not changed in place.
            outcomes, groups: see `capo.shape`. Groups must be whole.
            votes: `votes` in the same layout, 0 in padding.
            mask: what the loss counts, in the same layout; may be left out for lists whose tokens all count.

        Returns:
            A new tensor or list, 0 where the mask is 0; rows of groups without a valid critique are the trainer's own, bit
            for bit. If there is no other group, or the process weight is 0, ``host`` itself.

        Raises:
            ValueError: arguments that contradict each other, named.
        """
        if not self.active:
            return host
        padded = isinstance(host, Tensor)
        shapes = (lambda x: list(x.shape)) if padded else (lambda x: [len(row) for row in x])
        if isinstance(votes, Tensor) != padded or shapes(votes) != shapes(host):
            raise ValueError(f"StepCredit.shape: votes must be laid out as the advantages are, {shapes(host)!s:.80}")
        rows = Rows.of(votes, mask if mask is None or not padded else mask.bool(), None)
        flat = votes.reshape(-1) if padded else _flat(votes, "votes")[0]
        steps, table = rows.read_votes(flat)
        credit = Credit(_outcomes(outcomes, rows), table, steps, rows.cu_seqlens, _groups(groups, rows), self.rule)
        of_step = torch.arange(len(rows), device=rows.device).repeat_interleave(steps.cu_steps.diff())
        names, index = credit.groups.unique(return_inverse=True)
        heard = torch.zeros(len(names), dtype=torch.bool, device=rows.device)
        heard[index[of_step[(table >= 0).any(1)]]] = True
        shaped = heard[index]
        self._count(credit, shaped)
        if not shaped.any():
            return host
        own = (host.reshape(-1) if padded else torch.cat(list(host)))[rows.live]
        values = credit.advantages()
        if self.base == "host":
            silent = dataclasses.replace(credit, rule=dataclasses.replace(self.rule, process_weight=0.0))
            change = values - silent.advantages()
            values = torch.where(change == 0, own, own + change)
        result = rows.unpack(values.to(own.dtype))
        if padded:
            return torch.where(shaped[:, None], result, host)
        return [new if changed else old for new, old, changed in zip(result, host, shaped.tolist(), strict=True)]

    def text(self, token_ids: Any) -> str:
        """What token ids say, without special tokens: the question, where a trainer has no other form of it."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
        return "" if self.token_bytes is None else self.token_bytes.join(ids).decode("utf-8", "replace")

    def take_metrics(self) -> dict[str, float]:
        """What happened since the last call, for the trainer's log.

        ``capo/critiques/invalid`` and ``/failed``: critiques that could not be read, and calls without a reply; they
        abstain. ``capo/flag_rate/right`` and ``/wrong``: share of votes against steps of right and of wrong responses.
        ``capo/host_advantages``: share of responses that kept the trainer's own advantages. ``capo/undecided``: responses
        without an outcome.
        """
        counts, self._counts = self._counts, Counter()
        metrics = {
            f"capo/{name}": float(counts[name]) for name in ("critiques/invalid", "critiques/failed", "undecided")
        }
        shares = {
            "flag_rate/right": ("flags/right", "votes/right"),
            "flag_rate/wrong": ("flags/wrong", "votes/wrong"),
            "host_advantages": ("host", "responses"),
        }
        for name, (part, whole) in shares.items():
            if counts[whole]:
                metrics[f"capo/{name}"] = counts[part] / counts[whole]
        return metrics

    def _ask(
        self, asked: list[int], questions: Sequence[str], references: Sequence[str | None], texts: list[list[str]]
    ) -> list[list[JudgeReply]]:
        requests = [
            JudgeRequest(
                str(questions[row]), None if references[row] is None else str(references[row]), tuple(texts[row])
            )
            for row in asked
        ]
        if not requests:
            return []

        def ask() -> list[list[JudgeReply]]:
            result = self.judge.critique(requests, self.num_votes)
            return asyncio.run(result) if inspect.isawaitable(result) else result  # type: ignore[arg-type]

        with ThreadPoolExecutor(1, "capo judge") as thread:
            replies = thread.submit(ask).result()
        check_replies(replies, len(requests), self.num_votes)
        states = Counter(reply.state for row in replies for reply in row)
        for state in ("invalid", "failed"):
            self._counts[f"critiques/{state}"] += states[state]
        if states["invalid"] or states["failed"]:
            _log.warning(
                "of %d critiques %d could not be read and %d calls failed; they abstain",
                states.total(),
                states["invalid"],
                states["failed"],
            )
        return replies

    def _count(self, credit: Credit, shaped: Tensor) -> None:
        of_step = credit.outcomes.repeat_interleave(credit.steps.cu_steps.diff())
        for name, part in (("right", credit.votes[of_step > 0]), ("wrong", credit.votes[of_step <= 0])):
            self._counts[f"flags/{name}"] += int((part == 1).sum())
            self._counts[f"votes/{name}"] += int((part >= 0).sum())
        self._counts["undecided"] += int(credit.outcomes.isnan().sum())
        self._counts["host"] += int((~shaped).sum())
        self._counts["responses"] += len(shaped)


@functools.cache
def configured_credit() -> StepCredit:
    """The `StepCredit` that the environment variable CAPO_CREDIT names, made once in each process.

    For trainers whose hooks run in processes of their own, where nothing but a path can be handed over. The path is that
    of a `StepCredit` or of a function without arguments that makes one: ``my_lib.credit``.

    Raises:
        ValueError: the variable is not set, or cannot be imported.
        TypeError: it names something else.
    """
    path = os.environ.get(CREDIT_VARIABLE, "")
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(
            f"{CREDIT_VARIABLE} must be the import path of a capo.StepCredit, or of a function that makes one, in the "
            f"environment of every process of the trainer; got {path!r}"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (AttributeError, ModuleNotFoundError) as error:
        raise ValueError(f"{CREDIT_VARIABLE}={path!r} cannot be imported: {error}") from error
    credit = found() if callable(found) else found
    if not isinstance(credit, StepCredit):
        raise TypeError(
            f"{CREDIT_VARIABLE}={path!r} is {credit!r:.80}, not a capo.StepCredit or a function that makes one"
        )
    return credit


SEQUENCE_RATIO = (
    "one ratio a response gives all of its tokens the same gradient, in which the advantages of steps are averaged away"
)
CRITIC = "a critic's advantages differ from token to token already, and would be replaced"
KL_IN_REWARD = (
    "the KL penalty is part of the trainer's advantages, and base='rule' would replace it with them; use base='host', or a "
    "KL term in the loss"
)


def refuse(credit: StepCredit, **settings: tuple[Any, str | None]) -> None:
    """Raise ValueError for the first setting of a trainer that has a reason not to go with step-level credit.

    Args:
        credit: settings do not matter if it is not active.
        settings: by name (a double underscore stands for a dot): the value, and the reason or None.
    """
    for name, (value, reason) in settings.items():
        if credit.active and reason is not None:
            raise ValueError(f"{name.replace('__', '.')}={value!r} does not go with step-level credit: {reason}")


def setting(config: Any, path: str, default: Any = None) -> Any:
    """What a nested configuration of mappings or objects has under a dotted path, or the default."""
    for name in path.split("."):
        if config is None:
            return default
        found = config.get(name, default) if hasattr(config, "get") else getattr(config, name, default)
        config = found
    return default if config is None else config


def check_replies(replies: Sequence[Sequence[JudgeReply]], num_requests: int, num_votes: int) -> None:
    """Raise ValueError if a judge gave not as many replies as it was asked for."""
    counts = [len(row) for row in replies]
    if counts != [num_votes] * num_requests:
        raise ValueError(
            f"the judge was asked for {num_votes} critiques of each of {num_requests} responses, and gave lists of "
            f"{counts!s:.80}; calls that fail must be replies of state failed"
        )


def question_text(prompt: Any) -> str:
    """What a prompt says: a string, or messages, whose roles are told if there are several."""
    if isinstance(prompt, str):
        return prompt
    said = []
    for message in prompt:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = "".join(part.get("text", "") for part in content)
        said.append((message.get("role", ""), content))
    return said[0][1] if len(said) == 1 else "\n\n".join(f"{role}: {content}" for role, content in said)


def _live(mask: Tensor | None, like: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(like.numel(), dtype=torch.bool, device=like.device)
    if not isinstance(mask, Tensor) or mask.shape != like.shape:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"shape: mask must be a tensor {list(like.shape)} like token_ids, got {got}")
    flat = mask.reshape(-1).to(like.device)
    if flat.dtype != torch.bool:
        strange = (flat != 0) & (flat != 1)
        if strange.any():
            raise ValueError(f"shape: mask must hold 0 and 1 only, got {flat[strange][0].item()}")
    return flat.bool()


def _flat(rows: Any, name: str) -> tuple[Tensor, list[int]]:
    """Lists or 1-D tensors end to end, and their lengths."""
    got = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
    if got not in ("list", "tuple"):
        raise ValueError(f"shape: {name} must be padded [B, T], packed [P] with cu_seqlens, or a list, got {got}")
    tensors = [row if isinstance(row, Tensor) else torch.tensor(row, dtype=torch.int64) for row in rows]
    bad = next((i for i, row in enumerate(tensors) if row.dim() != 1), None)
    if bad is not None:
        raise ValueError(f"shape: row {bad} of {name} must have one dimension, got {list(tensors[bad].shape)}")
    flat = torch.cat(tensors) if tensors else torch.zeros(0, dtype=torch.int64)
    return flat, [len(row) for row in tensors]


def _outcomes(outcomes: Any, rows: Rows) -> Tensor:
    if not isinstance(outcomes, Tensor):
        outcomes = torch.tensor([math.nan if value is None else float(value) for value in outcomes])
    if outcomes.shape != (len(rows),):
        raise ValueError(
            f"shape: outcomes must have one entry for each of {len(rows)} rows, got {list(outcomes.shape)}"
        )
    return outcomes.to(rows.device, torch.float32)


def _groups(groups: Any, rows: Rows) -> Tensor:
    if isinstance(groups, int) and not isinstance(groups, bool):
        if groups < 1 or len(rows) % groups:
            raise ValueError(f"shape: groups={groups} responses per prompt do not divide {len(rows)} rows")
        return torch.arange(len(rows), device=rows.device) // groups
    if not isinstance(groups, Tensor):
        if isinstance(groups, bool) or not hasattr(groups, "__iter__"):
            raise ValueError(f"shape: groups must be a number of responses or one id for each row, got {groups!r:.80}")
        ids = groups.tolist() if hasattr(groups, "tolist") else list(groups)
        numbers = {id_: number for number, id_ in enumerate(dict.fromkeys(ids))}
        groups = torch.tensor([numbers[id_] for id_ in ids], dtype=torch.int64)
    if groups.shape != (len(rows),):
        raise ValueError(f"shape: groups must have one id for each of {len(rows)} rows, got {list(groups.shape)}")
    return groups.to(rows.device)


def _steps(steps: Any, token_ids: Any, token_bytes: TokenBytes | None, delimiter: Any, rows: Rows) -> Steps:
    if (steps is None) == (token_bytes is None):
        raise ValueError("shape: give either steps or token_bytes, by which steps are found in token_ids")
    if isinstance(steps, Steps):
        if len(steps.cu_steps) != len(rows) + 1:
            raise ValueError(f"shape: steps are of {len(steps.cu_steps) - 1} responses, but there are {len(rows)} rows")
        return steps.to(rows.device)
    if token_bytes is not None:
        if token_ids is None:
            raise ValueError("shape: token_bytes needs token_ids to find steps in")
        flat = token_ids.reshape(-1) if isinstance(token_ids, Tensor) else _flat(token_ids, "token_ids")[0]
        return rows.segment(flat, token_bytes, delimiter)
    if len(steps) != len(rows):
        raise ValueError(f"shape: steps has {len(steps)} entries, but there are {len(rows)} rows")
    counts = list(map(len, steps))
    try:
        pairs = torch.tensor(list(chain.from_iterable(steps)), dtype=torch.int64).reshape(-1, 2)
        fits = len(pairs) == sum(counts)
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise ValueError("shape: steps must be lists of (start, end) positions, one list for each row")
    row = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    bounds = rows.bounds.cpu()
    room = bounds.diff()[row]
    bad = (pairs[:, 0] < 0) | (pairs[:, 1] < pairs[:, 0]) | (pairs[:, 1] > room)
    if bad.any():
        first = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"shape: a step of row {int(row[first])} is {tuple(pairs[first].tolist())}, but the row has positions 0 to "
            f"{int(room[first])}"
        )
    starts, ends = ((pairs[:, side] + bounds[row]).to(rows.device) for side in (0, 1))
    return rows.steps(starts, ends, torch.tensor([0, *counts], device=rows.device).cumsum(0))


def _votes(votes: Any, counts: list[int]) -> Tensor:
    """The vote table of what `shape` was given. int8 [M, K]"""
    total = sum(counts)
    if votes is None:
        return torch.zeros(total, 0, dtype=torch.int8)
    if isinstance(votes, Tensor):
        if votes.dim() not in (1, 2) or len(votes) != total or votes.is_floating_point():
            raise ValueError(
                f"shape: votes must be integer [{total}] or [{total}, K] for {total} steps, got {votes.dtype} "
                f"{list(votes.shape)}"
            )
        strange = (votes < -1) | (votes > 1) if votes.dtype != torch.bool else votes[:0]
        if strange.any():
            raise ValueError(f"shape: votes must be -1, 0 or 1, got {int(votes[strange][0])}")
        return votes.reshape(total, -1 if total else 1).to(torch.int8)
    if len(votes) != len(counts):
        raise ValueError(f"shape: votes has {len(votes)} entries, but there are {len(counts)} responses")
    if any(vote is None or isinstance(vote, Critique) for row in votes for vote in _each(row)):
        return vote_table([list(_each(row)) for row in votes], counts)
    table: list[list[int]] = []
    for response, (row, count) in enumerate(zip(votes, counts, strict=True)):
        ballots = _ballots(_each(row), response)
        if len(ballots) not in (0, count):
            raise ValueError(f"shape: votes of response {response} are for {len(ballots)} steps, but it has {count}")
        table.extend(ballots or [[]] * count)
    width = max(map(len, table), default=0)
    padded = [ballots + [-1] * (width - len(ballots)) for ballots in table]
    return torch.tensor(padded, dtype=torch.int8).reshape(total, width)


def _each(row: Iterable[Any] | None) -> Iterable[Any]:
    return () if row is None else row


def _ballots(row: Iterable[Any], response: int) -> list[list[int]]:
    """The votes on each step of a response."""
    ballots = [list(vote) if isinstance(vote, Iterable) else [vote] for vote in row]
    for vote in chain.from_iterable(ballots):
        if vote not in (-1, 0, 1):
            raise ValueError(f"shape: votes of response {response} must be -1, 0 or 1, got {vote!r}")
    return [list(map(int, votes)) for votes in ballots]
