"""An experiment: log-probabilities in the epilogue of the product that makes the logits, which never reach memory.

``capo.linear_logprobs`` writes the logits of a chunk and reads them; gpu.py times both, docs/gpu.md has what is predicted. Sums
are per tile of columns here, so that these log-probabilities have not the bits of those of ``capo.linear_policy_loss``.
"""

import torch
import triton
import triton.language as tl
from capo.kernels import product
from capo.kernels.product import blocks, number_of, tile_of_product

from capo.reference import LOG2_E


@triton.jit(do_not_specialize=["rows"])
def sums_of_tiles(
    rows_ptr, rows_stride, matrix_ptr, matrix_stride, labels_ptr, at_label_ptr, parts_ptr, count_ptr, rows, columns, depth,
    rate, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of ``rows @ matrix.T``, for each row and tile of columns: the largest logit, sums of 2^t and of 2^t * t counted from it."""
    number = number_of(count_ptr, 0, rows)
    rows_blocks = blocks(rows_ptr, number, depth, rows_stride, BLOCK_M, BLOCK_K)
    matrix_blocks = blocks(matrix_ptr, columns, depth, matrix_stride, BLOCK_N, BLOCK_K)
    high = tl.cdiv(number, BLOCK_M)
    for tile in tl.range(tl.program_id(0), high * tl.cdiv(columns, BLOCK_N), tl.num_programs(0), flatten=True):
        top_most = (tile % high) * BLOCK_M
        part = tile // high
        left_most = part * BLOCK_N
        total = tile_of_product(
            rows_blocks, matrix_blocks, top_most, left_most, depth, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        i = top_most + tl.arange(0, BLOCK_M)
        j = left_most + tl.arange(0, BLOCK_N)
        z = total.to(rows_ptr.dtype.element_ty).to(tl.float32)
        if left_most + BLOCK_N > columns:
            z = tl.where((j < columns)[None, :], z, -float("inf"))
        label = tl.load(labels_ptr + i, mask=i < number, other=-1)
        own = (label >= left_most) & (label < left_most + BLOCK_N)
        if tl.max(own.to(tl.int32), 0) != 0:
            tl.store(at_label_ptr + i, tl.sum(tl.where(j[None, :] == label[:, None], z, 0.0), 1), mask=own)
        top = tl.max(z, 1)
        # Not -inf: 0 times that is no number.
        t = tl.maximum((z - top[:, None]) * rate, -150.0, propagate_nan=tl.PropagateNan.ALL)
        power = tl.exp2(t)
        parts = parts_ptr + 3 * part.to(tl.int64) * rows + i
        tl.store(parts, top, mask=i < number)
        tl.store(parts + rows, tl.sum(power, 1), mask=i < number)
        tl.store(parts + 2 * rows, tl.sum(power * t, 1), mask=i < number)


@triton.jit(do_not_specialize=["rows", "parts"])
def logprobs_of_tiles(
    at_label_ptr, parts_ptr, count_ptr, logprobs_ptr, entropy_ptr, rows, parts, rate, BLOCK: tl.constexpr
):  # fmt: skip
    """Log-probability and entropy of some rows, of which nothing is there beyond ``count``."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < number_of(count_ptr, 0, rows)
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    for part in range(parts):
        top = tl.maximum(top, tl.load(parts_ptr + 3 * part * rows + i, mask=there, other=0.0))
    total = tl.zeros([BLOCK], tl.float64)
    centred = tl.zeros([BLOCK], tl.float64)
    for part in range(parts):
        place = parts_ptr + 3 * part * rows + i
        shift = (tl.load(place, mask=there, other=0.0) - top) * rate
        scale = tl.exp2(shift).to(tl.float64)
        sum_ = tl.load(place + rows, mask=there, other=1.0).to(tl.float64)
        moved = tl.load(place + 2 * rows, mask=there, other=0.0).to(tl.float64) + sum_ * shift.to(tl.float64)
        total += sum_ * scale
        centred += tl.where(scale > 0.0, moved * scale, 0.0)
    log_sum = tl.log2(total.to(tl.float32))
    at_label = tl.load(at_label_ptr + i, mask=there, other=0.0)
    tl.store(logprobs_ptr + i, ((at_label - top) * rate - log_sum) / rate, mask=there)
    tl.store(entropy_ptr + i, (log_sum - (centred / total).to(tl.float32)) / rate, mask=there)


def linear_logprobs(hidden, weight, labels, count):
    """Log-probabilities and entropies of the first ``count`` rows of ``hidden @ weight.T`` at temperature 1; 0 for the rest."""
    (rows, depth), columns = hidden.shape, len(weight)
    hidden, weight, sizes = product.aligned(hidden), product.aligned(weight), product.tiles(hidden)
    parts = triton.cdiv(columns, sizes["BLOCK_N"])
    logprobs, entropy, at_label = torch.zeros(3, rows, device=hidden.device)
    sums = torch.empty(parts, 3, rows, device=hidden.device)
    with product.launching(hidden):
        sums_of_tiles[product.programs(hidden, rows, columns, sizes)](
            hidden, hidden.stride(0), weight, weight.stride(0), labels, at_label, sums, count, rows, columns, depth, LOG2_E,
            PRECISION=product.precision(), **sizes,
        )  # fmt: skip
        logprobs_of_tiles[(triton.cdiv(rows, 32),)](
            at_label, sums, count, logprobs, entropy, rows, parts, LOG2_E, BLOCK=32, num_warps=1, enable_fp_fusion=False
        )
    return logprobs, entropy
