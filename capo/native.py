"""The C++ kernels for CPU tensors: hands addresses and sizes to ``capo._native``; the functions of a backend."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from capo import _native, reference

# The order of the enumerations in csrc/common.
_VOTES = ("majority", "strict_majority", "intersection", "union", "average")
_REWARDS = ("step", "step_suffix", "prefix", "flawed", "share")
_NORMALIZE = ("group_tokens", "group_mean", "responses", "responses_mean", "leave_one_out", "group_steps")
_RATIOS = ("token", "sequence", "sequence_token")
_REDUCE = ("sequence_mean", "token_mean", "constant")
_KL = ("none", "k1", "k2", "k3")
_OBJECTIVES = ("clip", "cispo")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _float32(x: float) -> float:
    """x rounded to float32, so that all backends compare against the same bound."""
    return torch.tensor(x, dtype=torch.float32).item()


class _Kept:
    """Memory that is taken again once no tensor has it, one piece at most: much of it takes longer to get than to write."""

    def __init__(self, new: Callable[[int], np.ndarray]):
        self.new = new
        self.pieces: list[tuple[np.ndarray, weakref.ref]] = []  # and what was given away of it

    def bytes(self, size: int) -> Tensor:
        """So many, with anything in them."""
        try:
            memory, given = self.pieces.pop()  # at once, as another thread may want it
        except IndexError:
            memory = None
        if memory is None or given() is not None or not size <= memory.size <= 2 * size:
            memory = None  # given back before more is taken
            memory = self.new(size)
        part = memory[:size]
        self.pieces[:] = [(memory, weakref.ref(part))]
        return torch.from_numpy(part)


def _in_small_pages(size: int) -> np.ndarray:
    """NumPy would ask for large pages, which may take longer to get and make no product faster."""
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8).numpy()


_LARGE = 4 << 20  # bytes from which on memory is kept
_advantages = _Kept(lambda size: np.empty(size, dtype=np.uint8))
_weight_gradient = _Kept(_in_small_pages)


def unwritten_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``torch.empty_like(x, dtype=dtype)``, for the gradient of a weight."""
    size = x.numel() * dtype.itemsize
    if size < _LARGE:
        return torch.empty_like(x, dtype=dtype)
    strides = torch.empty_like(x, device="meta").stride()
    return _weight_gradient.bytes(size).view(dtype).as_strided(x.shape, strides)


def forget_memory() -> None:
    """Give back what is kept from one call to the next."""
    for pieces in (_advantages.pieces, _weight_gradient.pieces, _kept):
        pieces.clear()


def credit(outcomes, votes, starts, ends, cu_steps, cu_seqlens, groups, num_tokens, *rule):
    vote, outcome_weight, process_weight, normalize, std_floor, clamp, reward = rule
    size = 4 * num_tokens
    memory = torch.empty(size, dtype=torch.uint8) if size < _LARGE else _advantages.bytes(size)
    advantages = memory.view(torch.float32)
    layout = (outcomes, votes, starts, ends, cu_steps, cu_seqlens)
    fits = _native.credit(
        *map(_address, (*layout, groups, advantages)),
        outcomes.numel(),
        starts.numel(),
        votes.shape[1],
        num_tokens,
        _VOTES.index(vote),
        outcome_weight,
        process_weight,
        _NORMALIZE.index(normalize),
        std_floor,
        math.inf if clamp is None else clamp,
        _REWARDS.index(reward),
        torch.get_num_threads(),
    )
    if not fits:
        reference.check_credit(*layout, num_tokens)
    return advantages


_kept: list[Tensor] = []  # what workspace() keeps from one call to the next, one piece at most


@contextlib.contextmanager
def workspace(size: int, device: torch.device) -> Iterator[Tensor]:
    """Some bytes of memory with anything in them. The piece is kept: a matrix product into fresh memory may take a third
    longer than one into memory that is there."""
    try:
        memory = _kept.pop()  # at once, as another thread may want it
    except IndexError:
        memory = None
    if memory is None or memory.numel() < size:
        memory = None  # given back before more is taken
        with torch.inference_mode(False):
            memory = torch.empty(size, dtype=torch.uint8)
    try:
        yield memory[:size]
    finally:
        _kept[:] = [memory]


def new_gradient(logits: Tensor) -> Tensor:
    """Zeros of the shape of the logits, on a cache line. Where they are many, memory is not touched before it is written, so
    that rows without gradient cost nothing, and comes in large pages."""
    size = logits.numel() * logits.element_size()
    memory = np.zeros(size + 63, dtype=np.uint8)
    first = -memory.ctypes.data % 64
    return torch.from_numpy(memory[first : first + size]).view(logits.dtype).view(logits.shape)


def _rule(rule) -> tuple:
    """Fields of a ``LossRule`` as the kernels take them."""
    clip_low, clip_high, clip_dual, ratio, reduce, constant = rule[:6]
    kl_coef, kl, entropy_coef, temperature, objective, importance_cap = rule[6:]
    return (
        _float32(1 - clip_low),
        _float32(1 + clip_high),
        math.inf if clip_dual is None else clip_dual,
        _RATIOS.index(ratio),
        _REDUCE.index(reduce),
        0.0 if constant is None else constant,
        kl_coef,
        _KL.index(kl),
        entropy_coef,
        temperature,
        _OBJECTIVES.index(objective),
        -1.0 if importance_cap is None else importance_cap,
    )


def policy_loss(
    logits, grad, labels, advantages, old_logprobs, cu_seqlens, ref_logprobs, mask, rollout_logprobs, *rule,
    token_of=None,
):  # fmt: skip
    (rows, vocab), tokens = logits.shape, len(labels)
    metrics = tuple(torch.empty(shape, dtype=torch.float32) for shape in ((), (tokens,), (tokens,), (), ()))
    fits = _native.policy_loss(
        logits.data_ptr(),
        logits.stride(0),
        _address(grad),
        0 if grad is None else grad.stride(0),
        grad is not logits,
        _DTYPES.index(logits.dtype),
        rows,
        vocab,
        tokens,
        cu_seqlens.numel() - 1,
        *map(_address, (token_of, labels, advantages, old_logprobs, ref_logprobs, rollout_logprobs, mask, cu_seqlens)),
        *_rule(rule),
        *map(_address, metrics),
        torch.get_num_threads(),
    )
    if not fits:
        reference.check_rows("policy_loss", logits, labels, mask, cu_seqlens, token_of)
    return metrics


def logprobs(logits, labels, temperature, mask):
    rows, vocab = logits.shape
    values, entropy = (torch.empty(rows, dtype=torch.float32) for _ in range(2))
    fits = _native.logprobs(
        logits.data_ptr(),
        logits.stride(0),
        _DTYPES.index(logits.dtype),
        rows,
        vocab,
        _address(labels),
        _address(mask),
        temperature,
        _address(values),
        _address(entropy),
        torch.get_num_threads(),
    )
    if not fits:
        reference.check_rows("logprobs", logits, labels, mask)
    return values, entropy


# ---- the parts of a loss over chunks of rows; see capo.linear


def _head_rows(logits, labels, temperature) -> tuple:
    per_row = isinstance(temperature, Tensor)
    return (
        logits.data_ptr(),
        logits.stride(0),
        _DTYPES.index(logits.dtype),
        logits.shape[1],
        _address(labels),
        1.0 if per_row else temperature,
        _address(temperature) if per_row else 0,
        torch.get_num_threads(),
    )


def row_stats(logits, labels, temperature):
    stats = torch.empty(len(labels), 5, dtype=torch.float64)
    _native.row_stats(*_head_rows(logits, labels, temperature), len(labels), _address(stats))
    return stats


def row_logprobs(stats, dtype, temperature):
    logprobs, entropy = (torch.empty(len(stats), dtype=torch.float32) for _ in range(2))
    head = _head_rows(torch.empty(0, 0, dtype=dtype), None, temperature)
    _native.row_logprobs(*head, len(stats), *map(_address, (stats, logprobs, entropy)))
    return logprobs, entropy


def loss_terms(logprobs, entropy, advantages, old_logprobs, ref_logprobs, rollout_logprobs, weights, cu_seqlens, *rule):
    loss, kl = (torch.empty(len(logprobs), dtype=torch.float32) for _ in range(2))
    clipped, slopes = torch.empty(len(logprobs), dtype=torch.bool), torch.empty(len(logprobs), dtype=torch.float64)
    _native.loss_terms(
        *map(_address, (advantages, old_logprobs, ref_logprobs, rollout_logprobs)),
        *map(_address, (logprobs, entropy, weights, cu_seqlens)),
        len(cu_seqlens) - 1,
        *_rule(rule),
        *map(_address, (loss, kl, clipped, slopes)),
    )
    return loss, kl, clipped, slopes


def row_grads(logits, out, rows, labels, stats, slopes, entropy_slopes, temperature):
    values = map(_address, (rows, stats, slopes, entropy_slopes, out))
    _native.row_grads(*_head_rows(logits, labels, temperature), len(rows), *values)
