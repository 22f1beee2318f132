"""Small policies from scratch, and the supervised warm start that RL begins from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from capo import checkpoint
from capo.config import ModelConfig, TrainConfig
from capo.data import ArithmeticTask


def build_model(config: ModelConfig, task: ArithmeticTask, seed: int) -> Any:
    """A decoder of transformers with random weights, in float32 on the CPU.

    Args:
        config: its size.
        task: gives vocabulary and sequence length.
        seed: of the weights; PyTorch's own random state is left alone.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    kinds: dict[str, tuple[Any, Any]] = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }
    make_config, make_model = kinds[config.arch]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_model(
            make_config(
                vocab_size=task.vocab_size,
                hidden_size=config.hidden,
                intermediate_size=config.mlp,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                max_position_embeddings=2 * (task.prompt_length + task.response_length),
                initializer_range=config.init_std,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=task.eos_id,
                pad_token_id=task.eos_id,
            )
        ).eval()


def load_warm_start(model: Any, config: TrainConfig) -> bool:
    """Load what `warm_start` made earlier with the same settings; False if there is no such thing.

    Raises:
        capo.checkpoint.CheckpointError: the cached model is damaged.
    """
    cached = _cached(config)
    if cached is None or not cached.is_dir():
        return False
    checkpoint.load(cached, model, None)
    return True


def warm_start(
    model: Any,
    task: ArithmeticTask,
    config: TrainConfig,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train a fresh model on demos, and put the result into the cache if there is one.

    Args:
        model: as `build_model` made it.
        task: gives the demos.
        config: its sections ``task``, ``model``, ``warm_start`` and the seeds ``data`` and ``warm_start`` decide the
            result, and nothing else does.
        on_step: called after each step with its number, from 1, and its loss; what it raises ends the training.

    Raises:
        FloatingPointError: the loss is NaN or Inf.
    """
    settings = config.warm_start
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, foreach=True
    )
    for step in range(1, settings.steps + 1):
        generator = torch.Generator().manual_seed(stream(config.seeds.warm_start, "demos", step))
        ids = task.demos(settings.batch, generator).to(model.device)
        hidden = model.base_model(ids[:, :-1], use_cache=False).last_hidden_state[:, task.prompt_length - 1 :]
        logits = model.get_output_embeddings()(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, task.prompt_length :].flatten())
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"warm start: the loss is {loss.item()} at step {step}; lower its learning rate")
        rate = _cosine(step, settings.steps, settings.warmup) * settings.learning_rate
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step(step, loss.item())
    cached = _cached(config)
    if cached is not None:
        checkpoint.save(cached, model, None, {"config": _decisive(config)})


def stream(seed: int, *purpose: str | int) -> int:
    """The seed of one of many independent random streams: nothing random has a state that would need saving."""
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _cosine(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then cosine from 1 to 0.1."""
    if step <= warmup:
        return step / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def _decisive(config: TrainConfig) -> dict[str, Any]:
    """All settings that the warm-started model depends on, the thread count (rounding) apart."""
    return {
        "task": config.task.model_dump(),
        "model": config.model.model_dump(),
        "warm_start": config.warm_start.model_dump(exclude={"cache"}),
        "seeds": config.seeds.model_dump(include={"data", "warm_start"}),
    }


def _cached(config: TrainConfig) -> Path | None:
    if config.warm_start.cache is None:
        return None
    fingerprint = hashlib.sha256(json.dumps(_decisive(config), sort_keys=True).encode()).hexdigest()
    return Path(config.warm_start.cache) / fingerprint[:16]
