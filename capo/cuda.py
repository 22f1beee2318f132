"""The CUDA C++ kernels for GPU tensors: hands addresses, sizes and the current stream to ``capo._native.cuda``; the functions
of a backend.

Nothing here waits for the device, and everything can be captured in a CUDA graph. Values are not checked unless
``CAPO_CHECK=1``: what does not fit gives NaN.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from capo import _native, native, reference
from capo.backends import checks_values

_module: Any = getattr(_native, "cuda", None)
FORMS = ("chosen", "on chip", "two passes", "in steps")
_form = "chosen"  # of policy_loss; the bits do not depend on it


def architectures() -> tuple[str, ...]:
    """What the kernels were built for: ``90a-real`` is code for that architecture, ``100-virtual`` is made into code for it and
    all later ones by the driver; empty: the module was built without CUDA."""
    return () if _module is None else tuple(_module.architectures.split(","))


def built_for(capability: tuple[int, int]) -> bool:
    """Whether one of them serves a device of this compute capability."""
    for architecture in architectures():
        number, _, kind = architecture.partition("-")
        own = number.endswith(("a", "f"))
        number = number.rstrip("af")
        built = int(number[:-1]), int(number[-1])
        if capability == built or (not own and (kind == "virtual" or capability[0] == built[0]) and capability > built):
            return True
    return False


def why_not() -> str | None:
    """Why the kernels cannot run on this machine's GPUs; None if they can."""
    if _module is None:
        return "the native module was built without CUDA kernels; reinstall with nvcc and CAPO_CUDA=on"
    if torch.version.hip is not None:
        return "the CUDA kernels do not run on AMD GPUs"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not built_for(capability):
            number = ".".join(map(str, capability))
            return (
                f"the CUDA kernels are built for {', '.join(architectures())}, GPU {index} has {number}; set CUDAARCHS"
            )
    return None


def _call(name: str, tensor: Tensor, *arguments) -> None:
    """Launch on the device of the tensor and the stream that is current there."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            error = getattr(_module, name)(*arguments, torch.cuda.current_stream().cuda_stream)
    else:  # the kernels run on the CPU, in the tests
        error = getattr(_module, name)(*arguments, 0)
    if error:
        raise RuntimeError(f"{name}: CUDA: {_module.error_text(error)}")


def _credit_args(layout, groups, advantages, rule):
    """A credit as the kernels take it. Tensors: ``layout`` without groups, and where the advantages go."""
    vote, outcome_weight, process_weight, normalize, std_floor, clamp, reward = rule
    if checks_values(advantages.device.type):
        reference.check_credit(*layout, len(advantages))
    outcomes, votes, starts = layout[:3]
    return _module.Credit(
        *map(native._address, (*layout, groups, advantages)),
        outcomes.numel(),
        starts.numel(),
        votes.shape[1],
        len(advantages),
        native._VOTES.index(vote),
        outcome_weight,
        process_weight,
        native._NORMALIZE.index(normalize),
        std_floor,
        math.inf if clamp is None else clamp,
        native._REWARDS.index(reward),
    )


def credit(outcomes, votes, starts, ends, cu_steps, cu_seqlens, groups, num_tokens, *rule):
    advantages = torch.empty(num_tokens, dtype=torch.float32, device=outcomes.device)
    args = _credit_args((outcomes, votes, starts, ends, cu_steps, cu_seqlens), groups, advantages, rule)
    if outcomes.numel() == 0:
        return advantages.fill_(math.nan)
    _call("credit", outcomes, args)
    return advantages


@contextlib.contextmanager
def workspace(size: int, device: torch.device) -> Iterator[Tensor]:
    """Some bytes of memory with anything in them; PyTorch keeps what was given back."""
    yield torch.empty(size, dtype=torch.uint8, device=device)


def new_gradient(logits: Tensor) -> Tensor:
    """Memory for the gradient: ``policy_loss`` writes all of it."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def policy_loss(
    logits, grad, labels, advantages, old_logprobs, cu_seqlens, ref_logprobs, mask, rollout_logprobs, *rule,
    token_of=None, credit=None,
):  # fmt: skip
    (rows, vocab), tokens = logits.shape, len(labels)
    if checks_values(logits.device.type):
        reference.check_rows("policy_loss", logits, labels, mask, cu_seqlens, token_of)
    new = functools.partial(torch.empty, dtype=torch.float32, device=logits.device)
    # Tokens without a row of logits are visited by nobody.
    each = new if token_of is None else functools.partial(torch.zeros, dtype=torch.float32, device=logits.device)
    metrics = new(()), each(tokens), each(tokens), new(()), new(())
    memory = []

    def give(size: int) -> int:
        memory.append(torch.empty(size, dtype=torch.uint8, device=logits.device))
        return memory[0].data_ptr()

    _call(
        "policy_loss",
        logits,
        logits.data_ptr(),
        logits.stride(0),
        native._address(grad),
        0 if grad is None else grad.stride(0),
        native._DTYPES.index(logits.dtype),
        rows,
        vocab,
        tokens,
        cu_seqlens.numel() - 1,
        *map(
            native._address,
            (token_of, labels, advantages, old_logprobs, ref_logprobs, rollout_logprobs, mask, cu_seqlens),
        ),
        *native._rule(rule),
        *map(native._address, metrics),
        credit,
        FORMS.index(_form),
        give,
    )
    return metrics


def policy_loss_of_credit(credit, credit_rule, logits, grad, labels, old_logprobs, cu_seqlens, *args, token_of=None):
    """``policy_loss`` of a credit that has the same ``cu_seqlens``: its advantages are made in the launch that weighs the
    tokens. ``args``: as of ``policy_loss``."""
    *layout, groups = credit
    advantages = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    made = _credit_args(layout, groups, advantages, credit_rule)
    return policy_loss(
        logits, grad, labels, advantages, old_logprobs, cu_seqlens, *args, token_of=token_of, credit=made
    )


def logprobs(logits, labels, temperature, mask):
    rows = len(logits)
    if checks_values(logits.device.type):
        reference.check_rows("logprobs", logits, labels, mask)
    values, entropy = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    memory = _tiles(logits, rows)
    _call(
        "logprobs",
        logits,
        *_head(logits, labels, rows, temperature)[:-1],
        *map(native._address, (mask, memory, values, entropy)),
    )
    return values, entropy


# ---- the parts of a loss over chunks of rows; see capo.linear


def _tiles(logits: Tensor, rows: int) -> Tensor:
    return torch.empty(_module.size_of_tiles(rows, logits.shape[1]), dtype=torch.uint8, device=logits.device)


def _head(logits, labels, rows, temperature) -> tuple:
    """Arguments that most functions begin with, the temperatures of the rows at last."""
    per_row = isinstance(temperature, Tensor)
    return (
        logits.data_ptr(),
        logits.stride(0),
        native._DTYPES.index(logits.dtype),
        rows,
        logits.shape[1],
        native._address(labels),
        1.0 if per_row else temperature,
        native._address(temperature) if per_row else 0,
    )


def row_stats(logits, labels, temperature):
    rows = len(labels)
    stats = torch.empty(rows, 5, dtype=torch.float64, device=logits.device)
    memory = _tiles(logits, rows)
    _call("row_stats", logits, *_head(logits, labels, rows, temperature), *map(native._address, (memory, stats)))
    return stats


def row_logprobs(stats, dtype, temperature):
    logprobs, entropy = (torch.empty(len(stats), dtype=torch.float32, device=stats.device) for _ in range(2))
    head = _head(torch.empty(0, 0, dtype=dtype, device=stats.device), None, len(stats), temperature)
    _call("row_logprobs", stats, *head, *map(native._address, (stats, logprobs, entropy)))
    return logprobs, entropy


def loss_terms(logprobs, entropy, advantages, old_logprobs, ref_logprobs, rollout_logprobs, weights, cu_seqlens, *rule):
    rows = len(logprobs)
    loss, kl = (torch.empty_like(logprobs) for _ in range(2))
    clipped = torch.empty(rows, dtype=torch.bool, device=logprobs.device)
    slopes = torch.empty(rows, dtype=torch.float64, device=logprobs.device)
    _call(
        "loss_terms",
        logprobs,
        *map(native._address, (advantages, old_logprobs, ref_logprobs, rollout_logprobs)),
        *map(native._address, (logprobs, entropy, weights, cu_seqlens)),
        rows,
        len(cu_seqlens) - 1,
        *native._rule(rule),
        *map(native._address, (loss, kl, clipped, slopes)),
    )
    return loss, kl, clipped, slopes


def row_grads(logits, out, rows, labels, stats, slopes, entropy_slopes, temperature):
    head = _head(logits, labels, len(labels), temperature)
    values = map(native._address, (rows, stats, slopes, entropy_slopes, out))
    _call("row_grads", logits, *head, len(rows), *values, out.stride(0))
