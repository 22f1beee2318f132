"""The ops of capo as PyTorch sees them: schema, checks, fake and autograd, once for all backends.

Dimension key: B responses, N packed response tokens, M steps, K critiques, V vocabulary, H hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from capo.backends import backend_with, checks_values, kernel

if TYPE_CHECKING:
    from capo.credit import Credit, CreditRule
    from capo.losses import LossRule

_lib = torch.library.Library("capo", "FRAGMENT")
_PT2 = (torch.Tag.pt2_compliant_tag,)
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK_BYTES = 1 << 30


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
    return torch.ops.capo.credit(*_credit_tensors(credit), num_tokens, *_fields(credit.rule))


def _credit_tensors(credit: Credit, cu_seqlens: Tensor | None = None) -> list[Tensor]:
    """The tensors of a ``Credit`` as the ops take them, with its ``cu_seqlens`` where they were made ready before."""
    if cu_seqlens is None:
        cu_seqlens = credit.cu_seqlens.to(torch.int64).contiguous()
    return [
        credit.outcomes.detach().to(torch.float32).contiguous(),
        credit.votes.contiguous(),
        credit.steps.starts,
        credit.steps.ends,
        credit.steps.cu_steps,
        cu_seqlens,
        credit.groups.to(torch.int64).contiguous(),
    ]


# ---- policy_loss: logits, labels, advantages or a credit -> loss, metrics and the gradient of the logits

_VALUE_ARGS = "Tensor? old_logprobs, Tensor cu_seqlens, Tensor? ref_logprobs, Tensor? mask, Tensor? rollout_logprobs"
_TOKEN_ARGS = f"Tensor labels, Tensor advantages, {_VALUE_ARGS}"
_RULE_ARGS = (
    "float clip_low, float clip_high, float? clip_dual, str ratio, str reduce, float? constant, float kl_coef, str kl, "
    "float entropy_coef, float temperature, str objective, float? importance_cap"
)
_CREDIT_ARGS = (
    "Tensor? outcomes=None, Tensor? votes=None, Tensor? starts=None, Tensor? ends=None, Tensor? cu_steps=None, "
    "Tensor? credit_cu_seqlens=None, Tensor? groups=None, str vote='', float outcome_weight=0, float process_weight=0, "
    "str normalize='', float std_floor=0, float? clamp=None, str reward=''"
)
# Either advantages or the tensors of a credit and its rule.
_POLICY_LOSS_ARGS = (
    f"Tensor labels, Tensor? advantages, {_VALUE_ARGS}, bool need_grad, {_RULE_ARGS}, "
    f"Tensor? token_of=None, {_CREDIT_ARGS}"
)
_lib.define(
    f"policy_loss(Tensor logits, {_POLICY_LOSS_ARGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", tags=_PT2
)
_lib.define(f"policy_loss_(Tensor(a!) logits, {_POLICY_LOSS_ARGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")


def _same_memory(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.data_ptr() == y.data_ptr()


def _policy_loss_into(
    grad, logits, labels, advantages, old_logprobs, cu_seqlens, ref_logprobs, mask, rollout_logprobs, need_grad, *rules
):
    # Where all else is left out, PyTorch leaves out the token_of of None, too.
    rule, (token_of, *credit) = rules[:12], rules[12:] or (None,)
    values = old_logprobs, cu_seqlens, ref_logprobs, mask, rollout_logprobs, *rule
    if advantages is None:
        tensors, credit_rule = credit[:7], credit[7:]
        backend = backend_with("policy_loss_of_credit", logits.device)
        if backend is not None and _same_memory(tensors[5], cu_seqlens):
            run = backend.policy_loss_of_credit
            return run(tensors, credit_rule, logits, grad, labels, *values, token_of=token_of)
        advantages = kernel("credit", logits.device)(*tensors, labels.shape[0], *credit_rule)
    run = kernel("policy_loss", logits.device)
    return run(logits, grad, labels, advantages, *values, token_of=token_of)


@torch.library.impl(_lib, "policy_loss", "CompositeExplicitAutograd")
def _policy_loss(logits, *args):
    grad = kernel("new_gradient", logits.device)(logits) if args[7] else None
    return (*_policy_loss_into(grad, logits, *args), logits.new_empty(0) if grad is None else grad)


@torch.library.impl(_lib, "policy_loss_", "CompositeExplicitAutograd")
def _policy_loss_inplace(logits, *args):
    return _policy_loss_into(logits, logits, *args)


def _policy_loss_metrics_fake(of_tokens):
    tokens, scalar = (of_tokens.shape[0],), ()
    return tuple(of_tokens.new_empty(shape, dtype=torch.float32) for shape in (scalar, tokens, tokens, scalar, scalar))


@torch.library.register_fake("capo::policy_loss", lib=_lib)
def _policy_loss_fake(logits, *args):
    return (*_policy_loss_metrics_fake(args[0]), logits.new_empty(logits.shape if args[7] else (0,)))


@torch.library.register_fake("capo::policy_loss_", lib=_lib)
def _policy_loss_inplace_fake(logits, *args):
    return _policy_loss_metrics_fake(args[0])


def _policy_loss_setup(ctx, inputs, output):
    ctx.save_for_backward(output[5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _policy_loss_backward(ctx, grad_loss, *_):
    (grad_logits,) = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 36
    return (grad_logits * grad_loss, *(None,) * 35)


torch.library.register_autograd("capo::policy_loss", _policy_loss_backward, setup_context=_policy_loss_setup, lib=_lib)


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """The gradient times what comes from above, in its memory; nothing is read if that is 1."""
    if factor.device.type == "cpu":
        return grad if factor == 1 else grad.mul_(factor)
    backend = backend_with("scale_", factor.device)
    if backend is None or not grad.is_contiguous():
        return grad.mul_(factor)
    backend.scale_(grad, factor)
    torch.autograd.graph.increment_version(grad)
    return grad


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
        return _scaled(grad_logits, grad_loss), None, None


def policy_loss(
    logits, labels, advantages, old_logprobs, cu_seqlens, rule, ref_logprobs, mask, rollout_logprobs, inplace, credit,
    token_of,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(loss, logprobs, entropy, clip_fraction, kl); see ``capo.policy_loss``. One of advantages and credit is None."""
    if token_of is None:
        _check_logits("policy_loss", logits, labels)
    else:
        token_of = _token_of("policy_loss", token_of, logits, labels, rule)
    _require(advantages is not None or credit is not None, lambda: "policy_loss: credit is None")
    tokens = _token_args(
        "policy_loss", labels, labels, advantages, old_logprobs, cu_seqlens, rule, ref_logprobs, mask, rollout_logprobs
    )
    need_grad = torch.is_grad_enabled() and logits.requires_grad
    args = (*tokens, need_grad, *_fields(rule), token_of)
    if credit is not None:
        _require(
            credit.outcomes.device == logits.device,
            lambda: f"policy_loss: credit is on {credit.outcomes.device}, logits on {logits.device}",
        )
        same = tokens[3] if credit.cu_seqlens is cu_seqlens else None
        args = (*args, *_credit_tensors(credit, same), *_fields(credit.rule))
    if not need_grad or torch.compiler.is_compiling():
        if inplace and need_grad:
            raise ValueError("policy_loss: inplace=True is for eager mode; leave it out under torch.compile")
        return torch.ops.capo.policy_loss(logits, *args)[:5]
    _require(
        not inplace or logits.shape[0] < 2 or logits.stride(0) >= logits.shape[1],
        lambda: f"policy_loss: inplace=True, but rows of logits overlap in memory: strides {tuple(logits.stride())}",
    )
    return _PolicyLoss.apply(logits, inplace, args)


def live_rows(advantages, rule, mask) -> Tensor:
    """See ``capo.live_rows``."""
    op = "live_rows"
    _check_compact(op, rule)
    _require(
        isinstance(advantages, Tensor) and advantages.dim() == 1 and advantages.is_floating_point(),
        lambda: (
            f"{op}: credit (advantages) must be float [N], got "
            f"{_about(advantages) if isinstance(advantages, Tensor) else type(advantages).__name__}"
        ),
    )
    mask = _row_mask(op, mask, advantages)
    live = advantages != 0 if rule.kl_coef == 0 and rule.entropy_coef == 0 else torch.ones_like(advantages).bool()
    return (live if mask is None else live & mask).nonzero()[:, 0]


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


# ---- linear_policy_loss: hidden states and the weight of the head -> loss, metrics and gradients; no [N, V]

_HEAD_ARGS = "Tensor hidden, Tensor weight, Tensor? bias"
_HEAD_OPTIONS = "float? softcap, SymInt? vocab_size, SymInt chunk_bytes, str? group, SymInt? num_live"
_lib.define(
    f"linear_policy_loss({_HEAD_ARGS}, {_TOKEN_ARGS}, Tensor? row_temperature, bool[3] need_grad, {_HEAD_OPTIONS}, "
    f"{_RULE_ARGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_PT2,
)


@torch.library.impl(_lib, "linear_policy_loss", "CompositeExplicitAutograd")
def _linear_policy_loss(hidden, weight, bias, *args):
    from capo import linear

    *metrics, grad_hidden, grad_weight, grad_bias = linear.policy_loss(hidden, weight, bias, *args)
    return *metrics, *(hidden.new_empty(0) if x is None else x for x in (grad_hidden, grad_weight, grad_bias))


@torch.library.register_fake("capo::linear_policy_loss", lib=_lib)
def _linear_policy_loss_fake(hidden, weight, bias, *args):
    leaves = zip((hidden, weight, bias), args[8], strict=True)
    grads = (hidden.new_empty(0) if not needed else x.new_empty(x.shape) for x, needed in leaves)
    return *_policy_loss_metrics_fake(hidden), *grads


def _linear_policy_loss_setup(ctx, inputs, output):
    ctx.save_for_backward(*output[5:])
    ctx.need_grad = inputs[11]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _linear_policy_loss_backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 29
    pairs = zip(ctx.saved_tensors, ctx.need_grad, strict=True)
    return *(grad * grad_loss if needed else None for grad, needed in pairs), *(None,) * 26


torch.library.register_autograd(
    "capo::linear_policy_loss", _linear_policy_loss_backward, setup_context=_linear_policy_loss_setup, lib=_lib
)


class _LinearPolicyLoss(torch.autograd.Function):
    """``linear_policy_loss`` in eager mode: as above, but no second gradient of the weight is made in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, args):
        *output, grad_hidden, grad_weight, grad_bias = torch.ops.capo.linear_policy_loss(hidden, weight, bias, *args)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.need_grad = args[8]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        return tuple(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return None, None, None, None
        grads = [grad if needed else None for grad, needed in zip(ctx.saved_tensors, ctx.need_grad, strict=True)]
        return *(None if grad is None else _scaled(grad, grad_loss) for grad in grads), None


def linear_policy_loss(
    hidden, weight, labels, advantages, old_logprobs, cu_seqlens, rule, ref_logprobs, mask, rollout_logprobs, bias,
    temperature, softcap, vocab_size, chunk_bytes, group, num_live,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(loss, logprobs, entropy, clip_fraction, kl); see ``capo.linear_policy_loss``."""
    op = "linear_policy_loss"
    hidden, weight, bias = _head(op, hidden, weight, bias, labels)
    tokens = _token_args(
        op, hidden, labels, advantages, old_logprobs, cu_seqlens, rule, ref_logprobs, mask, rollout_logprobs
    )
    row_temperature = _row_temperature(op, temperature, hidden)
    _require(
        temperature is None or rule.temperature == 1,
        lambda: f"{op}: temperature of each row and rule.temperature={rule.temperature}; leave one of them out",
    )
    options = _head_options(op, hidden, weight, softcap, vocab_size, chunk_bytes, group, num_live)
    grad_mode = torch.is_grad_enabled()
    need_grad = [grad_mode and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    args = (*tokens, row_temperature, need_grad, *options, *_fields(rule))
    if not any(need_grad) or torch.compiler.is_compiling():
        return torch.ops.capo.linear_policy_loss(hidden, weight, bias, *args)[:5]
    return _LinearPolicyLoss.apply(hidden, weight, bias, args)


# ---- linear_logprobs: hidden states and the weight of the head -> log-probabilities and entropies, no gradient

_lib.define(
    f"linear_logprobs({_HEAD_ARGS}, Tensor labels, Tensor? mask, Tensor? row_temperature, float temperature, "
    f"{_HEAD_OPTIONS}) -> (Tensor, Tensor)",
    tags=_PT2,
)


@torch.library.impl(_lib, "linear_logprobs", "CompositeExplicitAutograd")
def _linear_logprobs(hidden, *args):
    from capo import linear

    return linear.logprobs(hidden, *args)


@torch.library.register_fake("capo::linear_logprobs", lib=_lib)
def _linear_logprobs_fake(hidden, *args):
    return tuple(hidden.new_empty((hidden.shape[0],), dtype=torch.float32) for _ in range(2))


def linear_logprobs(
    hidden, weight, labels, temperature, mask, bias, softcap, vocab_size, chunk_bytes, group, num_live
) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy); see ``capo.linear_logprobs``."""
    op = "linear_logprobs"
    hidden, weight, bias = _head(op, hidden, weight, bias, labels)
    per_row = isinstance(temperature, Tensor)
    row_temperature = _row_temperature(op, temperature if per_row else None, hidden)
    scalar = 1.0 if per_row else temperature
    _require(
        isinstance(scalar, float | int) and 0 < scalar < float("inf"),
        lambda: f"{op}: temperature must be finite and above 0, got {temperature!r}",
    )
    mask = _row_mask(op, mask, hidden)
    options = _head_options(op, hidden, weight, softcap, vocab_size, chunk_bytes, group, num_live)
    with torch.no_grad():
        return torch.ops.capo.linear_logprobs(
            hidden.detach(), weight.detach(), None if bias is None else bias.detach(),
            labels.to(torch.int64).contiguous(), mask, row_temperature, float(scalar), *options,
        )  # fmt: skip


# ---- checks shared by the ops


def _check_logits(op: str, logits: Tensor, labels: Tensor) -> None:
    _check_matrix(op, logits)
    _check_rows_labels(op, logits, labels, "logits")


def _check_matrix(op: str, logits: Tensor) -> None:
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


def _token_of(op: str, rows: Tensor, logits: Tensor, labels: Tensor, rule: LossRule) -> Tensor:
    """The tokens whose logits are there, as the op takes them; logits and labels are checked as well."""
    _check_matrix(op, logits)
    _require(labels.dim() == 1, lambda: f"{op}: labels must be int64 [N], got {_about(labels)}")
    _check_rows_labels(op, labels, labels, "logits")
    _require(labels.device == logits.device, lambda: f"{op}: labels are on {labels.device}, logits on {logits.device}")
    _require(
        rows.shape == (logits.shape[0],) and rows.dtype in (torch.int32, torch.int64),
        lambda: f"{op}: rows must be int64 [{logits.shape[0]}], one for each row of logits, got {_about(rows)}",
    )
    _require(rows.device == logits.device, lambda: f"{op}: rows are on {rows.device}, logits on {logits.device}")
    _check_compact(op, rule)
    return rows.to(torch.int64).contiguous()


def _check_compact(op: str, rule: LossRule) -> None:
    _require(
        rule.ratio == "token",
        lambda: f"{op}: rows of some tokens only need ratio='token'; ratio={rule.ratio!r} reads whole responses",
    )


def _token_args(
    op, rows, labels, advantages, old_logprobs, cu_seqlens, rule, ref_logprobs, mask, rollout_logprobs
) -> tuple[Tensor | None, ...]:
    """The values of each token, checked, as the ops take them; ``rows`` has their number and device."""
    _require(
        cu_seqlens.dim() == 1 and cu_seqlens.dtype in (torch.int32, torch.int64) and cu_seqlens.shape[0] > 0,
        lambda: f"{op}: cu_seqlens must be int32 or int64 [B + 1], got {_about(cu_seqlens)}",
    )
    if rule.kl_coef > 0:
        _require(ref_logprobs is not None, lambda: f"{op}: kl_coef={rule.kl_coef} needs ref_logprobs")
    else:
        ref_logprobs = None
    if rule.importance_cap is not None:
        _require(rollout_logprobs is not None, lambda: f"{op}: importance_cap needs rollout_logprobs")
    else:
        rollout_logprobs = None
    return (
        labels.to(torch.int64).contiguous(),
        _row_floats(op, "credit (advantages)", advantages, rows),
        _row_floats(op, "old_logprobs", old_logprobs, rows),
        cu_seqlens.to(device=rows.device, dtype=torch.int64).contiguous(),
        _row_floats(op, "ref_logprobs", ref_logprobs, rows),
        _row_mask(op, mask, rows),
        _row_floats(op, "rollout_logprobs", rollout_logprobs, rows),
    )


def _head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> list:
    """Hidden states, weight and bias, checked, in the type that autocast wants."""
    device = hidden.device.type
    wanted = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    head = [_head_tensor(op, *named, wanted) for named in (("hidden", hidden), ("weight", weight))]
    hidden, weight = head
    _require(
        hidden.dim() == 2 and hidden.dtype in LOGIT_DTYPES,
        lambda: f"{op}: hidden must be float32, bfloat16 or float16 [N, H], got {_about(hidden)}",
    )
    _require(
        weight.dim() == 2 and weight.shape[0] > 0 and weight.shape[1] == hidden.shape[1],
        lambda: f"{op}: weight must be [V, {hidden.shape[1]}] with V > 0, got {_about(weight)}",
    )
    _require_like(op, "weight", weight, hidden)
    _check_rows_labels(op, hidden, labels, "hidden")
    if bias is None:
        return [*head, None]
    given = _head_tensor(op, "bias", bias, wanted)
    _require(given.shape == (weight.shape[0],), lambda: f"{op}: bias must be [{weight.shape[0]}], got {_about(given)}")
    _require_like(op, "bias", given, hidden)
    return [*head, given]


def _head_tensor(op: str, name: str, x: Tensor, wanted: torch.dtype | None) -> Tensor:
    _require(
        not hasattr(x, "device_mesh"),
        lambda: (
            f"{op}: {name} must be a plain tensor, got {type(x).__name__}; of a DTensor give full_tensor() or, for "
            "a weight sharded over the vocabulary, to_local() with group=<its process group>"
        ),
    )
    return x if wanted is None or x.dtype not in LOGIT_DTYPES else x.to(wanted)


def _require_like(op: str, name: str, x: Tensor, hidden: Tensor) -> None:
    _require(
        x.dtype == hidden.dtype and x.device == hidden.device,
        lambda: f"{op}: {name} must have the dtype and device of hidden, {_about(hidden)}, got {_about(x)}",
    )


def _head_options(op, hidden, weight, softcap, vocab_size, chunk_bytes, group, num_live) -> tuple:
    _require(
        softcap is None or 0 < softcap < float("inf"),
        lambda: f"{op}: softcap must be finite and above 0, or None, got {softcap!r}",
    )
    if group is None:
        _require(
            vocab_size is None or 0 < vocab_size <= weight.shape[0],
            lambda: f"{op}: vocab_size must be 1 to {weight.shape[0]}, or None, got {vocab_size!r}",
        )
    _require(chunk_bytes > 0, lambda: f"{op}: chunk_bytes must be above 0, got {chunk_bytes!r}")
    _require(
        num_live is None or 0 <= num_live <= hidden.shape[0],
        lambda: f"{op}: num_live must be 0 to {hidden.shape[0]}, or None, got {num_live!r}",
    )
    return (
        None if softcap is None else float(softcap),
        vocab_size,
        chunk_bytes,
        None if group is None else group.group_name,
        num_live,
    )


def _row_temperature(op: str, temperature: Tensor | None, rows: Tensor) -> Tensor | None:
    values = _row_floats(op, "temperature", temperature, rows)
    if values is not None and values.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~((values > 0) & values.isfinite())
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(f"{op}: temperature must be finite and above 0, got {values[row].item()} in row {row}")
    return values


def _check_rows_labels(op: str, rows: Tensor, labels: Tensor, name: str) -> None:
    _require(
        labels.shape == (rows.shape[0],) and labels.dtype in (torch.int32, torch.int64),
        lambda: f"{op}: labels must be int64 [{rows.shape[0]}], got {_about(labels)}",
    )
    _require(labels.device == rows.device, lambda: f"{op}: labels are on {labels.device}, {name} on {rows.device}")


def _row_floats(op: str, name: str, values: Tensor | None, rows: Tensor) -> Tensor | None:
    if values is None:
        return None
    _require(
        isinstance(values, Tensor) and values.shape == (rows.shape[0],) and values.is_floating_point(),
        lambda: (
            f"{op}: {name} must be float [{rows.shape[0]}], got "
            f"{_about(values) if isinstance(values, Tensor) else type(values).__name__}"
        ),
    )
    _require(values.device == rows.device, lambda: f"{op}: {name} is on {values.device}, the rows on {rows.device}")
    return values.detach().to(torch.float32).contiguous()


def _row_mask(op: str, mask: Tensor | None, rows: Tensor) -> Tensor | None:
    if mask is None:
        return None
    given = mask  # never None, also inside the lambdas
    _require(given.shape == (rows.shape[0],), lambda: f"{op}: mask must be [{rows.shape[0]}], got {_about(given)}")
    _require(given.device == rows.device, lambda: f"{op}: mask is on {given.device}, the rows on {rows.device}")
    if mask.dtype != torch.bool:
        if not torch.compiler.is_compiling() and checks_values(mask.device.type):
            other = (mask != 0) & (mask != 1)
            if bool(other.any()):
                row = int(other.nonzero()[0])
                raise ValueError(f"{op}: mask must hold 0 and 1 only, got {mask[row].item()} in row {row}")
        mask = mask != 0
    return mask.contiguous()
