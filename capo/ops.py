"""The ops of capo as PyTorch sees them: schema, checks, fake and autograd, once for all backends.

Dimension key: B responses, N packed response tokens, M steps, K critiques, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from capo.backends import checks_values, kernel

if TYPE_CHECKING:
    from capo.credit import Credit, CreditRule
    from capo.losses import LossRule

_lib = torch.library.Library("capo", "FRAGMENT")
_PT2 = (torch.Tag.pt2_compliant_tag,)
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _fields(rule: CreditRule | LossRule) -> list:
    return [getattr(rule, field.name) for field in dataclasses.fields(rule)]


def _require(condition: bool, message: Callable[[], str]) -> None:
    if not condition:
        raise ValueError(message())


def _about(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


# ---- credit: votes, outcomes, steps, groups -> advantages

_lib.define(
    "credit(Tensor outcomes, Tensor votes, Tensor starts, Tensor ends, Tensor cu_steps, Tensor cu_seqlens, "
    "Tensor groups, SymInt num_tokens, str vote, float outcome_weight, float process_weight, str normalize, "
    "float std_floor, float? clamp, str reward) -> Tensor",
    tags=_PT2,
)


@torch.library.impl(_lib, "credit", "CompositeExplicitAutograd")
def _credit(outcomes, votes, starts, ends, cu_steps, cu_seqlens, groups, num_tokens, *rule):
    run = kernel("credit", outcomes.device)
    return run(outcomes, votes, starts, ends, cu_steps, cu_seqlens, groups, num_tokens, *rule)


@torch.library.register_fake("capo::credit", lib=_lib)
def _credit_fake(outcomes, votes, starts, ends, cu_steps, cu_seqlens, groups, num_tokens, *rule):
    return outcomes.new_empty((num_tokens,), dtype=torch.float32)


def credit(credit: Credit, num_tokens: int | None = None) -> Tensor:
    """Advantages of a ``Credit``. float32 [N]"""
    if num_tokens is None:
        num_tokens = int(credit.cu_seqlens[-1])
    return torch.ops.capo.credit(
        credit.outcomes.detach().to(torch.float32).contiguous(),
        credit.votes.contiguous(),
        credit.steps.starts,
        credit.steps.ends,
        credit.steps.cu_steps,
        credit.cu_seqlens.to(torch.int64).contiguous(),
        credit.groups.to(torch.int64).contiguous(),
        num_tokens,
        *_fields(credit.rule),
    )


# ---- policy_loss: logits, labels, advantages -> loss, metrics and the gradient of the logits

_POLICY_LOSS_ARGS = (
    "Tensor labels, Tensor advantages, Tensor? old_logprobs, Tensor cu_seqlens, Tensor? ref_logprobs, Tensor? mask, "
    "Tensor? rollout_logprobs, bool need_grad, float clip_low, float clip_high, float? clip_dual, str ratio, "
    "str reduce, float? constant, float kl_coef, str kl, float entropy_coef, float temperature, str objective, "
    "float? importance_cap"
)
_lib.define(
    f"policy_loss(Tensor logits, {_POLICY_LOSS_ARGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", tags=_PT2
)
_lib.define(f"policy_loss_(Tensor(a!) logits, {_POLICY_LOSS_ARGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")


@torch.library.impl(_lib, "policy_loss", "CompositeExplicitAutograd")
def _policy_loss(logits, *args):
    grad = kernel("new_gradient", logits.device)(logits) if args[7] else None
    metrics = kernel("policy_loss", logits.device)(logits, grad, *args[:7], *args[8:])
    return (*metrics, logits.new_empty(0) if grad is None else grad)


@torch.library.impl(_lib, "policy_loss_", "CompositeExplicitAutograd")
def _policy_loss_inplace(logits, *args):
    return kernel("policy_loss", logits.device)(logits, logits, *args[:7], *args[8:])


def _policy_loss_metrics_fake(logits):
    rows, scalar = (logits.shape[0],), ()
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in (scalar, rows, rows, scalar, scalar))


@torch.library.register_fake("capo::policy_loss", lib=_lib)
def _policy_loss_fake(logits, *args):
    return (*_policy_loss_metrics_fake(logits), logits.new_empty(logits.shape if args[7] else (0,)))


@torch.library.register_fake("capo::policy_loss_", lib=_lib)
def _policy_loss_inplace_fake(logits, *args):
    return _policy_loss_metrics_fake(logits)


def _policy_loss_setup(ctx, inputs, output):
    ctx.save_for_backward(output[5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _policy_loss_backward(ctx, grad_loss, *_):
    (grad_logits,) = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 21
    return (grad_logits * grad_loss, *(None,) * 20)


torch.library.register_autograd("capo::policy_loss", _policy_loss_backward, setup_context=_policy_loss_setup, lib=_lib)


class _PolicyLoss(torch.autograd.Function):
    """``policy_loss`` in eager mode: as above, but no second tensor of the size of the logits is made in the backward."""

    @staticmethod
    def forward(ctx, logits, inplace, args):
        if inplace:
            grad = logits.detach()
            output = torch.ops.capo.policy_loss_(grad, *args)
            torch.autograd.graph.increment_version(logits)
        else:
            *output, grad = torch.ops.capo.policy_loss(logits, *args)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        return tuple(output)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        (grad_logits,) = ctx.saved_tensors
        if grad_loss is None:
            return None, None, None
        if grad_loss.device.type == "cpu" and grad_loss == 1:
            return grad_logits, None, None
        return grad_logits.mul_(grad_loss), None, None


def policy_loss(
    logits, labels, advantages, old_logprobs, cu_seqlens, rule, ref_logprobs, mask, rollout_logprobs, inplace
) -> tuple[Tensor, ...]:
    """(loss, logprobs, entropy, clip_fraction, kl); see ``capo.policy_loss``."""
    _check_logits("policy_loss", logits, labels)
    _require(
        cu_seqlens.dim() == 1 and cu_seqlens.dtype in (torch.int32, torch.int64) and cu_seqlens.shape[0] > 0,
        lambda: f"policy_loss: cu_seqlens must be int32 or int64 [B + 1], got {_about(cu_seqlens)}",
    )
    if rule.kl_coef > 0:
        _require(ref_logprobs is not None, lambda: f"policy_loss: kl_coef={rule.kl_coef} needs ref_logprobs")
    else:
        ref_logprobs = None
    if rule.importance_cap is not None:
        _require(rollout_logprobs is not None, lambda: "policy_loss: importance_cap needs rollout_logprobs")
    else:
        rollout_logprobs = None
    advantages = _row_floats("policy_loss", "credit (advantages)", advantages, logits)
    old_logprobs = _row_floats("policy_loss", "old_logprobs", old_logprobs, logits)
    ref_logprobs = _row_floats("policy_loss", "ref_logprobs", ref_logprobs, logits)
    rollout_logprobs = _row_floats("policy_loss", "rollout_logprobs", rollout_logprobs, logits)
    mask = _row_mask("policy_loss", mask, logits)
    need_grad = torch.is_grad_enabled() and logits.requires_grad
    args = (
        labels.to(torch.int64).contiguous(),
        advantages,
        old_logprobs,
        cu_seqlens.to(device=logits.device, dtype=torch.int64).contiguous(),
        ref_logprobs,
        mask,
        rollout_logprobs,
        need_grad,
        *_fields(rule),
    )
    if not need_grad or torch.compiler.is_compiling():
        if inplace and need_grad:
            raise ValueError("policy_loss: inplace=True is for eager mode; leave it out under torch.compile")
        return torch.ops.capo.policy_loss(logits, *args)[:5]
    _require(
        not inplace or logits.shape[0] < 2 or logits.stride(0) >= logits.shape[1],
        lambda: f"policy_loss: inplace=True, but rows of logits overlap in memory: strides {tuple(logits.stride())}",
    )
    return _PolicyLoss.apply(logits, inplace, args)


# ---- logprobs: logits, labels -> log-probabilities and entropies, no gradient

_lib.define("logprobs(Tensor logits, Tensor labels, float temperature, Tensor? mask) -> (Tensor, Tensor)", tags=_PT2)


@torch.library.impl(_lib, "logprobs", "CompositeExplicitAutograd")
def _logprobs(logits, labels, temperature, mask):
    return kernel("logprobs", logits.device)(logits, labels, temperature, mask)


@torch.library.register_fake("capo::logprobs", lib=_lib)
def _logprobs_fake(logits, labels, temperature, mask):
    return tuple(logits.new_empty((logits.shape[0],), dtype=torch.float32) for _ in range(2))


def logprobs(logits, labels, temperature, mask) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy); see ``capo.logprobs``."""
    _check_logits("logprobs", logits, labels)
    _require(
        isinstance(temperature, float | int) and 0 < temperature < float("inf"),
        lambda: f"logprobs: temperature must be finite and above 0, got {temperature!r}",
    )
    mask = _row_mask("logprobs", mask, logits)
    return torch.ops.capo.logprobs(logits.detach(), labels.to(torch.int64).contiguous(), float(temperature), mask)


# ---- checks shared by the ops over logits


def _check_logits(op: str, logits: Tensor, labels: Tensor) -> None:
    _require(
        logits.dim() == 2 and logits.dtype in LOGIT_DTYPES,
        lambda: f"{op}: logits must be float32, bfloat16 or float16 [N, V], got {_about(logits)}",
    )
    _require(logits.shape[1] > 0, lambda: f"{op}: logits have no vocabulary: {_about(logits)}")
    _require(
        logits.stride(1) == 1 or logits.shape[1] == 1,
        lambda: (
            f"{op}: the last dimension of logits must be contiguous, got strides {tuple(logits.stride())}; "
            "call .contiguous() on them"
        ),
    )
    _require(
        labels.shape == (logits.shape[0],) and labels.dtype in (torch.int32, torch.int64),
        lambda: f"{op}: labels must be int64 [{logits.shape[0]}], got {_about(labels)}",
    )
    _require(labels.device == logits.device, lambda: f"{op}: labels are on {labels.device}, logits on {logits.device}")


def _row_floats(op: str, name: str, values: Tensor | None, logits: Tensor) -> Tensor | None:
    if values is None:
        return None
    _require(
        isinstance(values, Tensor) and values.shape == (logits.shape[0],) and values.is_floating_point(),
        lambda: (
            f"{op}: {name} must be float [{logits.shape[0]}], got "
            f"{_about(values) if isinstance(values, Tensor) else type(values).__name__}"
        ),
    )
    _require(values.device == logits.device, lambda: f"{op}: {name} is on {values.device}, logits on {logits.device}")
    return values.detach().to(torch.float32).contiguous()


def _row_mask(op: str, mask: Tensor | None, logits: Tensor) -> Tensor | None:
    if mask is None:
        return None
    given = mask  # never None, also inside the lambdas
    _require(given.shape == (logits.shape[0],), lambda: f"{op}: mask must be [{logits.shape[0]}], got {_about(given)}")
    _require(given.device == logits.device, lambda: f"{op}: mask is on {given.device}, logits on {logits.device}")
    if mask.dtype != torch.bool:
        if not torch.compiler.is_compiling() and checks_values(mask.device.type):
            other = (mask != 0) & (mask != 1)
            if bool(other.any()):
                row = int(other.nonzero()[0])
                raise ValueError(f"{op}: mask must hold 0 and 1 only, got {mask[row].item()} in row {row}")
        mask = mask != 0
    return mask.contiguous()
