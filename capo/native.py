"""The C++ kernels for CPU tensors: hands addresses and sizes to ``capo._native``; the functions of a backend."""

from __future__ import annotations

import math

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


def credit(outcomes, votes, starts, ends, cu_steps, cu_seqlens, groups, num_tokens, *rule):
    vote, outcome_weight, process_weight, normalize, std_floor, clamp, reward = rule
    advantages = torch.empty(num_tokens, dtype=torch.float32)
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


def new_gradient(logits: Tensor) -> Tensor:
    """Zeros of the shape of the logits, on a cache line. Where they are many, memory is not touched before it is written,
    so that rows without gradient cost nothing."""
    size = logits.element_size()
    memory = np.zeros(logits.numel() * size + 63, dtype=np.uint8)
    first = -memory.ctypes.data % 64
    return torch.from_numpy(memory[first : first + logits.numel() * size]).view(logits.dtype).view(logits.shape)


def policy_loss(
    logits, grad, labels, advantages, old_logprobs, cu_seqlens, ref_logprobs, mask, rollout_logprobs, *rule
):
    clip_low, clip_high, clip_dual, ratio, reduce, constant = rule[:6]
    kl_coef, kl, entropy_coef, temperature, objective, importance_cap = rule[6:]
    rows, vocab = logits.shape
    metrics = tuple(torch.empty(shape, dtype=torch.float32) for shape in ((), (rows,), (rows,), (), ()))
    fits = _native.policy_loss(
        logits.data_ptr(),
        logits.stride(0),
        _address(grad),
        0 if grad is None else grad.stride(0),
        grad is not logits,
        _DTYPES.index(logits.dtype),
        rows,
        vocab,
        cu_seqlens.numel() - 1,
        *map(_address, (labels, advantages, old_logprobs, ref_logprobs, rollout_logprobs, mask, cu_seqlens)),
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
        *map(_address, metrics),
        torch.get_num_threads(),
    )
    if not fits:
        reference.check_rows("policy_loss", logits, labels, mask, cu_seqlens)
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


linear_policy_loss, linear_logprobs = reference.linear_policy_loss, reference.linear_logprobs
