"""Token advantages for any trainer: outcomes and votes in, advantages out in the layout that the tokens came in.

Dimension key: B responses, T columns, P positions of a layout, N response tokens (positions that the mask keeps),
M steps, K critiques.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from capo.credit import Credit, CreditRule
from capo.critique import Critique, vote_table
from capo.steps import Steps, TokenBytes, segment


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

    def segment(self, token_ids: Tensor, token_bytes: TokenBytes, delimiter: Any) -> Steps:
        """The steps of the tokens that count; none reaches over a position that does not.

        Args:
            token_ids: [P], flat as ``live``.
            token_bytes, delimiter: see `capo.segment`.
        """
        positions = self.live.nonzero()[:, 0]
        begins = torch.ones_like(positions, dtype=torch.bool)
        begins[1:] = positions.diff() != 1
        inner = self.cu_seqlens[1:-1]
        begins[inner[inner < len(positions)]] = True
        runs = torch.cat([begins.nonzero()[:, 0], self.cu_seqlens[-1:]])  # unmasked stretches within a row
        steps = segment(token_ids[self.live], runs, token_bytes, delimiter)
        return Steps(steps.starts, steps.ends, steps.cu_steps[torch.searchsorted(runs, self.cu_seqlens)])

    def unpack(self, values: Tensor) -> Any:
        """Values of the tokens that count, [N], in the layout; 0 elsewhere."""
        flat = values.new_zeros(self.live.shape).masked_scatter_(self.live, values)
        if self.shape is None:
            return flat
        if isinstance(self.shape, str):
            return list(flat.split(self.bounds.diff().tolist()))
        return flat.view(self.shape)


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
