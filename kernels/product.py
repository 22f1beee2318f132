"""Matrix products over the rows that are live, whose number only the device knows.

What is launched follows from shapes alone: a program for each place on the device, which goes through tiles as long as there
are any. No tile is made of rows beyond the number; sums over rows end there. Every element is summed by one program in one
order, so the bits of a row do not depend on how many there are. Blocks come by tensor descriptors: Hopper and newer load them
in hardware, the compiler makes pointers of them for others.
"""

import contextlib
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
    return tl.minimum(tl.maximum(tl.load(count_ptr) - first, 0), rows).to(tl.int32)


@triton.jit
def blocks(matrix_ptr, rows, columns, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A descriptor of the blocks of a matrix: 0 beyond its rows and columns. One without rows is never loaded from."""
    return tl.make_tensor_descriptor(matrix_ptr, [tl.maximum(rows, 1), columns], [stride, 1], [BLOCK_M, BLOCK_N])


@triton.jit
def tile_of_product(
    rows_blocks, matrix_blocks, top, left_most, depth, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile at [top, left_most] of ``rows @ matrix``, or of ``rows @ matrix.T`` if TRANSPOSED, in float32."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        left = rows_blocks.load([top, start])
        if TRANSPOSED:
            right = matrix_blocks.load([left_most, start]).T
        else:
            right = matrix_blocks.load([start, left_most])
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["first", "rows"])
def rows_times_matrix(
    rows_ptr, rows_stride, matrix_ptr, matrix_stride, bias_ptr, out_ptr, out_stride, targets_ptr, count_ptr, first, rows,
    columns, depth, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tiles of ``rows @ matrix + bias``. Neighbouring programs share columns of the matrix, which is large."""
    number = number_of(count_ptr, first, rows)
    rows_blocks = blocks(rows_ptr, number, depth, rows_stride, BLOCK_M, BLOCK_K)
    if TRANSPOSED:
        matrix_blocks = blocks(matrix_ptr, columns, depth, matrix_stride, BLOCK_N, BLOCK_K)
    else:
        matrix_blocks = blocks(matrix_ptr, depth, columns, matrix_stride, BLOCK_K, BLOCK_N)
    high = tl.cdiv(number, BLOCK_M)
    for tile in tl.range(tl.program_id(0), high * tl.cdiv(columns, BLOCK_N), tl.num_programs(0), flatten=True):
        top = (tile % high) * BLOCK_M
        left_most = (tile // high) * BLOCK_N
        total = tile_of_product(
            rows_blocks, matrix_blocks, top, left_most, depth, TRANSPOSED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        i = top + tl.arange(0, BLOCK_M)
        j = left_most + tl.arange(0, BLOCK_N)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + j, mask=j < columns, other=0.0).to(tl.float32)[None, :]
        inside = i < number
        if targets_ptr is None:
            target = i.to(tl.int64)
        else:
            target = tl.load(targets_ptr + i, mask=inside, other=0)
        out = out_ptr + target[:, None] * out_stride + j[None, :]
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (j < columns)[None, :])


@triton.jit(do_not_specialize=["rows"])
def add_rows_by_rows(
    left_ptr, left_stride, right_ptr, right_stride, total_ptr, total_stride, count_ptr, rows, height, width,
    WRITTEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tiles of ``total += left.T @ right``, over rows, or ``total =``, if nothing is WRITTEN there yet. Neighbouring programs
    share columns of the left, which is large."""
    number = number_of(count_ptr, 0, rows)
    left_blocks = blocks(left_ptr, number, height, left_stride, BLOCK_K, BLOCK_M)
    right_blocks = blocks(right_ptr, number, width, right_stride, BLOCK_K, BLOCK_N)
    wide = tl.cdiv(width, BLOCK_N)
    tiles = tl.cdiv(height, BLOCK_M) * wide
    if WRITTEN:
        tiles = tl.where(number > 0, tiles, 0)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        top = (tile // wide) * BLOCK_M
        left_most = (tile % wide) * BLOCK_N
        i = top + tl.arange(0, BLOCK_M)
        j = left_most + tl.arange(0, BLOCK_N)
        inside = (i < height)[:, None] & (j < width)[None, :]
        total = total_ptr + i.to(tl.int64)[:, None] * total_stride + j[None, :]
        sum_ = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if WRITTEN:  # before, not after: then fewer registers are spilled
            sum_ = tl.load(total, mask=inside, other=0.0).to(tl.float32)
        for start in range(0, number, BLOCK_K):
            left = left_blocks.load([start, top])
            sum_ = tl.dot(left.T, right_blocks.load([start, left_most]), sum_, input_precision=PRECISION)
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
        rows: [L, K].
        matrix: [K, N], rows or columns contiguous.
        bias: [N], or None.
        out: [.., N], rows of any stride; float32 or the type of rows.
        count: int64 tensor of one number.
        targets: [L] int64, or None: ``out[i]``.
    """
    (size, depth), columns = rows.shape, matrix.shape[1]
    if size == 0 or columns == 0:
        return
    transposed = matrix.stride(1) != 1
    rows, matrix = aligned(rows), aligned(matrix.t() if transposed else matrix)
    sizes = tiles(rows)
    with launching(rows):
        rows_times_matrix[programs(rows, size, columns, sizes)](
            rows, rows.stride(0), matrix, matrix.stride(0), bias, out, out.stride(0), targets, count, first, size, columns,
            depth, TRANSPOSED=transposed, PRECISION=precision(), **sizes,
        )  # fmt: skip


def add_product(left, right, total, count, written=True):
    """``total += left[:count].T @ right[:count]``, or ``total =``, if nothing is written there yet. [L, M], [L, N], [M, N];
    columns contiguous, L above 0"""
    height, width = left.shape[1], right.shape[1]
    if height == 0 or width == 0:
        return
    left, right, sizes = aligned(left), aligned(right), tiles(left)
    generation = limits(left.device)[0]
    if generation != 9:  # elsewhere wider tiles do not fit into registers beside the sums before
        sizes["BLOCK_N"] = min(sizes["BLOCK_N"], 128)
    if generation == 8:
        sizes["BLOCK_K"] = min(sizes["BLOCK_K"], 32)
    with launching(left):
        add_rows_by_rows[programs(left, height, width, sizes)](
            left, left.stride(0), right, right.stride(0), total, total.stride(0), count, len(left), height, width,
            WRITTEN=written, PRECISION=precision(), **sizes,
        )  # fmt: skip


def add_sum(values, total, count):
    """``total += values[:count].sum(0)``, total in float32."""
    rows, width = values.shape
    if rows and width:
        with on_device(values):
            add_rows[(triton.cdiv(width, 128),)](
                values, values.stride(0), total, count, rows, width, BLOCK_N=128, BLOCK_K=64, num_warps=8,
                enable_fp_fusion=False,
            )  # fmt: skip


def aligned(matrix):
    """The matrix, or a copy whose rows are contiguous and begin at multiples of 16 bytes, as descriptors want it."""
    width = 16 // matrix.element_size()
    if matrix.stride(1) == 1 and matrix.stride(0) % width == 0 and matrix.data_ptr() % 16 == 0:
        return matrix
    rows, columns = matrix.shape
    return matrix.new_empty(rows, triton.cdiv(columns, width) * width)[:, :columns].copy_(matrix)


@contextlib.contextmanager
def launching(tensor):
    """Launches inside go to the device of the tensor, and have memory there for their descriptors."""
    with on_device(tensor):
        triton.set_allocator(_scratch)
        yield


def _scratch(size, alignment, stream):
    return torch.empty(size, dtype=torch.int8, device="cuda")


def programs(tensor, height, width, sizes):
    """The grid of a product: a program a tile, but no more than are there at once."""
    number = triton.cdiv(height, sizes["BLOCK_M"]) * triton.cdiv(width, sizes["BLOCK_N"])
    return (min(number, limits(tensor.device)[2] * (1 if tensor.element_size() == 2 else 2)),)


def precision():
    """Of products of float32, as PyTorch is told: tf32 or not."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def tiles(matrix):
    """Sizes of tiles, warps and stages of a product."""
    if matrix.dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
    sizes = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "enable_fp_fusion": True}
    return {**sizes, "num_stages": stages(matrix.device)}


@functools.cache
def limits(device):
    """Generation of the device, bytes that a program may share, and multiprocessors."""
    if device.type != "cuda":
        return 9, MEMORY, 3
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.shared_memory_per_block_optin, properties.multi_processor_count


def stages(device):
    """How many tiles are on their way to a program at once: what its memory holds, and two on AMD's."""
    return 3 if launch.LANES == 32 and limits(device)[1] >= MEMORY else 2
