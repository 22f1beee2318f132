"""Policy loss and log-probabilities from hidden states: the logits are made and used up in chunks of rows."""

from __future__ import annotations

from capo.backends import kernel

CHUNK_BYTES = 1 << 30


def policy_loss(hidden, weight, bias, *args):
    """Loss, metrics and gradients of hidden, weight and bias, None if not needed; see ``capo.linear_policy_loss``."""
    *tokens, row_temperature, need_grad, softcap, vocab_size, _, group = args[:13]
    if group is not None:
        raise ValueError("linear_policy_loss: group is not there yet")
    run = kernel("linear_policy_loss", hidden.device)
    return run(hidden, weight, bias, *tokens, row_temperature, need_grad, softcap, vocab_size, *args[13:])


def logprobs(hidden, weight, bias, *args):
    """Log-probabilities and entropies; see ``capo.linear_logprobs``."""
    if args[7] is not None:
        raise ValueError("linear_logprobs: group is not there yet")
    return kernel("linear_logprobs", hidden.device)(hidden, weight, bias, *args[:6])
