"""Sampling with plain transformers: a key-value cache, a seeded generator, tokens exactly as sampled.

Dimension key: P prompts, B = P * n responses, L prompt width, N packed response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass(frozen=True, eq=False)
class Rollouts:
    """B sampled responses, packed, with their prompts.

    Args:
        prompt_ids: [B, L] int64, prompts, padded on the left.
        prompt_mask: [B, L] bool, False for padding.
        token_ids: [N] int64, the responses end to end, as sampled, EOS included.
        cu_seqlens: [B + 1] int64, cumulative response lengths.
        logprobs: [N] float32, of each token under the distribution it was sampled from.
        truncated: [B] bool, True for responses that reached the limit without EOS.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    token_ids: Tensor
    cu_seqlens: Tensor
    logprobs: Tensor
    truncated: Tensor

    def token_index(self, rows: Tensor) -> Tensor:
        """Positions of the tokens of some responses, for indexing packed values.

        Args:
            rows: response numbers, ascending.
        """
        keep = torch.zeros_like(self.truncated)
        keep[rows] = True
        return keep.repeat_interleave(self.cu_seqlens.diff()).nonzero()[:, 0]

    def select(self, rows: Tensor) -> Rollouts:
        """Some of the responses; ``rows`` ascending."""
        index = self.token_index(rows)
        lengths = self.cu_seqlens.diff()[rows]
        return Rollouts(
            self.prompt_ids[rows],
            self.prompt_mask[rows],
            self.token_ids[index],
            cumulative(lengths),
            self.logprobs[index],
            self.truncated[rows],
        )


def cumulative(lengths: Tensor) -> Tensor:
    """Cumulative sums with a leading 0. int64 [B + 1]"""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    n: int,
    *,
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Rollouts:
    """Sample n responses to each prompt; the responses of a prompt are adjacent and share its prefill.

    Args:
        model: a causal language model of transformers, in evaluation mode if it has dropout.
        prompts: P non-empty lists of token ids, of any lengths.
        n: responses per prompt.
        max_new_tokens: longest response, EOS included.
        eos_id: the token that ends a response.
        temperature: logits are divided by it; 0 is greedy, with the log-probabilities of temperature 1.
        generator: source of all randomness, on the model's device.

    Raises:
        ValueError: no prompt, an empty prompt, or a number out of range.
    """
    if not prompts or not all(map(len, prompts)):
        raise ValueError("sample: needs at least one prompt, and no empty ones")
    if n < 1 or max_new_tokens < 1 or not 0 <= temperature < float("inf"):
        raise ValueError(
            f"sample: n and max_new_tokens must be at least 1 and temperature finite and at least 0, got n={n}, "
            f"max_new_tokens={max_new_tokens}, temperature={temperature}"
        )
    device = model.device
    width = max(map(len, prompts))
    # The padding's value is never looked at; EOS is an id that every model has.
    prompt_ids = torch.tensor([[eos_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    prompt_mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)

    cache = DynamicCache(config=model.config)
    output = model(
        prompt_ids,
        attention_mask=attention_mask(prompt_mask),
        position_ids=positions(prompt_mask),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    if n > 1:
        cache.batch_repeat_interleave(n)
    logits = output.logits[:, -1].repeat_interleave(n, 0)  # [B, V]
    prompt_ids, prompt_mask = prompt_ids.repeat_interleave(n, 0), prompt_mask.repeat_interleave(n, 0)

    mask = prompt_mask
    padded = not bool(prompt_mask.all())
    next_position = prompt_mask.sum(1)
    running = torch.ones(len(logits), dtype=torch.bool, device=device)
    tokens: list[Tensor] = []
    logprobs: list[Tensor] = []
    alive: list[Tensor] = []
    while True:
        token, logprob = _choose(logits, temperature, generator)
        tokens.append(token)
        logprobs.append(logprob)
        alive.append(running)
        running = running & (token != eos_id)
        if len(tokens) == max_new_tokens or not bool(running.any()):
            break
        if padded:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        # Responses that have ended run on unread, so that the cache stays rectangular.
        output = model(
            token[:, None],
            attention_mask=mask if padded else None,
            position_ids=next_position[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]
        next_position = next_position + 1

    sampled = torch.stack(alive, 1)  # [B, T], True up to and with EOS
    return Rollouts(
        prompt_ids,
        prompt_mask,
        torch.stack(tokens, 1)[sampled],
        cumulative(sampled.sum(1)),
        torch.stack(logprobs, 1)[sampled],
        truncated=running,
    )


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-probability. [B], [B]"""
    scaled = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature == 0:
        token = scaled.argmax(-1)
    else:
        token = torch.multinomial(scaled.exp(), 1, generator=generator)[:, 0]
    return token, scaled.gather(1, token[:, None])[:, 0]


def attention_mask(mask: Tensor) -> Tensor | None:
    """The mask, or None where nothing is padded: attention is then purely causal, which is faster."""
    return None if bool(mask.all()) else mask


def positions(mask: Tensor) -> Tensor:
    """Position of each token, counted from the first one that is no padding. [B, L]"""
    return (mask.cumsum(1) - 1).clamp(min=0)


def response_logits(model: Any, rollouts: Rollouts) -> Tensor:
    """The logits that predict each response token, packed; the language-model head sees no other rows. [N, V]

    Args:
        model: a causal language model of transformers.
        rollouts: the responses, with their prompts.
    """
    lengths = rollouts.cu_seqlens.diff()
    width = rollouts.prompt_ids.shape[1]
    response = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]  # [B, T]
    ids = torch.zeros_like(response, dtype=torch.int64).masked_scatter(response, rollouts.token_ids)
    # Padding on the right stands after everything that is read and needs no mask, only that on the left does.
    mask = torch.cat([rollouts.prompt_mask, torch.ones_like(response)], 1)[:, :-1]
    hidden = model.base_model(
        torch.cat([rollouts.prompt_ids, ids], 1)[:, :-1],
        attention_mask=attention_mask(mask),
        position_ids=positions(mask),
        use_cache=False,
    ).last_hidden_state  # [B, L + T - 1, H]
    return model.get_output_embeddings()(hidden[:, width - 1 :][response])
