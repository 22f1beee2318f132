"""A judge on vLLM, started by this process: many critiques at a time, without a server to look after."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from capo.critique import SCHEMA, render
from capo.engines import cpu_options, undisturbed, vllm_why_not
from capo.judges import Fault, JudgeError, JudgeReply, JudgeRequest, check_sampling, check_votes
from capo.judges.chat import Chat


class VllmJudge:
    """A `Judge` that generates all critiques at once; the K critiques of a response share the work on its prompt.

    vLLM runs in a process of its own, so that it gets on with rollouts by vLLM in this one. Prompts go to it as token ids,
    made as `capo.judges.chat.Chat` says. A reply that reaches ``max_new_tokens`` is invalid, a prompt that leaves no room
    for one fails. The seeds of a request come from its content and the number of the vote.

    Args:
        path: folder or name of a causal language model with a chat template; code that comes with it is never run.
        temperature, top_p: of sampling; votes differ only above temperature 0.
        max_new_tokens: longest reply.
        seed: of all randomness.
        trust: see `capo.critique.parse`.
        structured: the reply is JSON by force, as `capo.critique.SCHEMA` describes it; if vLLM refuses that and takes the same
            requests without, all goes on in the text form, and ``counts["downgraded"]`` is 1.
        template: further arguments of the chat template, such as ``enable_thinking=False``.
        dtype: of the weights; ``auto``: as vLLM chooses.
        context: tokens of prompt and reply together; None: the model's limit.
        cache_gib: memory for keys and values, GiB.

    Raises:
        JudgeError: vLLM is not installed or cannot run.
        ValueError: the tokenizer has no chat template, or a number is out of range.
        OSError: there is no such model.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 512,
        seed: int = 0,
        trust: Literal["list", "verdict"] = "list",
        structured: bool = False,
        template: dict[str, Any] | None = None,
        dtype: str = "auto",
        context: int | None = None,
        cache_gib: float = 4.0,
    ) -> None:
        check_sampling("VllmJudge", temperature, top_p, max_new_tokens=max_new_tokens)
        if not (math.isfinite(cache_gib) and cache_gib > 0):
            raise ValueError(f"VllmJudge: cache_gib must be finite and above 0, got {cache_gib!r}")
        reason = vllm_why_not()
        if reason is not None:
            raise JudgeError(f"vLLM: {reason}")
        from transformers import AutoTokenizer, GenerationConfig

        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        self._chat = Chat(self.tokenizer, template)
        try:
            generation = GenerationConfig.from_pretrained(str(path))
        except OSError:  # not every model has one
            generation = GenerationConfig()
        self._sampling = {
            "temperature": float(temperature),
            "top_p": float(top_p),
            "max_tokens": max_new_tokens,
            "stop_token_ids": sorted(self._chat.ends(generation)),
            "detokenize": False,
        }
        self.counts: Counter[str] = Counter()
        self._max_new_tokens, self._seed, self._trust, self._structured = max_new_tokens, seed, trust, structured
        options = cpu_options()
        with undisturbed({"TORCH_COMPILE_DISABLE": "1"} if options else {}):
            from vllm import LLM

            self._llm = LLM(
                str(path),
                trust_remote_code=False,
                generation_config="vllm",
                dtype=dtype,
                max_model_len=context,
                kv_cache_memory_bytes=int(cache_gib * 2**30),
                **options,
            )
            self._context = self._llm.llm_engine.model_config.max_model_len

    def close(self) -> None:
        """End the process of vLLM."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def critique(self, requests: Sequence[JudgeRequest], num_votes: int, first: int = 0) -> list[list[JudgeReply]]:
        """See `capo.judges.Judge`."""
        check_votes(num_votes, first)
        if not num_votes or not requests:
            return [[] for _ in requests]
        try:
            return self._ask(requests, num_votes, first, self._structured)
        except ValueError:  # which vLLM raises before anything runs
            if not self._structured:
                raise
            replies = self._ask(requests, num_votes, first, structured=False)
            self._structured = False  # not before vLLM has taken the same requests without
            self.counts["downgraded"] += 1
            return replies

    def _ask(
        self, requests: Sequence[JudgeRequest], num_votes: int, first: int, structured: bool
    ) -> list[list[JudgeReply]]:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        began = time.perf_counter()
        replies: list[list[JudgeReply]] = [[] for _ in requests]
        marks = [request.marks(self._seed) for request in requests]
        prompts = [
            self._chat.ids(render(request.question, request.reference, request.steps, nonce, structured=structured))
            for request, (nonce, _) in zip(requests, marks, strict=True)
        ]
        fits = [i for i, prompt in enumerate(prompts) if len(prompt) + self._max_new_tokens <= self._context]
        for index in set(range(len(requests))) - set(fits):
            replies[index] = [JudgeReply.failure(Fault.TOO_LONG.value)] * num_votes
        parameters = [
            SamplingParams(
                n=num_votes,
                seed=marks[index].seed + first,
                structured_outputs=StructuredOutputsParams(json=SCHEMA) if structured else None,
                **self._sampling,
            )
            for index in fits
        ]
        tokens = [{"prompt_token_ids": prompts[index]} for index in fits]
        outputs = self._llm.generate(tokens, parameters, use_tqdm=False) if fits else []
        seconds = time.perf_counter() - began
        for index, output in zip(fits, outputs, strict=True):
            replies[index] = [
                JudgeReply.read(
                    self.tokenizer.decode(list(answer.token_ids), skip_special_tokens=True),
                    len(requests[index].steps),
                    marks[index].nonce,
                    trust=self._trust,
                    fault=None if answer.finish_reason == "stop" else Fault.TRUNCATED,
                    structured=structured,
                    prompt_tokens=len(prompts[index]) if vote == 0 else 0,
                    completion_tokens=len(answer.token_ids),
                    seconds=seconds,
                )
                for vote, answer in enumerate(output.outputs)
            ]
        return replies
