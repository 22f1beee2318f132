"""Rollouts by vLLM in the trainer's process: many responses at a time, on a copy of the trainer's weights.

Nothing goes through files but the model's configuration, and nothing through text: the engine has no tokenizer.
"""

from __future__ import annotations

import copy
import gc
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from capo.engines import cpu_options, undisturbed, vllm_why_not
from capo.models import stream
from capo.rollout import RolloutError, Rollouts, Sample, Sampling, fitting, pack

# The engine lives in this process, so that weights are handed over as tensors; threads stay where they are.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class VllmEngine:
    """An `capo.rollout.Engine` that samples with vLLM; there can be one in a process.

    Args:
        model: a causal language model of transformers that vLLM knows, too. On a CPU, vLLM wants heads of 32, 64, ...
        sampling: how to sample.
        cache_gib: memory for keys and values, GiB; all prompts and responses at work at a time share it.
        dtype: ``float32``, ``bfloat16`` or ``float16``, of vLLM's copy; None: the model's.

    Raises:
        RolloutError: vLLM is not installed or cannot run.
        ValueError: an argument out of range, or a model with one output matrix by its configuration and two in fact.
    """

    def __init__(self, model: Any, sampling: Sampling, *, cache_gib: float = 1.0, dtype: str | None = None) -> None:
        if not (math.isfinite(cache_gib) and cache_gib > 0):
            raise ValueError(f"VllmEngine: cache_gib must be finite and above 0, got {cache_gib!r}")
        reason = vllm_why_not()
        if reason is not None:
            raise RolloutError(f"vLLM: {reason}")
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        if model.config.tie_word_embeddings and head is not embedding:
            raise ValueError("VllmEngine: the configuration ties the embeddings, but the model has two matrices")
        self._model, self._sampling = model, sampling
        self._context, self._num_tokens = sampling.for_model(model.config)
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        # vLLM's copy has no rows for padding of the vocabulary, so it cannot sample it.
        config.vocab_size = self._num_tokens
        with tempfile.TemporaryDirectory(prefix="capo-") as folder, undisturbed(_ENVIRONMENT):
            from vllm import LLM

            config.save_pretrained(folder)
            self._llm = LLM(
                folder,
                skip_tokenizer_init=True,
                load_format="dummy",
                generation_config="vllm",
                logprobs_mode="processed_logprobs",  # those of the temperature
                dtype=dtype or str(model.dtype).removeprefix("torch."),
                max_model_len=self._context,
                kv_cache_memory_bytes=int(cache_gib * 2**30),
                **cpu_options(),
            )
        # On a CPU, vLLM would compile what ranks a sampled token, which takes longer than it saves.
        self._eager = (lambda: torch.compiler.set_stance("force_eager")) if cpu_options() else nullcontext
        self.sync()

    def sample(self, prompts: Sequence[Sequence[int]], n: int, seed: int) -> Rollouts:
        """See `capo.rollout.Engine`."""
        from vllm import SamplingParams

        sampling = self._sampling
        kept = fitting(prompts, self._context - sampling.max_new_tokens)
        parameters = [
            SamplingParams(
                n=n,
                # Of a stream for each prompt: vLLM numbers a prompt's responses on from it.
                seed=stream(seed, "prompt", index) % 2**31,
                temperature=sampling.temperature,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=[sampling.eos_id],
                logprobs=0,
                detokenize=False,
            )
            for index in kept
        ]
        tokens = [{"prompt_token_ids": list(prompts[index])} for index in kept]
        with torch.no_grad(), self._eager():
            outputs = self._llm.generate(tokens, parameters, use_tqdm=False)
        groups = [[_read(response) for response in output.outputs] for output in outputs]
        return pack(prompts, kept, groups, sampling, self._model)

    def sync(self) -> None:
        """See `capo.rollout.Engine`."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights()})
        # Keys and values of the old weights.
        if not self._llm.reset_prefix_cache():
            raise RolloutError("vLLM did not forget the keys and values of the old weights")

    def close(self) -> None:
        """See `capo.rollout.Engine`."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        cleanup_dist_env_and_memory()

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """All weights by their names in a checkpoint, without padding of the vocabulary."""
        modules = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        of_tokens = {parameter.data_ptr() for module in modules for parameter in module.parameters()}
        for name, tensor in self._model.state_dict().items():
            yield name, tensor[: self._num_tokens] if tensor.data_ptr() in of_tokens else tensor


def _read(response: Any) -> Sample:
    """Ids and log-probabilities of one response, as many of each as there are."""
    ids, positions = list(response.token_ids), list(response.logprobs or ())
    # Each position maps the sampled token, and only that, to its log-probability.
    logprobs = [next((entry.logprob for entry in position.values()), math.nan) for position in positions]
    if len(ids) == len(positions):
        fits = [id_ in position for id_, position in zip(ids, positions, strict=True)]
        logprobs = [value if fit else math.nan for value, fit in zip(logprobs, fits, strict=True)]
    return Sample(ids, logprobs)
