"""Matrix products over the rows that are live, whose number only the device knows.

What is launched follows from shapes alone. Tiles of rows beyond the number return at once; sums over rows end there. Every
element is summed by one program in one order, so the bits of a row do not depend on how many there are.
"""

import functools

import torch
import triton
import triton.language as tl
from capo.kernels import launch
from capo.kernels.launch import on_device

MEMORY = 150 * 1024  # bytes that three stages of tiles take; devices whose programs share less take two


@triton.jit
def number_of(count_ptr, first, rows):
    """How many of the rows [first, first + rows) are among the first ``count``."""
    return tl.minimum(tl.maximum(tl.load(count_ptr) - first, 0), rows)


@triton.jit(do_not_specialize=["first", "rows"])
def rows_times_matrix(
    rows_ptr, rows_stride, matrix_ptr, depth_stride, column_stride, bias_ptr, out_ptr, out_stride, targets_ptr, count_ptr,
    first, rows, columns, depth, PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of ``rows @ matrix + bias``. Neighbouring programs share columns of the matrix, which is large."""
    tiles = tl.cdiv(rows, BLOCK_M)
    number = number_of(count_ptr, first, rows)
    top = (tl.program_id(0) % tiles) * BLOCK_M
    if top < number:
        left_most = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N
        i = top + tl.arange(0, BLOCK_M)
        j = left_most + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        # A row beyond the end is the last once more: nothing of it is stored. Within a tile 32 bits are enough.
        row = tl.minimum(tl.arange(0, BLOCK_M), rows - 1 - top)
        known = (j < columns)[None, :]
        a = rows_ptr + tl.cast(top, tl.int64) * rows_stride
        b = matrix_ptr + left_most * column_stride
        a_offsets = row[:, None] * rows_stride + k[None, :]
        b_offsets = k[:, None] * depth_stride + tl.arange(0, BLOCK_N)[None, :] * column_stride
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, depth, BLOCK_K):
            if EVEN:
                left = tl.load(a + a_offsets)
                right = tl.load(b + b_offsets, mask=known, other=0.0)
            else:
                left = tl.load(a + a_offsets, mask=(start + k < depth)[None, :], other=0.0)
                right = tl.load(b + b_offsets, mask=known & (start + k < depth)[:, None], other=0.0)
            total = tl.dot(left, right, total, input_precision=PRECISION)
            a += BLOCK_K
            b += BLOCK_K * depth_stride
        if bias_ptr is not None:
            total += tl.load(bias_ptr + j, mask=j < columns, other=0.0).to(tl.float32)[None, :]
        inside = i < number
        if targets_ptr is None:
            target = i.to(tl.int64)
        else:
            target = tl.load(targets_ptr + i, mask=inside, other=0)
        out = out_ptr + target[:, None] * out_stride + j[None, :]
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & known)


@triton.jit(do_not_specialize=["rows"])
def add_rows_by_rows(
    left_ptr, left_stride, right_ptr, right_stride, total_ptr, total_stride, count_ptr, rows, height, width,
    WRITTEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of ``total += left.T @ right``, over rows, or ``total =``, if nothing is WRITTEN there yet. Neighbouring programs
    share columns of the left, which is large."""
    tiles = tl.cdiv(width, BLOCK_N)
    number = number_of(count_ptr, 0, rows)
    if (number > 0) | (not WRITTEN):
        i = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        j = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        a_offsets = k[None, :] * left_stride + i[:, None]
        b_offsets = k[:, None] * right_stride + j[None, :]
        inside = (i < height)[:, None] & (j < width)[None, :]
        total = total_ptr + i.to(tl.int64)[:, None] * total_stride + j[None, :]
        sum_ = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if WRITTEN:
            sum_ = tl.load(total, mask=inside, other=0.0).to(tl.float32)
        for start in range(0, number, BLOCK_K):
            there = start + k < number
            left = tl.load(left_ptr + a_offsets, mask=there[None, :] & (i < height)[:, None], other=0.0)
            right = tl.load(right_ptr + b_offsets, mask=there[:, None] & (j < width)[None, :], other=0.0)
            sum_ = tl.dot(left, right, sum_, input_precision=PRECISION)
            left_ptr += BLOCK_K * left_stride
            right_ptr += BLOCK_K * right_stride
        tl.store(total, sum_.to(total_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "stride"])
def add_rows(
    values_ptr, stride, total_ptr, count_ptr, rows, width, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """A block of columns of ``total += values.sum(0)``."""
    number = number_of(count_ptr, 0, rows)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    sum_ = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for start in range(0, number, BLOCK_K):
        inside = (start + k < number)[:, None] & (j < width)[None, :]
        value = tl.load(values_ptr + (start + k).to(tl.int64)[:, None] * stride + j[None, :], mask=inside, other=0.0)
        sum_ += value.to(tl.float32)
    if number > 0:
        total = tl.load(total_ptr + j, mask=j < width, other=0.0)
        tl.store(total_ptr + j, total + tl.sum(sum_, 0), mask=j < width)


def rows_product(rows, matrix, bias, out, count, first=0, targets=None):
    """``out[targets[i]] = rows[i] @ matrix + bias`` for rows i below ``count - first``; the others are not touched.

    Args:
        rows: [L, K], contiguous.
        matrix: [K, N], any strides.
        bias: [N], or None.
        out: [.., N], rows of any stride; float32 or the type of rows.
        count: int64 tensor of one number.
        targets: [L] int64, or None: ``out[i]``.
    """
    (size, depth), columns = rows.shape, matrix.shape[1]
    sizes = tiles(rows.dtype, rows.device)
    grid = triton.cdiv(size, sizes["BLOCK_M"]) * triton.cdiv(columns, sizes["BLOCK_N"])
    if grid:
        with on_device(rows):
            rows_times_matrix[(grid,)](
                rows, rows.stride(0), matrix, *matrix.stride(), bias, out, out.stride(0), targets, count, first, size,
                columns, depth, PRECISION=precision(), EVEN=depth % sizes["BLOCK_K"] == 0, **sizes,
            )  # fmt: skip


def add_product(left, right, total, count, written=True):
    """``total += left[:count].T @ right[:count]``, or ``total =``, if nothing is written there yet. [L, M], [L, N], [M, N];
    last dimensions contiguous, L above 0"""
    rows, height, width = len(left), left.shape[1], right.shape[1]
    sizes = tiles(left.dtype, left.device)
    if limits(left.device)[0] != 9:  # elsewhere wider tiles do not fit into registers beside the sums before
        sizes["BLOCK_N"] = min(sizes["BLOCK_N"], 128)
    grid = triton.cdiv(height, sizes["BLOCK_M"]) * triton.cdiv(width, sizes["BLOCK_N"])
    if grid and rows:
        with on_device(left):
            add_rows_by_rows[(grid,)](
                left, left.stride(0), right, right.stride(0), total, total.stride(0), count, rows, height, width,
                WRITTEN=written, PRECISION=precision(), **sizes,
            )  # fmt: skip


def add_sum(values, total, count):
    """``total += values[:count].sum(0)``, total in float32."""
    rows, width = values.shape
    if rows and width:
        with on_device(values):
            add_rows[(triton.cdiv(width, 128),)](
                values,
                values.stride(0),
                total,
                count,
                rows,
                width,
                BLOCK_N=128,
                BLOCK_K=64,
                num_warps=8,
                enable_fp_fusion=False,
            )


def precision():
    """Of products of float32, as PyTorch is told: tf32 or not."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def tiles(dtype, device):
    """Sizes of tiles, warps and stages of a product."""
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    sizes = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "enable_fp_fusion": True}
    return {**sizes, "num_stages": stages(device)}


@functools.cache
def limits(device):
    """Generation of the device, and bytes that a program may share."""
    if device.type != "cuda":
        return 9, MEMORY
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.shared_memory_per_block_optin


def stages(device):
    """How many tiles are on their way to a program at once: what its memory holds, and two on AMD's."""
    return 3 if launch.LANES == 32 and limits(device)[1] >= MEMORY else 2
