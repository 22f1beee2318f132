"""Tiny causal language models of transformers, and batches of prompts and responses for them."""

from __future__ import annotations

import torch
import transformers
from batches import lengths_to_cu

import capo

VOCAB = 97
TEMPERATURE = 0.8
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3,
    "attn_implementation": "eager", "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
KINDS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
    "gemma2-softcap": ("Gemma2", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    "granite-scaling": ("Granite", {"logits_scaling": 4.0}),
}


def build(kind="qwen2", **changes):
    name, options = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return transformers.AutoModelForCausalLM.from_config(config)


class Case:
    """Prompts padded on the left, responses on the right: [B, T] and what the loss takes of it, packed."""

    def __init__(self, prompts=(3, 5, 1), responses=(6, 2, 4), vocab=VOCAB, seed=0):
        g = torch.Generator().manual_seed(seed)
        width, longest = max(prompts), max(responses)
        shape = len(prompts), width + longest
        self.input_ids = torch.randint(0, vocab, shape, generator=g)
        self.attention_mask = torch.zeros(shape, dtype=torch.int64)
        self.response_mask = torch.zeros(shape, dtype=torch.bool)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            self.attention_mask[i, width - prompt : width + response] = 1
            self.response_mask[i, width : width + response] = True
        self.position_ids = (self.attention_mask.cumsum(1) - 1).clamp(min=0)
        self.cu_seqlens = lengths_to_cu(responses)
        n = sum(responses)
        self.advantages = torch.randn(n, generator=g)
        self.mask = torch.rand(n, generator=g) > 0.2
        self.noise = 0.2 * torch.randn(3, n, generator=g)

    def model_inputs(self):
        return {"attention_mask": self.attention_mask, "position_ids": self.position_ids}

    def logits(self, model):
        """The rows that predict each response token. [N, V]"""
        return model(self.input_ids, **self.model_inputs()).logits[:, :-1][self.response_mask[:, 1:]]

    def values(self, model):
        """Log-probabilities near the model's own, and all else that is packed."""
        with torch.no_grad():
            logp, _ = capo.logprobs(self.logits(model), self.labels, TEMPERATURE)
        old, ref, rollout = logp + self.noise
        return {
            "credit": self.advantages, "old_logprobs": old, "ref_logprobs": ref, "rollout_logprobs": rollout,
            "mask": self.mask,
        }  # fmt: skip

    @property
    def labels(self):
        return self.input_ids[self.response_mask]

    def select(self, rows):
        """Some of the responses."""
        chosen = object.__new__(Case)
        lengths = self.cu_seqlens.diff()
        tokens = torch.isin(torch.arange(len(lengths)).repeat_interleave(lengths), torch.as_tensor(rows))
        for name, value in vars(self).items():
            setattr(chosen, name, value[rows] if len(value) == len(lengths) and name != "noise" else value)
        chosen.cu_seqlens = lengths_to_cu(lengths[rows])
        for name in ("advantages", "mask"):
            setattr(chosen, name, getattr(self, name)[tokens])
        return chosen, tokens

    def spread(self, values):
        """Packed values in the shape of the mask; NaN, or False, where there is no response."""
        empty = torch.full(self.response_mask.shape, False if values.dtype == torch.bool else torch.nan)
        return empty.to(values.dtype).masked_scatter(self.response_mask, values)
