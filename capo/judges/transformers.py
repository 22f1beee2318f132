"""A judge in process: any causal language model of transformers with a chat template."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from capo.critique import render
from capo.judges import Fault, JudgeReply, JudgeRequest, check_sampling, check_votes
from capo.judges.chat import Chat


class TransformersJudge:
    """A `Judge` that generates in batches; the K critiques of a response are K sequences returned for one prompt.

    The prompt is put into the chat as `capo.judges.chat.Chat` says. A reply that reaches ``max_new_tokens`` is invalid, a
    prompt that leaves no room for one fails. Seeded: equal requests in equal batches give equal replies; PyTorch's own
    random state is left alone.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: its tokenizer; must have a chat template.
        temperature, top_p: of sampling; 0 is greedy.
        max_new_tokens: longest reply.
        batch: sequences generated at once, at least one request's votes.
        seed: of all randomness.
        trust: see `capo.critique.parse`.
        structured: ask for JSON; nothing enforces it here.
        template: further arguments of the chat template, such as ``enable_thinking=False``.

    Raises:
        ValueError: the tokenizer has no chat template, or a number is out of range.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 512,
        batch: int = 64,
        seed: int = 0,
        trust: Literal["list", "verdict"] = "list",
        structured: bool = False,
        template: dict[str, Any] | None = None,
    ) -> None:
        check_sampling("TransformersJudge", temperature, top_p, max_new_tokens=max_new_tokens, batch=batch)
        self.model, self.tokenizer = model, tokenizer
        self._sampling: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
        if temperature > 0:
            self._sampling.update(temperature=float(temperature), top_p=float(top_p), top_k=0)
        self._max_new_tokens, self._batch, self._seed = max_new_tokens, batch, seed
        self._trust, self._structured = trust, structured
        self._chat = Chat(tokenizer, template)
        self._ends = self._chat.ends(model.generation_config)
        pad = tokenizer.pad_token_id
        self._pad = pad if pad is not None else next(iter(self._ends))

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu", dtype: str = "auto", **options: Any) -> TransformersJudge:
        """Load model and tokenizer from a folder or by name; code that comes with a model is never run.

        Args:
            path: as ``from_pretrained`` takes it.
            device: where to.
            dtype: of the weights; ``auto``: as they were saved.
            options: of the judge.

        Raises:
            OSError: there is no such model.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
        return cls(model.to(device).eval(), tokenizer, **options)

    def critique(self, requests: Sequence[JudgeRequest], num_votes: int, first: int = 0) -> list[list[JudgeReply]]:
        """See `capo.judges.Judge`."""
        check_votes(num_votes, first)
        replies: list[list[JudgeReply]] = [[] for _ in requests]
        if not num_votes:
            return replies
        prompts = [self._prompt(request) for request in requests]
        limit = getattr(self.model.config, "max_position_embeddings", None) or float("inf")
        fits = [i for i, prompt in enumerate(prompts) if len(prompt) + self._max_new_tokens <= limit]
        for index in set(range(len(requests))) - set(fits):
            replies[index] = [JudgeReply.failure(Fault.TOO_LONG.value)] * num_votes
        fits.sort(key=lambda index: len(prompts[index]))  # prompts of like length, so that little is padded
        size = max(1, self._batch // num_votes)
        for begin in range(0, len(fits), size):
            members = fits[begin : begin + size]
            answers = self._generate([prompts[i] for i in members], [requests[i] for i in members], num_votes, first)
            for index, answer in zip(members, answers, strict=True):
                replies[index] = answer
        return replies

    def _prompt(self, request: JudgeRequest) -> list[int]:
        nonce = request.marks(self._seed).nonce
        text = render(request.question, request.reference, request.steps, nonce, structured=self._structured)
        return self._chat.ids(text)

    @torch.no_grad()
    def _generate(
        self, prompts: list[list[int]], requests: list[JudgeRequest], num_votes: int, first: int
    ) -> list[list[JudgeReply]]:
        began = time.perf_counter()
        width = max(map(len, prompts))
        device = self.model.device
        ids = torch.tensor([[self._pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        content = "/".join([str(first), *(request.fingerprint(self._seed) for request in requests)])
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "little") >> 1)
            output = self.model.generate(
                ids,
                attention_mask=mask,
                num_return_sequences=num_votes if self._sampling["do_sample"] else 1,
                pad_token_id=self._pad,
                **self._sampling,
            )
        seconds = time.perf_counter() - began
        rows = output[:, width:].tolist()
        if not self._sampling["do_sample"]:  # one greedy reply, K times the same
            rows = [row for row in rows for _ in range(num_votes)]
        return [
            [
                self._reply(row, request, seconds, len(prompt) if vote == 0 else 0)
                for vote, row in enumerate(rows[index * num_votes : (index + 1) * num_votes])
            ]
            for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True))
        ]

    def _reply(self, row: list[int], request: JudgeRequest, seconds: float, prompt_tokens: int) -> JudgeReply:
        length = next((i + 1 for i, token in enumerate(row) if token in self._ends), None)
        return JudgeReply.read(
            self.tokenizer.decode(row[:length], skip_special_tokens=True),
            len(request.steps),
            request.marks(self._seed).nonce,
            trust=self._trust,
            fault=Fault.TRUNCATED if length is None else None,
            structured=self._structured,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(row) if length is None else length,
            seconds=seconds,
        )
