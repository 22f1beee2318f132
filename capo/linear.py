"""Policy loss and log-probabilities from hidden states: the logits are made and used up in chunks of rows.

For each chunk one matrix product gives the logits, the backend (``row_stats``, ``loss_terms``, ``row_grads``) turns them
into their gradient in place, two more products take that to the hidden states and the weight. Dead rows are left out of
all three, rows whose gradient turns out to be 0 of the last two. Weights of tokens and sums over them are made once for
all chunks: nothing depends on how the rows are cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from capo import reference
from capo.backends import kernel
from capo.losses import LossRule

# A chunk has at least so many rows: with fewer, reading and writing the gradient of the weight takes longer than making it.
MIN_CHUNK_ROWS = 256
# Matrix products take a multiple of so many rows. With fewer, libraries change over to kernels that sum in another order,
# and the result of a row would depend on how many there are.
ROW_MULTIPLE = 32
# What is made of the gradient of the weight at a time, so that it is added up while it is in the cache.
WEIGHT_BYTES = 8 << 20
# Columns of the logits that are summed for the bias at a time: PyTorch makes a float32 copy of them.
COLUMNS = 4096


def policy_loss(
    hidden, weight, bias, labels, advantages, old_logprobs, cu_seqlens, ref_logprobs, mask, rollout_logprobs,
    row_temperature, need_grad, softcap, vocab_size, chunk_bytes, group, *rule_fields,
):  # fmt: skip
    """Loss, metrics and gradients of hidden, weight and bias, None if not needed; see ``capo.linear_policy_loss``."""
    rule = LossRule(*rule_fields)
    head = _Head("linear_policy_loss", hidden, weight, bias, softcap, vocab_size, chunk_bytes, group)
    reference.check_labels(head.op, labels, head.vocab, mask)
    reference.check_cumulative(head.op, "cu_seqlens", cu_seqlens, len(labels))
    live, response, weights, counts = reference.row_weights(advantages, cu_seqlens, mask, rule, torch.float64)
    # On a GPU this waits for the number of live rows; a form without would keep that number, and the loop, on the device.
    index = live.nonzero()[:, 0]
    response, weights = response[index], weights[index]
    values = [None if x is None else x[index] for x in (advantages, old_logprobs, ref_logprobs, rollout_logprobs)]
    rows = _Rows(head, index, labels, rule.temperature if row_temperature is None else row_temperature)
    entropy_slopes = weights * -torch.tensor(rule.entropy_coef).item()

    groups = list(_groups(response, head.chunk_rows, by_response=rule.ratio != "token"))
    sizes = [last - first for first, last in groups for first, last in _pieces(first, last, head.chunk_rows)]
    gradients = _Gradients(head, need_grad, several=len(sizes) > 1)
    loss_terms, parts = kernel("loss_terms", hidden.device), []
    with head.memory(max(sizes, default=0)):
        for first, last in groups:
            these = slice(first, last)
            pieces = [torch.arange(*piece, device=index.device) for piece in _pieces(first, last, head.chunk_rows)]
            for piece in pieces:
                inputs, logits = rows.logits(piece)
                rows.read(piece, logits)
            logprobs, entropy = rows.logprobs(these)
            cu = _boundaries(response[these]) if rule.ratio != "token" else torch.tensor([0, last - first])
            of_these = [None if x is None else x[these] for x in values]
            *terms, slopes = loss_terms(logprobs, entropy, *of_these, weights[these], cu.to(index.device), *rule_fields)
            parts.append((logprobs, entropy, *terms))
            if not any(need_grad):
                continue
            rows.slopes[these], rows.entropy_slopes[these] = slopes, entropy_slopes[these]
            kept = (slopes != 0) | (entropy_slopes[these] != 0)
            if len(pieces) == 1:
                gradients.add(rows, pieces[0], _moves(kept), inputs, logits)
            else:  # a response longer than a chunk: its logits are gone
                for piece in (first + kept.nonzero()[:, 0]).split(len(pieces[0])):
                    gradients.add(rows, piece, torch.arange(len(piece), device=index.device), *rows.logits(piece))

    empty = [hidden.new_zeros(0, dtype=torch.float32)] * 4 + [live[:0]]
    logprobs, entropy, loss, kl, clipped = (torch.cat(part) for part in zip(*(parts or [empty]), strict=True))
    num_active = counts.sum().clamp(min=1)
    by_response = torch.zeros(len(counts), dtype=torch.float64, device=index.device)
    metrics = (
        by_response.index_add(0, response, loss.double() * weights).sum().float(),
        torch.zeros(len(live), device=index.device).index_copy(0, index, logprobs),
        torch.zeros(len(live), device=index.device).index_copy(0, index, entropy),
        (clipped.sum().double() / num_active).float(),
        (by_response.index_add(0, response, kl.double()).sum() / num_active).float(),
    )
    return *metrics, *gradients.results()


def logprobs(hidden, weight, bias, labels, mask, row_temperature, temperature, softcap, vocab_size, chunk_bytes, group):
    """Log-probabilities and entropies; see ``capo.linear_logprobs``."""
    head = _Head("linear_logprobs", hidden, weight, bias, softcap, vocab_size, chunk_bytes, group)
    reference.check_labels(head.op, labels, head.vocab, mask)
    index = torch.arange(len(labels), device=labels.device) if mask is None else mask.nonzero()[:, 0]
    rows = _Rows(head, index, labels, temperature if row_temperature is None else row_temperature)
    pieces = list(_pieces(0, len(index), head.chunk_rows))
    with head.memory(max((last - first for first, last in pieces), default=0)):
        for piece in pieces:
            piece = torch.arange(*piece, device=index.device)
            rows.read(piece, rows.logits(piece)[1])
    values = rows.logprobs(slice(None))
    return tuple(torch.zeros(len(labels), device=index.device).index_copy(0, index, x) for x in values)


class _Head:
    """Weight and bias of the logits that are made here, and memory for a chunk of them."""

    def __init__(self, op, hidden, weight, bias, softcap, vocab_size, chunk_bytes, group):
        self.op, self.hidden, self.whole_weight, self.whole_bias, self.softcap = op, hidden, weight, bias, softcap
        self.shards = None if group is None else _Shards(group, weight)
        first, self.vocab = (0, len(weight)) if self.shards is None else (self.shards.first, self.shards.vocab)
        if vocab_size is not None:
            if vocab_size > self.vocab:
                raise ValueError(f"{op}: vocab_size must be 1 to {self.vocab}, or None, got {vocab_size}")
            self.vocab = vocab_size
        self.first = first
        self.width = min(max(self.vocab - first, 0), len(weight))
        self.weight = weight[: self.width]
        self.bias = None if bias is None else bias[: self.width]
        widest = self.width if self.shards is None else self.shards.widest  # all ranks take chunks of the same rows
        row_bytes = widest * hidden.element_size() * (1 if softcap is None else 2)
        rows = max(chunk_bytes // row_bytes, MIN_CHUNK_ROWS)
        self.chunk_rows = rows // ROW_MULTIPLE * ROW_MULTIPLE

    @contextmanager
    def memory(self, rows: int) -> Iterator[None]:
        """Memory for chunks of up to so many rows, with anything in it."""
        size, dtype = _rounded(rows), self.hidden.dtype
        # The derivative of the softcap needs the logits as they were before.
        widths = [self.width, self.hidden.shape[1], *([self.width] if self.softcap is not None else [])]
        sizes = [-(-size * width * dtype.itemsize // 64) * 64 for width in widths]
        with kernel("workspace", self.hidden.device)(sum(sizes), self.hidden.device) as workspace:
            parts = [
                part[: size * width * dtype.itemsize].view(dtype).view(size, width)
                for part, width in zip(workspace.split(sizes), widths, strict=True)
            ]
            self.buffer, self.inputs, *uncapped = parts
            self.uncapped = uncapped[0] if uncapped else self.buffer
            yield
            del self.buffer, self.inputs, self.uncapped

    def logits(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of some rows and their logits, in memory that the next call uses again."""
        size = _rounded(len(index))
        inputs, logits = self.inputs[:size], self.uncapped[:size]
        torch.index_select(self.hidden, 0, index, out=inputs[: len(index)])
        if self.bias is None:
            torch.mm(inputs, self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, inputs, self.weight.t(), out=logits)
        if self.softcap is not None:
            for uncapped, block in zip(logits.split(ROW_MULTIPLE), self.buffer.split(ROW_MULTIPLE), strict=False):
                block.copy_(torch.tanh(uncapped.float() / self.softcap) * self.softcap)
        return inputs[: len(index)], self.buffer[: len(index)]

    def own_labels(self, labels: Tensor) -> Tensor:
        """Columns of the labels, -1 where another rank has it."""
        own = (labels >= self.first) & (labels < self.first + self.width)
        return torch.where(own, labels - self.first, -1)


class _Rows:
    """The live rows: what is known of each, in their order."""

    def __init__(self, head: _Head, index: Tensor, labels: Tensor, temperature: Tensor | float):
        self.head, self.index, self.labels = head, index, head.own_labels(labels[index])
        self.temperature = temperature[index] if isinstance(temperature, Tensor) else temperature
        self.stats = torch.zeros(len(index), 5, dtype=torch.float64, device=index.device)
        self.slopes, self.entropy_slopes = self.stats.new_zeros(2, len(index))
        self.row_stats, self.row_logprobs, self.row_grads = (
            kernel(name, index.device) for name in ("row_stats", "row_logprobs", "row_grads")
        )

    def temperature_of(self, rows: Tensor | slice) -> Tensor | float:
        return self.temperature[rows] if isinstance(self.temperature, Tensor) else self.temperature

    def logits(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.head.logits(self.index[rows])

    def read(self, rows: Tensor, logits: Tensor) -> None:
        """Take down what the logits of some rows say."""
        temperature = self.temperature_of(rows)
        if self.head.width == 0:
            stats = torch.tensor([-torch.inf, 0.0, 0.0, 0.0, -torch.inf]).double().expand(len(rows), 5)
            stats = stats.to(rows.device)
        else:
            stats = self.row_stats(logits, self.labels[rows], temperature)
        if self.head.shards is not None:
            stats = self.head.shards.combined(stats, temperature, logits.dtype)
        self.stats[rows] = stats

    def logprobs(self, rows: slice) -> tuple[Tensor, Tensor]:
        return self.row_logprobs(self.stats[rows], self.head.hidden.dtype, self.temperature_of(rows))

    def gradient(self, rows: Tensor, moves: Tensor, logits: Tensor) -> Tensor:
        """The gradient of the logits of ``rows[moves]``, in their memory."""
        values = self.labels[rows], self.stats[rows], self.slopes[rows], self.entropy_slopes[rows]
        grad = logits[: len(moves)]
        self.row_grads(logits, grad, moves, *values, self.temperature_of(rows))
        softcap = self.head.softcap
        if softcap is not None:
            for block, taken in zip(grad.split(ROW_MULTIPLE), moves.split(ROW_MULTIPLE), strict=True):
                block.copy_(block.float() / torch.cosh(self.head.uncapped[taken].float() / softcap) ** 2)
        return grad


class _Gradients:
    """Sums over the chunks; ``several``: there may be more than one."""

    def __init__(self, head: _Head, need_grad: list[bool], several: bool):
        self.head, (hidden, weight, bias) = head, need_grad

        def sum_like(x):
            return torch.zeros_like(x, dtype=torch.float32 if several else x.dtype)

        dtype = head.hidden.dtype if head.shards is None else torch.float32
        self.hidden = torch.zeros_like(head.hidden, dtype=dtype) if hidden else None
        self.weight = sum_like(head.whole_weight) if weight else None
        self.bias = torch.zeros_like(head.whole_bias, dtype=torch.float32) if bias else None

    def add(self, rows: _Rows, piece: Tensor, moves: Tensor, inputs: Tensor, logits: Tensor) -> None:
        """Add what the rows ``piece[moves]`` contribute, whose hidden states and logits are given."""
        count = len(moves)
        if count == 0 or self.head.width == 0:
            return
        grad = rows.gradient(piece, moves, logits)
        if self.hidden is not None:
            # Rows beyond, of any content, have no influence on the others.
            product = torch.mm(self.head.buffer[: _rounded(count)], self.head.weight)
            self.hidden.index_copy_(0, rows.index[piece[moves]], product[:count].to(self.hidden.dtype))
        if self.weight is not None:
            self.add_to_weight(self.weight, grad, inputs if count == len(piece) else inputs[moves])
        if self.bias is not None:
            total = self.bias[: self.head.width]
            for part, columns in zip(total.split(COLUMNS), grad.split(COLUMNS, 1), strict=True):
                part += columns.sum(0, dtype=torch.float32)

    def add_to_weight(self, total: Tensor, grad: Tensor, inputs: Tensor) -> None:
        total = total[: self.head.width]
        if total.dtype == grad.dtype == torch.float32:
            torch.addmm(total, grad.t(), inputs, out=total)
        elif total.dtype == grad.dtype:  # there is but this chunk
            torch.mm(grad.t(), inputs, out=total)
        else:
            size = max(WEIGHT_BYTES // (inputs[0].numel() * inputs.element_size() + 1), 1)
            for part, columns in zip(total.split(size), grad.split(size, 1), strict=True):
                part += torch.mm(columns.t(), inputs)

    def results(self) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias in their own types."""
        dtype = self.head.hidden.dtype
        if self.hidden is not None and self.head.shards is not None:
            self.head.shards.add_up(self.hidden)
        return tuple(self.rounded(x, dtype) for x in (self.hidden, self.weight, self.bias))

    def rounded(self, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if x is None else x.to(dtype)


class _Shards:
    """A vocabulary that is split over the ranks of a process group, by name."""

    def __init__(self, group: str, weight: Tensor):
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

        self.dist, self.group = dist, _resolve_process_group(GroupName(group))
        size = torch.tensor([len(weight)], device=weight.device)
        sizes = [int(x) for x in self.gathered(size)]
        rank = dist.get_rank(self.group)
        self.first, self.vocab, self.widest = sum(sizes[:rank]), sum(sizes), max(sizes)

    def gathered(self, x: Tensor) -> Tensor:
        """x of all ranks, one after the other."""
        parts = [torch.empty_like(x) for _ in range(self.dist.get_world_size(self.group))]
        self.dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)

    def add_up(self, x: Tensor) -> None:
        self.dist.all_reduce(x, group=self.group)

    def combined(self, stats: Tensor, temperature: Tensor | float, dtype: torch.dtype) -> Tensor:
        """Stats of whole rows from those of their parts, the same bits on all ranks."""
        parts = self.gathered(stats)
        tops, sums, centred, infinite, at_label = parts.unbind(-1)
        absent = tops == -torch.inf  # nothing but -inf
        top = tops.amax(0)
        shift = torch.where(absent, 0.0, (tops - top) * reference.exponent_rate(temperature, dtype))
        scale = torch.where(absent, 0.0, torch.exp2(shift))
        sums = torch.where(absent, 0.0, sums)
        centred = torch.where(absent, 0.0, centred) + sums * shift
        total = torch.where(top == -torch.inf, torch.nan, (sums * scale).sum(0))
        return torch.stack([top, total, (centred * scale).sum(0), infinite.amax(0), at_label.amax(0)], -1)


def _rounded(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def _pieces(first: int, last: int, most: int) -> Iterator[tuple[int, int]]:
    """Cuts rows into the fewest pieces of at most so many, of about the same size."""
    number = -(-(last - first) // most)
    size = _rounded(-(-(last - first) // max(number, 1)))
    for start in range(first, last, max(size, 1)):
        yield start, min(start + size, last)


def _groups(response: Tensor, most: int, by_response: bool) -> Iterator[tuple[int, int]]:
    """Rows whose gradient is made in one go: chunks or, if their responses must stay whole, as many as fit, or one."""
    if not by_response:
        yield from _pieces(0, len(response), most)
        return
    first = previous = 0
    for end in _boundaries(response).tolist():
        if end - first > most and previous > first:
            yield first, previous
            first = previous
        previous = end
    if previous > first:
        yield first, previous


def _boundaries(response: Tensor) -> Tensor:
    """Cumulative lengths of runs of the same response."""
    return torch.nn.functional.pad(response.unique_consecutive(return_counts=True)[1].cumsum(0), (1, 0))


def _moves(kept: Tensor) -> Tensor:
    """Rows that bring the kept ones together: row i stays at i, or i is a row that is not kept."""
    count = int(kept.sum())
    moves = torch.arange(count, device=kept.device)
    moves[~kept[:count]] = count + kept[count:].nonzero()[:, 0]
    return moves
