"""Log-probabilities from hidden states that a loss of any kind may be made of, without their logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from capo.losses import LossRule, linear_logprobs, linear_policy_loss


def differentiable_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, bias: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """``capo.linear_logprobs`` with a gradient of the log-probabilities (of the entropies there is none). [N], [N]

    The backward makes the logits again, those of tokens with gradient 0 left out: four matrix products for a live token,
    where ``capo.linear_policy_loss`` needs three.

    Args:
        hidden, weight, labels, temperature, bias: as of ``capo.linear_logprobs``.
        options: softcap, vocab_size, chunk_bytes.
    """
    return _Logprobs.apply(hidden, weight, bias, labels, temperature, options)


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, temperature, options):
        ctx.save_for_backward(hidden, weight, bias, labels)
        device = hidden.device.type
        ctx.autocast = {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}
        ctx.temperature, ctx.options = temperature, options
        logprobs, entropy = linear_logprobs(hidden, weight, labels, temperature, bias=bias, **options)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slopes, _):
        hidden, weight, bias, labels = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        leaves = [
            None if x is None else x.detach().requires_grad_(need)
            for x, need in zip((hidden, weight, bias), needed, strict=True)
        ]
        # On-policy and summed up, the loss has the derivative -credit by a log-probability.
        rule = LossRule(reduce="constant", constant=1.0, temperature=ctx.temperature)
        cu_seqlens = torch.tensor([0, len(labels)], device=labels.device)
        with torch.enable_grad(), torch.autocast(hidden.device.type, **ctx.autocast):
            loss = linear_policy_loss(
                leaves[0], leaves[1], labels, -slopes, None, cu_seqlens, rule, bias=leaves[2], **ctx.options
            ).loss
            wanted = [x for x in leaves if x is not None and x.requires_grad]
            found = iter(torch.autograd.grad(loss, wanted))
        grads = [next(found) if x is not None and x.requires_grad else None for x in leaves]
        return *grads, None, None, None
