"""Denominators of an update that is spread over micro-batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from capo.losses import LossRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def loss_shares(
    rule: LossRule,
    micro_batches: Sequence[tuple[Tensor, Tensor | None]],
    group: ProcessGroup | None = None,
) -> Tensor:
    """What to multiply the loss of each micro-batch by, so that the update is that of one large batch.

    A policy loss divides by the tokens or responses that it sees. With all micro-batches of all processes in view::

        shares = capo.loss_shares(rule, [(batch.cu_seqlens, batch.mask) for batch in batches], group)
        for batch, share in zip(batches, shares):
            (capo.policy_loss(...).loss * share).backward()

    the gradients add up to those of the whole: the share is the micro-batch's part of all unmasked tokens (``token_mean``)
    or of all responses (``sequence_mean``), or 1 (``constant``), times the number of processes, because DDP and FSDP take
    the mean of the gradients over them. The sum of ``loss * share`` over the micro-batches, averaged over the processes,
    is the loss of the whole.

    Args:
        rule: only ``rule.reduce`` matters.
        micro_batches: ``cu_seqlens`` and ``mask`` of each on this process, as ``policy_loss`` takes them; at least one, as
            each process takes part in the backward.
        group: the data-parallel processes, all of which must call; None: this process alone.

    Returns:
        float32 [number of micro-batches], on the device of ``cu_seqlens``; one number is summed over the processes.

    Raises:
        ValueError: no micro-batch.
    """
    if not micro_batches:
        raise ValueError("loss_shares: no micro-batch; a process without tokens needs one with a mask of False")
    processes = 1 if group is None else group.size()
    if rule.reduce == "constant":
        return torch.full((len(micro_batches),), float(processes), device=micro_batches[0][0].device)
    counts = torch.stack([_items(rule, *micro_batch) for micro_batch in micro_batches])
    total = counts.sum()
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return (counts.double() * processes / total.clamp(min=1)).float()


def _items(rule: LossRule, cu_seqlens: Tensor, mask: Tensor | None) -> Tensor:
    """How many things the reduction takes the mean of. int64, 0-dim"""
    if rule.reduce == "sequence_mean":
        return torch.tensor(len(cu_seqlens) - 1, device=cu_seqlens.device)
    return cu_seqlens[-1].long() if mask is None else (mask != 0).sum()
