"""What launches have in common."""

import contextlib
import functools
import math
import struct

import torch
import triton
from capo.kernels.rows import BLOCK, MAX_VOCAB, THREADS

MAX_SPLITS = 64
LANES = 64 if torch.version.hip else 32  # of a warp


def check_vocab(op, vocab):
    """Raise ValueError for a vocabulary beyond what the sums of a row hold."""
    if vocab > MAX_VOCAB:
        raise ValueError(
            f"{op}: a vocabulary of {vocab} is beyond the {MAX_VOCAB} of the triton backend; use capo.use_backend('torch')"
        )


def on_device(tensor):
    """Launches inside go to the device of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def sizes_of(logits):
    """How a row is read: columns that a program and that a thread load at once, how many such loads are under way together
    (32 KiB), warps."""
    size = logits.element_size()
    sizes = {"BLOCK": BLOCK, "UNROLL": 8 // size, "NEIGHBOURS": 16 // size}
    return {**sizes, "num_warps": THREADS // LANES, "enable_fp_fusion": False}


def rates_of(logits, temperature):
    """What ``rows.powers`` needs to know of the temperature. Logits of 16 bits have no use for the rest of the rate."""
    exact, exact_inverse = 1.0 / (math.log(2.0) * temperature), 1.0 / temperature
    rate, inverse = _float32(exact), _float32(exact_inverse)
    rest = exact - rate if logits.dtype == torch.float32 else None
    return rate, rest, -200.0 / rate, inverse, exact_inverse - inverse


def _float32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


def alignment(logits, grad):
    """What is known of the rows' addresses and length: whether they are multiples of 16 bytes.

    Kernels get the vocabulary in units of its alignment: so the compiler sees it, whatever the number.
    """
    width = 16 // logits.element_size()

    def of(tensor):
        return width if tensor is not None and tensor.stride(0) % width == 0 else 1

    return {"ALIGN": of(logits), "GRAD_ALIGN": of(grad), "VOCAB_ALIGN": width if logits.shape[1] % width == 0 else 1}


def splits_of(logits):
    """Among how many programs a row is divided, and chunks of columns for each: more than one where rows are few."""
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, BLOCK * sizes_of(logits)["UNROLL"])
    wanted = min(triton.cdiv(programs(logits.device), max(rows, 1)), chunks, MAX_SPLITS)
    per_split = triton.cdiv(chunks, max(wanted, 1))
    return triton.cdiv(chunks, per_split), per_split


@functools.cache
def programs(device):
    """How many programs of so many THREADS the device runs at once; 1 on the CPU."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
