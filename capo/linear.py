"""Policy loss and log-probabilities from hidden states: the logits are made and used up in chunks of rows.

For each chunk one matrix product gives the logits, the backend (``row_stats``, ``loss_terms``, ``row_grads``) turns them
into their gradient in place, two more products take that to the hidden states and the weight. Dead rows are left out of
all three, rows whose gradient turns out to be 0 of the last two. Weights of tokens and sums over them are made once for
all chunks: nothing depends on how the rows are cut.

On a CPU the rows that are left are counted, and the products are PyTorch's. A GPU is not waited for: where shapes do not say
how many rows are live, all have their place in a chunk, the live ones first, and the products of the backend
(``rows_product``, ``add_product``) read on the device how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from capo import reference
from capo.backends import backend_with, checks_values, chosen, kernel
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
# The label of a row that is not there.
ABSENT = -2


def policy_loss(
    hidden, weight, bias, labels, advantages, old_logprobs, cu_seqlens, ref_logprobs, mask, rollout_logprobs,
    row_temperature, need_grad, softcap, vocab_size, chunk_bytes, group, num_live, *rule_fields,
):  # fmt: skip
    """Loss, metrics and gradients of hidden, weight and bias, None if not needed; see ``capo.linear_policy_loss``."""
    rule = LossRule(*rule_fields)
    head = _Head("linear_policy_loss", hidden, weight, bias, softcap, vocab_size, chunk_bytes, group)
    if checks_values(hidden.device.type) or len(cu_seqlens) == 1:
        reference.check_labels(head.op, labels, head.vocab, mask)
        reference.check_cumulative(head.op, "cu_seqlens", cu_seqlens, len(labels))
    live, response, weights, counts = reference.row_weights(advantages, cu_seqlens, mask, rule, torch.float64)
    if mask is None and (rule.kl_coef > 0 or rule.entropy_coef != 0):
        num_live = len(labels) if num_live is None else num_live
    rows = _Rows(head, live, num_live, labels, rule.temperature if row_temperature is None else row_temperature)
    index = rows.index
    response, weights = response[index], rows.there(weights[index])
    values = [None if x is None else x[index] for x in (advantages, old_logprobs, ref_logprobs, rollout_logprobs)]
    entropy_slopes = weights * -float(np.float32(rule.entropy_coef))

    by_response = rule.ratio != "token"
    groups = list(rows.groups(response, by_response))
    sizes = [last - first for first, last in groups for first, last in _pieces(first, last, head.chunk_rows)]
    gradients = _Gradients(head, need_grad, several=len(sizes) > 1)
    loss_terms, parts = head.kernel("loss_terms"), []
    with head.memory(max(sizes, default=0)):
        for first, last in groups:
            these = slice(first, last)
            spans = _pieces(first, last, head.chunk_rows)
            pieces = [(start, torch.arange(start, end, device=index.device)) for start, end in spans]
            for start, piece in pieces:
                inputs, logits = rows.logits(piece, start)
                rows.read(piece, logits)
            logprobs, entropy = rows.logprobs(these)
            cu = rows.boundaries(response[these], len(counts)) if by_response else None
            cu = torch.arange(2, device=index.device) * (last - first) if cu is None else cu
            of_these = [None if x is None else x[these] for x in values]
            *terms, slopes = loss_terms(logprobs, entropy, *of_these, weights[these], cu, *rule_fields)
            parts.append((logprobs, entropy, *terms))
            if not any(need_grad):
                continue
            rows.slopes[these], rows.entropy_slopes[these] = slopes, entropy_slopes[these]
            kept = (slopes != 0) | (entropy_slopes[these] != 0)
            gradients.add_group(rows, pieces, kept, inputs, logits)

    empty = [hidden.new_zeros(0, dtype=torch.float32)] * 4 + [live[:0]]
    logprobs, entropy, loss, kl, clipped = (torch.cat(part) for part in zip(*(parts or [empty]), strict=True))
    num_active = counts.sum().clamp(min=1)
    loss = rows.total(loss.double() * weights, response, len(counts))
    if not checks_values(hidden.device.type):
        wrong = (cu_seqlens[0] != 0) | (cu_seqlens[-1] != len(labels)) | (cu_seqlens.diff() < 0).any()
        loss = torch.where(wrong if rows.wrong is None else wrong | rows.wrong, torch.nan, loss)
    metrics = (
        loss.float(),
        rows.scatter(logprobs),
        rows.scatter(entropy),
        (clipped.sum().double() / num_active).float(),
        (rows.total(kl.double(), response, len(counts)) / num_active).float(),
    )
    return *metrics, *gradients.results()


def logprobs(
    hidden, weight, bias, labels, mask, row_temperature, temperature, softcap, vocab_size, chunk_bytes, group, num_live
):
    """Log-probabilities and entropies; see ``capo.linear_logprobs``."""
    head = _Head("linear_logprobs", hidden, weight, bias, softcap, vocab_size, chunk_bytes, group)
    if checks_values(hidden.device.type):
        reference.check_labels(head.op, labels, head.vocab, mask)
    live = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    if mask is None and num_live is None:
        num_live = len(labels)
    rows = _Rows(head, live, num_live, labels, temperature if row_temperature is None else row_temperature)
    pieces = list(_pieces(0, len(rows.index), head.chunk_rows))
    with head.memory(max((last - first for first, last in pieces), default=0)):
        for first, last in pieces:
            piece = torch.arange(first, last, device=labels.device)
            rows.read(piece, rows.logits(piece, first)[1])
    return tuple(rows.scatter(x) for x in rows.logprobs(slice(None)))


def _products(device: torch.device) -> ModuleType | None:
    """The backend whose products know on the device how many rows are live; None: rows are counted, which waits."""
    if device.type == "cpu" and chosen("cpu") != "triton":
        return None
    return backend_with("rows_product", device)


class _Head:
    """Weight and bias of the logits that are made here, and memory for a chunk of them."""

    def __init__(self, op, hidden, weight, bias, softcap, vocab_size, chunk_bytes, group):
        self.op, self.hidden, self.whole_weight, self.whole_bias, self.softcap = op, hidden, weight, bias, softcap
        self.products = _products(hidden.device)
        # The kernels of a GPU write rows that are next to each other; the products of PyTorch know any strides.
        self.layout = torch.preserve_format if self.products is None else torch.contiguous_format
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

    def kernel(self, name: str) -> Callable:
        return kernel(name, self.hidden.device) if self.products is None else getattr(self.products, name)

    @contextmanager
    def memory(self, rows: int) -> Iterator[None]:
        """Memory for chunks of up to so many rows, with anything in it."""
        size, dtype = _rounded(rows), self.hidden.dtype
        # The derivative of the softcap needs the logits as they were before.
        widths = [self.width, self.hidden.shape[1], *([self.width] if self.softcap is not None else [])]
        # The kernels of a GPU load blocks whose rows begin at multiples of 16 bytes.
        multiple = 1 if self.products is None else 16 // dtype.itemsize
        strides = [-(-width // multiple) * multiple for width in widths]
        sizes = [-(-size * stride * dtype.itemsize // 64) * 64 for stride in strides]
        with self.kernel("workspace")(sum(sizes), self.hidden.device) as workspace:
            parts = [
                part[: size * stride * dtype.itemsize].view(dtype).view(size, stride)[:, :width]
                for part, width, stride in zip(workspace.split(sizes), widths, strides, strict=True)
            ]
            self.buffer, self.inputs, *uncapped = parts
            self.uncapped = uncapped[0] if uncapped else self.buffer
            yield
            del self.buffer, self.inputs, self.uncapped

    def logits(self, index: Tensor, count: Tensor | None, first: int, inside: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states of some rows and their logits, in memory that the next call uses again.

        ``count``: only the first ``count - first`` are wanted. ``inside``: of the other rows hidden states become 0.
        """
        size = _rounded(len(index))
        inputs, logits = self.inputs[:size], self.uncapped[:size]
        torch.index_select(self.hidden, 0, index, out=inputs[: len(index)])
        if inside is not None:
            inputs[: len(index)].masked_fill_(~inside[:, None], 0.0)
        if count is not None:
            inputs, logits = inputs[: len(index)], logits[: len(index)]
            self.kernel("rows_product")(inputs, self.weight.t(), self.bias, logits, count, first)
            if self.softcap is not None:
                self.kernel("cap_rows")(logits, self.buffer[: len(index)], self.softcap, count, first)
            return inputs, self.buffer[: len(index)]
        if self.bias is None:
            torch.mm(inputs, self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, inputs, self.weight.t(), out=logits)
        if self.softcap is not None:
            for uncapped, block in zip(logits.split(ROW_MULTIPLE), self.buffer.split(ROW_MULTIPLE), strict=False):
                block.copy_(torch.tanh(uncapped.float() / self.softcap) * self.softcap)
        return inputs[: len(index)], self.buffer[: len(index)]

    def unwritten_gradient(self, dtype: torch.dtype) -> Tensor:
        """Memory for the gradient of the whole weight, with anything in it."""
        returned = self.products is None and dtype == self.weight.dtype  # for such a backend may keep memory
        backend = backend_with("unwritten_like", self.weight.device) if returned else None
        if backend is not None:
            return backend.unwritten_like(self.whole_weight, dtype)
        return torch.empty_like(self.whole_weight, dtype=dtype, memory_format=self.layout)

    def own_labels(self, labels: Tensor) -> Tensor:
        """Columns of the labels, -1 where another rank has it."""
        own = (labels >= self.first) & (labels < self.first + self.width)
        return torch.where(own, labels - self.first, -1)


class _Rows:
    """The live rows: what is known of each, in their order.

    ``counted``: the device was waited for, and is again for rows without gradient. Else the rest are there to have a shape:
    ``inside`` says which rows are live, and ``count`` how many, for products that ask; None: they are made of all rows.
    """

    def __init__(self, head: _Head, live: Tensor, num_live: int | None, labels: Tensor, temperature: Tensor | float):
        self.head, self.counted, self.count, self.inside = head, head.products is None, None, None
        checked, number = checks_values(live.device.type), live.sum()
        if checked and num_live is not None and num_live < int(number):
            raise ValueError(f"{head.op}: num_live={num_live}, but {int(number)} of {len(live)} tokens are live")
        if self.counted:
            index = live.nonzero()[:, 0]
        else:
            index = (~live).byte().sort(stable=True).indices[:num_live]
            self.inside = torch.arange(len(index), device=index.device) < number
            self.count = number if num_live is None else None
        self.index, self.size, labels = index, len(live), self.there(labels[index])
        self.labels = head.own_labels(labels)
        if self.inside is not None and num_live is None:
            self.labels = torch.where(self.inside, self.labels, ABSENT)
        # Where nothing is checked, labels outside the vocabulary and too many live rows give NaN.
        self.wrong = None if checked or num_live is None else number > num_live
        self.unknown = None if checked else (labels < 0) | (labels >= head.vocab)
        if self.unknown is not None and self.wrong is not None:
            self.unknown = self.unknown | self.wrong
        self.temperature = temperature[index] if isinstance(temperature, Tensor) else temperature
        self.stats = torch.zeros(len(index), 5, dtype=torch.float64, device=index.device)
        self.slopes, self.entropy_slopes = self.stats.new_zeros(2, len(index))
        self.row_stats, self.row_logprobs, self.row_grads = map(head.kernel, ("row_stats", "row_logprobs", "row_grads"))

    def there(self, values: Tensor) -> Tensor:
        """Values of live rows, 0 for the rest."""
        return values if self.inside is None else torch.where(self.inside, values, 0)

    def scatter(self, values: Tensor) -> Tensor:
        """Values of the live rows in a row per token, 0 elsewhere."""
        result = torch.zeros(self.size, device=values.device).index_copy(0, self.index, self.there(values))
        return result if self.wrong is None else torch.where(self.wrong, torch.nan, result)

    def total(self, values: Tensor, response: Tensor, num_responses: int) -> Tensor:
        """Their sum. On a GPU ``index_add`` has no fixed order; that of all rows does not depend on chunks either."""
        if not self.counted:
            return self.there(values).sum()
        return values.new_zeros(num_responses).index_add(0, response, values).sum()

    def groups(self, response: Tensor, by_response: bool) -> Iterator[tuple[int, int]]:
        """Rows whose gradient is made in one go."""
        if by_response and not self.counted:
            return iter([(0, len(response))] if len(response) else [])
        return _groups(response, self.head.chunk_rows, by_response)

    def boundaries(self, response: Tensor, num_responses: int) -> Tensor:
        """Cumulative lengths of responses of which there are live rows."""
        if self.counted:
            return _boundaries(response)
        one = self.there(torch.ones_like(response))
        lengths = one.new_zeros(num_responses).index_add(0, response, one)
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))

    def moves(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows that bring the kept ones together, and how many these are if only the device knows."""
        if self.counted:
            return _moves(kept), None
        if self.count is None:
            return torch.arange(len(kept), device=kept.device), None
        return _moves_on_device(kept)

    def temperature_of(self, rows: Tensor | slice) -> Tensor | float:
        return self.temperature[rows] if isinstance(self.temperature, Tensor) else self.temperature

    def logits(self, rows: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        inside = self.inside[rows] if self.inside is not None and self.count is None else None
        return self.head.logits(self.index[rows], self.count, first, inside)

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
        logprobs, entropy = self.row_logprobs(self.stats[rows], self.head.hidden.dtype, self.temperature_of(rows))
        return logprobs if self.unknown is None else torch.where(self.unknown[rows], torch.nan, logprobs), entropy

    def gradient(self, rows: Tensor, moves: Tensor, count: Tensor | None, logits: Tensor) -> Tensor:
        """The gradient of the logits of ``rows[moves]``, in their memory."""
        values = self.labels[rows], self.stats[rows], self.slopes[rows], self.entropy_slopes[rows]
        grad = logits[: len(moves)]
        self.row_grads(logits, grad, moves, *values, self.temperature_of(rows))
        softcap = self.head.softcap
        if softcap is not None and count is not None:
            self.head.kernel("cap_rows")(self.head.uncapped, grad, softcap, count, rows=moves)
        elif softcap is not None:
            for block, taken in zip(grad.split(ROW_MULTIPLE), moves.split(ROW_MULTIPLE), strict=True):
                block.copy_(block.float() / torch.cosh(self.head.uncapped[taken].float() / softcap) ** 2)
        return grad


class _Gradients:
    """Sums over the chunks; ``several``: there may be more than one."""

    def __init__(self, head: _Head, need_grad: list[bool], several: bool):
        self.head, (hidden, weight, bias) = head, need_grad
        dtype = head.hidden.dtype if head.shards is None else torch.float32
        self.hidden = torch.zeros_like(head.hidden, dtype=dtype, memory_format=head.layout) if hidden else None
        self.weight = _WeightGradient(head, several) if weight else None
        self.bias = torch.zeros_like(head.whole_bias, dtype=torch.float32) if bias else None

    def add_group(
        self, rows: _Rows, pieces: list[tuple[int, Tensor]], kept: Tensor, inputs: Tensor, logits: Tensor
    ) -> None:
        """Add what the kept rows of a group contribute. Hidden states and logits are those of its last piece; of the others
        they are gone, and made again."""
        first = pieces[0][0]
        if len(pieces) == 1:
            self.add(rows, pieces[0][1], *rows.moves(kept), inputs, logits)
        elif rows.counted:
            for piece in (first + kept.nonzero()[:, 0]).split(len(pieces[0][1])):
                moves = torch.arange(len(piece), device=piece.device)
                self.add(rows, piece, moves, None, *rows.logits(piece))
        else:
            for start, piece in pieces:
                self.add(rows, piece, *rows.moves(kept[piece - first]), *rows.logits(piece, start))

    def add(
        self, rows: _Rows, piece: Tensor, moves: Tensor, count: Tensor | None, inputs: Tensor, logits: Tensor
    ) -> None:
        """Add what the rows ``piece[moves]``, or the first ``count`` of them, contribute, whose hidden states and logits are
        given."""
        if len(moves) == 0 or self.head.width == 0:
            return
        grad = rows.gradient(piece, moves, count, logits)
        if count is None:
            self.add_rows(rows.index[piece[moves]], grad, inputs if len(moves) == len(piece) else inputs[moves])
        else:
            moves = moves.clamp(min=0)
            self.add_counted(rows.index[piece[moves]], grad, inputs[moves], count)

    def add_counted(self, index: Tensor, grad: Tensor, inputs: Tensor, count: Tensor) -> None:
        """Add what the first rows with a gradient contribute, which only the device counts."""
        kernel = self.head.kernel
        if self.hidden is not None:
            kernel("rows_product")(grad, self.head.weight, None, self.hidden, count, targets=index)
        if self.weight is not None:
            self.weight.add_counted(grad, inputs, count)
        if self.bias is not None:
            kernel("add_sum")(grad, self.bias[: self.head.width], count)

    def add_rows(self, index: Tensor, grad: Tensor, inputs: Tensor) -> None:
        """Add what rows with these gradients of their logits contribute."""
        count = len(index)
        if self.hidden is not None:
            # Rows beyond, of any content, have no influence on the others.
            product = torch.mm(self.head.buffer[: _rounded(count)], self.head.weight)
            self.hidden.index_copy_(0, index, product[:count].to(self.hidden.dtype))
        if self.weight is not None:
            self.weight.add(grad, inputs)
        if self.bias is not None:
            total = self.bias[: self.head.width]
            for part, columns in zip(total.split(COLUMNS), grad.split(COLUMNS, 1), strict=True):
                part += columns.sum(0, dtype=torch.float32)

    def results(self) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias in their own types."""
        dtype = self.head.hidden.dtype
        if self.hidden is not None and self.head.shards is not None:
            self.head.shards.add_up(self.hidden)
        hidden, bias = (None if x is None else x.to(dtype) for x in (self.hidden, self.bias))
        return hidden, None if self.weight is None else self.weight.result(), bias


class _WeightGradient:
    """A sum over the chunks, in float32 if there may be several. The first one writes it: there are no zeros to begin with."""

    def __init__(self, head: _Head, several: bool):
        self.head = head
        self.total: Tensor | None = None
        self.dtype = torch.float32 if several else head.weight.dtype

    def sum_before(self) -> tuple[Tensor, bool]:
        """The sum in the rows of the vocabulary, and whether there is anything in it."""
        written = self.total is not None
        if self.total is None:
            self.total = self.head.unwritten_gradient(self.dtype)
        return self.total[: self.head.width], written

    def add_counted(self, grad: Tensor, inputs: Tensor, count: Tensor) -> None:
        total, written = self.sum_before()
        self.head.kernel("add_product")(grad, inputs, total, count, written)

    def add(self, grad: Tensor, inputs: Tensor) -> None:
        """Add ``grad.T @ inputs``."""
        total, written = self.sum_before()
        if total.dtype == grad.dtype:  # float32, or there is but this chunk
            torch.addmm(total, grad.t(), inputs, beta=int(written), out=total)
        elif total.is_cuda:
            torch.addmm(total, grad.t(), inputs, out_dtype=torch.float32, beta=int(written), out=total)
        else:
            size = max(WEIGHT_BYTES // (inputs[0].numel() * inputs.element_size() + 1), 1)
            for part, columns in zip(total.split(size), grad.split(size, 1), strict=True):
                product = torch.mm(columns.t(), inputs)
                if written:
                    part += product
                else:
                    part.copy_(product)

    def result(self) -> Tensor:
        """The sum in the type of the weight, 0 in rows beyond the vocabulary."""
        if self.total is None:
            return torch.zeros_like(self.head.whole_weight, memory_format=self.head.layout)
        self.total[self.head.width :].zero_()
        dtype = self.head.weight.dtype
        return self.total if self.dtype == dtype else self.head.unwritten_gradient(dtype).copy_(self.total)


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


def _moves_on_device(kept: Tensor) -> tuple[Tensor, Tensor]:
    """As above but for all rows, -1 from the number of kept ones on; and that number. Nothing waits for it."""
    count, row = kept.sum(), torch.arange(len(kept), device=kept.device)
    inside = row < count
    vacant, left = inside & ~kept, ~inside & kept
    # Of the rows left over the i-th comes to the i-th vacant place, i from 1; those that are none of them meet at 0.
    found = row.new_zeros(len(kept) + 1).scatter(0, torch.where(left, left.cumsum(0), 0), row)
    moves = torch.where(vacant, found[vacant.cumsum(0)], row)
    return torch.where(inside, moves, -1), count
