"""The optimiser steps of one update: minibatches of whole prompts, micro-batches of any size, one gradient.

Dimension key: B responses of one update, N packed response tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import capo
from capo.config import TrainConfig
from capo.rollout import Rollouts, response_logits


@dataclass(frozen=True, eq=False)
class Batch:
    """What one update learns from; see `Rollouts` for the layout."""

    rollouts: Rollouts
    advantages: Tensor  # [N]
    old_logprobs: Tensor  # [N]
    ref_logprobs: Tensor | None  # [N]


@torch.no_grad()
def response_logprobs(model: Any, rollouts: Rollouts, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Log-probability of each response token under a model, and entropy. [N], [N]"""
    parts = []
    rows = torch.arange(len(rollouts.truncated), device=rollouts.truncated.device)
    for part in rows.split(config.micro_batch or len(rows)):
        chosen = rollouts.select(part)
        parts.append(capo.logprobs(response_logits(model, chosen), chosen.token_ids, config.temperature))
    logprobs, entropy = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def learn(
    model: Any, optimizer: torch.optim.Optimizer, batch: Batch, config: TrainConfig
) -> tuple[dict[str, float | None], bool]:
    """The optimiser steps of one update.

    A minibatch in which no token has a gradient makes no step, so that neither momentum nor weight decay moves the
    weights. One whose loss or gradient is NaN or Inf makes none either, and ends the update.

    Returns:
        Metrics, and whether all was finite.
    """
    sums: dict[str, list[float]] = {"loss": [], "clip_ratio/region_mean": [], "kl": [], "grad_norm": []}
    idle, finite = 0, True
    for minibatch in minibatches(batch.rollouts.prompt_index, config) * config.epochs:
        optimizer.zero_grad(set_to_none=True)
        metrics = accumulate(model, batch, minibatch, config)
        if metrics is None:
            idle += 1
            continue
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
        finite = math.isfinite(metrics["loss"]) and math.isfinite(norm)
        if not finite:
            break
        optimizer.step()
        for name, value in {**metrics, "grad_norm": norm}.items():
            sums[name].append(value)
    optimizer.zero_grad(set_to_none=True)
    means = {name: sum(values) / len(values) if values else None for name, values in sums.items()}
    if batch.ref_logprobs is None:
        means["kl"] = None
    return {**means, "capo/idle_minibatches": idle}, finite


def minibatches(prompt_index: Tensor, config: TrainConfig) -> list[Tensor]:
    """The responses of each minibatch, which has the same share of the prompts, whatever responses there are to them.

    Args:
        prompt_index: [B] int64, ascending.
        config: numbers of prompts and minibatches.
    """
    rows = torch.arange(len(prompt_index), device=prompt_index.device)
    first = torch.arange(0, config.prompts + 1, config.prompts // config.minibatches, device=prompt_index.device)
    cuts = torch.searchsorted(prompt_index, first).tolist()
    return [rows[start:end] for start, end in pairwise(cuts)]


def accumulate(model: Any, batch: Batch, rows: Tensor, config: TrainConfig) -> dict[str, float] | None:
    """Add the gradient of one minibatch to the parameters; the same, but for rounding, however it is cut.

    Responses without any gradient are left out of the forward pass too; they still count in the denominators.

    Args:
        model: its parameters receive the gradient.
        batch: the update.
        rows: the responses of the minibatch, ascending.
        config: loss rule and micro-batch size.

    Returns:
        Metrics of the minibatch; None if no token has a gradient.
    """
    rule = config.loss_rule()
    rollouts = batch.rollouts
    lengths = rollouts.cu_seqlens.diff()
    num_tokens = int(lengths[rows].sum())
    live = rows
    if rule.kl_coef == 0 and rule.entropy_coef == 0:
        response = torch.arange(len(lengths), device=rows.device).repeat_interleave(lengths)
        alive = torch.zeros_like(rollouts.truncated)
        alive[response[batch.advantages != 0]] = True
        live = rows[alive[rows]]
    if len(live) == 0:
        return None
    metrics = {"loss": 0.0, "clip_ratio/region_mean": 0.0, "kl": 0.0}
    for part in live.split(config.micro_batch or len(live)):
        index = rollouts.token_index(part)
        chosen = rollouts.select(part)
        output = capo.policy_loss(
            response_logits(model, chosen),
            chosen.token_ids,
            batch.advantages[index],
            batch.old_logprobs[index],
            chosen.cu_seqlens,
            rule,
            ref_logprobs=None if batch.ref_logprobs is None else batch.ref_logprobs[index],
            rollout_logprobs=chosen.logprobs,
            inplace=True,
        )
        # policy_loss divides by what it sees; the minibatch decides what counts.
        of_tokens, of_responses = len(index) / num_tokens, len(part) / len(rows)
        share = {"sequence_mean": of_responses, "token_mean": of_tokens, "constant": 1.0}[rule.reduce]
        loss = output.loss * share
        loss.backward()
        metrics["loss"] += loss.item()
        metrics["clip_ratio/region_mean"] += output.clip_fraction.item() * of_tokens
        metrics["kl"] += output.kl.item() * of_tokens
    return metrics
