"""Rollouts: what every sampling engine gives, and the engine made of plain transformers.

Token ids and log-probabilities are taken as the engine gives them; text is never encoded again.

Dimension key: P prompts, B responses, L prompt width, N packed response tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache


class RolloutError(Exception):
    """An engine cannot be used, or gives nothing that could be used."""


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
        prompt_index: [B] int64, the number of each response's prompt, ascending.
        num_tokens: ids from this number on are padding of the model's vocabulary: neither engine nor trainer gives them
            any probability. None: there are none.
        dropped: how many prompts and responses are missing, by reason.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    token_ids: Tensor
    cu_seqlens: Tensor
    logprobs: Tensor
    truncated: Tensor
    prompt_index: Tensor
    num_tokens: int | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)

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
            self.prompt_index[rows],
            self.num_tokens,
            self.dropped,
        )

    @classmethod
    def concat(cls, parts: Sequence[Rollouts], prompts: Sequence[int]) -> Rollouts:
        """The responses of several calls as of one.

        Args:
            parts: at least one, on one device.
            prompts: how many prompts each call was given.
        """
        width = max(part.prompt_ids.shape[1] for part in parts)

        def widen(values: Tensor) -> Tensor:
            return torch.nn.functional.pad(values, (width - values.shape[1], 0))

        starts = cumulative(torch.tensor(prompts)).tolist()
        return cls(
            torch.cat([widen(part.prompt_ids) for part in parts]),
            torch.cat([widen(part.prompt_mask) for part in parts]),
            torch.cat([part.token_ids for part in parts]),
            cumulative(torch.cat([part.cu_seqlens.diff() for part in parts])),
            torch.cat([part.logprobs for part in parts]),
            torch.cat([part.truncated for part in parts]),
            torch.cat([part.prompt_index + start for part, start in zip(parts, starts, strict=False)]),
            parts[0].num_tokens,
            dict(sum((Counter(part.dropped) for part in parts), Counter())),
        )


class Engine(Protocol):
    """Samples responses from the weights of a trainer's model."""

    def sample(self, prompts: Sequence[Sequence[int]], n: int, seed: int) -> Rollouts:
        """n responses to each prompt, sampled from the full distribution at the engine's temperature.

        Prompts without room for a whole response are dropped, and so is a response whose ids and log-probabilities do not
        fit together; ``Rollouts.dropped`` counts them.

        Args:
            prompts: P non-empty lists of token ids.
            n: responses per prompt; they share the work on the prompt.
            seed: of all randomness.

        Raises:
            RolloutError: nothing is left.
        """
        ...

    def sync(self) -> None:
        """Take over the weights that the trainer's model has now."""
        ...

    def close(self) -> None:
        """Give memory and processes back."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How an engine samples: always from the full distribution, as the loss takes ratios against that.

    Args:
        max_new_tokens: longest response, EOS included.
        eos_id: the token that ends a response.
        temperature: logits are divided by it.
        context: tokens of prompt and response together; None: what the model's configuration says.
        num_tokens: ids that may be sampled: those below; None: as many as the model has logits.

    Raises:
        ValueError: a number out of range.
    """

    max_new_tokens: int
    eos_id: int
    temperature: float = 1.0
    context: int | None = None
    num_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "context", "num_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Sampling: {name} must be at least 1, got {value!r}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"Sampling: temperature must be finite and above 0, got {self.temperature!r}")
        if self.eos_id < 0 or (self.num_tokens is not None and self.eos_id >= self.num_tokens):
            raise ValueError(f"Sampling: eos_id {self.eos_id} is not below num_tokens {self.num_tokens}")

    def for_model(self, config: Any) -> tuple[int, int]:
        """Context and number of tokens for a model's configuration.

        Raises:
            ValueError: the model has fewer of either, or a response fills the context.
        """
        found = []
        for name, have in (("context", config.max_position_embeddings), ("num_tokens", config.vocab_size)):
            want = getattr(self, name)
            if want is not None and want > have:
                raise ValueError(f"Sampling: {name}={want}, but the model has {have}")
            found.append(have if want is None else want)
        if self.max_new_tokens >= found[0]:
            raise ValueError(
                f"Sampling: max_new_tokens={self.max_new_tokens} leaves no room for a prompt in a context of {found[0]}"
            )
        return found[0], found[1]


class TransformersEngine:
    """An `Engine` that runs the trainer's own model.

    Args:
        model: a causal language model of transformers.
        sampling: how to sample.
    """

    def __init__(self, model: Any, sampling: Sampling) -> None:
        self._model, self._sampling = model, sampling
        self._context, _ = sampling.for_model(model.config)

    def sample(self, prompts: Sequence[Sequence[int]], n: int, seed: int) -> Rollouts:
        """See `Engine`."""
        sampling = self._sampling
        kept = fitting(prompts, self._context - sampling.max_new_tokens)
        rollouts = sample(
            self._model,
            [prompts[index] for index in kept],
            n,
            max_new_tokens=sampling.max_new_tokens,
            eos_id=sampling.eos_id,
            temperature=sampling.temperature,
            generator=torch.Generator(self._model.device).manual_seed(seed),
            num_tokens=sampling.num_tokens,
        )
        samples = []
        lengths = rollouts.cu_seqlens.diff().tolist()
        for ids, logprobs in zip(rollouts.token_ids.split(lengths), rollouts.logprobs.split(lengths), strict=True):
            samples.append(Sample(ids.tolist(), logprobs.tolist()))
        groups = [samples[first : first + n] for first in range(0, len(samples), n)]
        return pack(prompts, kept, groups, sampling, self._model)

    def sync(self) -> None:
        """Nothing to do: it is the same model."""

    def close(self) -> None:
        """Nothing to do."""


class Sample(NamedTuple):
    """A response as an engine gave it."""

    ids: Sequence[int]
    logprobs: Sequence[float]


def fitting(prompts: Sequence[Sequence[int]], longest: int) -> list[int]:
    """The numbers of the prompts that are not too long.

    Args:
        prompts: lists of token ids.
        longest: allowed length.

    Raises:
        ValueError: no prompt, or an empty one.
        RolloutError: all are too long.
    """
    if not prompts or not all(map(len, prompts)):
        raise ValueError("sample: needs at least one prompt, and no empty ones")
    kept = [index for index, prompt in enumerate(prompts) if len(prompt) <= longest]
    if not kept:
        raise RolloutError(
            f"all {len(prompts)} prompts are longer than {longest} tokens, which is what the context leaves beside a "
            "response; make max_new_tokens smaller or the context larger"
        )
    return kept


def pack(
    prompts: Sequence[Sequence[int]],
    kept: Sequence[int],
    groups: Sequence[Sequence[Sample]],
    sampling: Sampling,
    model: Any,
) -> Rollouts:
    """Rollouts of what an engine gave, without the responses that cannot be used.

    Args:
        prompts: P lists of token ids.
        kept: the numbers of those that were sampled from, ascending.
        groups: the responses to each of these.
        sampling: what was asked for.
        model: its configuration bounds the ids, its device is where the tensors go.

    Raises:
        RolloutError: no response can be used.
    """
    dropped: Counter[str] = Counter()
    if len(prompts) > len(kept):
        dropped["prompt_too_long"] = len(prompts) - len(kept)
    used: list[tuple[int, Sample]] = []
    _, num_tokens = sampling.for_model(model.config)
    for index, group in zip(kept, groups, strict=True):
        for response in group:
            fault = _fault(response, sampling, num_tokens)
            if fault is None:
                used.append((index, response))
            else:
                dropped[fault] += 1
    if not used:
        reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
        raise RolloutError(f"no response can be used: {reasons}")
    device = model.device
    rows = [prompts[index] for index, _ in used]
    prompt_ids, prompt_mask = pad_left(rows, sampling.eos_id, device)
    return Rollouts(
        prompt_ids,
        prompt_mask,
        torch.tensor([id_ for _, response in used for id_ in response.ids], device=device),
        cumulative(torch.tensor([len(response.ids) for _, response in used], device=device)),
        torch.tensor([value for _, response in used for value in response.logprobs], device=device),
        torch.tensor([response.ids[-1] != sampling.eos_id for _, response in used], device=device),
        torch.tensor([index for index, _ in used], device=device),
        sampling.num_tokens,
        dict(dropped),
    )


def _fault(response: Sample, sampling: Sampling, num_tokens: int) -> str | None:
    """Why a response cannot be used; None if it can."""
    ids, logprobs = response
    if not ids:
        return "empty"
    if len(logprobs) != len(ids):
        return "logprobs_length"
    if not all(0 <= id_ < num_tokens for id_ in ids):
        return "id_out_of_range"
    if not all(math.isfinite(value) for value in logprobs):
        return "logprob_not_finite"
    # Ends where it should: at its only EOS, or at the limit.
    if sampling.eos_id in ids[:-1] or (ids[-1] != sampling.eos_id and len(ids) != sampling.max_new_tokens):
        return "wrong_end"
    return None


def pad_left(prompts: Sequence[Sequence[int]], padding: int, device: Any) -> tuple[Tensor, Tensor]:
    """Prompts as a rectangle, and where it holds tokens. int64 [B, L], bool [B, L]"""
    width = max(map(len, prompts))
    ids = torch.tensor([[padding] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
    return ids, mask


def mismatch(trainer: Tensor, sampler: Tensor, cap: float | None) -> dict[str, float]:
    """How far the trainer's log-probabilities are from the sampler's; the names are TRL's where it has the quantity.

    With d = trainer - sampler of each token: mean and largest |d|, the k3 estimate mean(exp(d) - 1 - d) of KL(sampler ||
    trainer), the ratios exp(d), and the share of them outside [1/cap, cap].

    Args:
        trainer, sampler: [N], of the same tokens.
        cap: as in ``LossRule.importance_cap``; None: 2.
    """
    bound = cap or 2.0
    d = trainer.double() - sampler.double()
    ratio = d.exp()
    outside = (ratio > bound) | (ratio < 1 / bound)
    values = {
        "sampling/sampling_logp_difference/mean": d.abs().mean(),
        "sampling/sampling_logp_difference/max": d.abs().max(),
        "sampling/importance_sampling_ratio/min": ratio.min(),
        "sampling/importance_sampling_ratio/mean": ratio.mean(),
        "sampling/importance_sampling_ratio/max": ratio.max(),
        "sampling/kl": (torch.expm1(d) - d).mean(),
        "sampling/outside_cap": outside.double().mean(),
    }
    return {name: value.item() for name, value in values.items()}


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
    num_tokens: int | None = None,
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
        num_tokens: ids that may be sampled: those below; None: all.

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
    # The padding's value is never looked at; EOS is an id that every model has.
    prompt_ids, prompt_mask = pad_left(prompts, eos_id, device)

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
        token, logprob = _choose(logits[:, :num_tokens], temperature, generator)
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
        prompt_index=torch.arange(len(prompts), device=device).repeat_interleave(n),
        num_tokens=num_tokens,
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

    Padding of the vocabulary is left out, so V is ``rollouts.num_tokens`` where that is given.

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
    return model.get_output_embeddings()(hidden[:, width - 1 :][response])[:, : rollouts.num_tokens]
