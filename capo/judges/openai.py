"""A judge behind any OpenAI-compatible server: vLLM, SGLang, llama.cpp, ``transformers serve``, or a paid one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import anyio

from capo.critique import SCHEMA, render
from capo.judges import Fault, JudgeError, JudgeReply, JudgeRequest, Marks, check_sampling, check_votes
from capo.judges.address import Lookup, check_url, read_key
from capo.judges.cache import ReplyCache
from capo.judges.client import CallFailed, Client, Limits

T = TypeVar("T")

_RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "critique", "strict": True, "schema": SCHEMA}}
_TELLING = 20  # a share of fewer replies says little
_RESERVED = ("model", "messages", "n", "seed", "stream", "response_format")


class OpenAIJudge:
    """A `Judge` that asks ``URL/chat/completions``; safe to use from any thread, also from one that runs an event loop.

    The K critiques of a response are one call with ``n=K``; where a server gives fewer, it is asked again for the rest.
    Every reply ends as valid, invalid or failed, with a reason. Nonce and seeds come from the content of a request, so
    that its prompt and seeds do not depend on the batch. ``counts`` says what happened: ``valid``, ``invalid/REASON``,
    ``failed/REASON``, ``attempts``, ``retries/REASON``, ``cache/hits``, ``downgraded``.

    Args:
        url: of the API, up to and with ``/v1``; see `capo.judges.address.check_url` for what is refused.
        model: as the server calls it.
        temperature, top_p: of sampling; votes differ only above temperature 0.
        max_tokens: longest reply; a longer one is cut by the server and invalid.
        seed: of everything random.
        trust: see `capo.critique.parse`.
        structured: ask for JSON by ``response_format``; if the server refuses that with status 400 or 422 and takes the
            same request without, all goes on in the text form, and ``counts["downgraded"]`` is 1.
        api_key_env, api_key_file: the name of an environment variable, or a file, with the key; None: no key.
        limits: times, retries, sizes.
        max_failure_rate: if more than this share of the last ``failure_window`` replies has failed, or of a call of 20 or
            more, or all of a smaller one, the judge raises; 1 never does.
        failure_window: replies.
        cache: a folder to keep replies in; None: nowhere.
        extra: more fields for the body of each request; None leaves a field out, such as ``max_tokens`` where a server
            knows it as ``max_completion_tokens``.
        allow_http: plain http to other machines.
        trust_env: use proxies and certificates named by environment variables.

    Raises:
        ValueError: an argument out of range, or no key where one is named. No message holds a key.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 1024,
        seed: int = 0,
        trust: Literal["list", "verdict"] = "list",
        structured: bool = False,
        api_key_env: str | None = None,
        api_key_file: str | Path | None = None,
        limits: Limits | None = None,
        max_failure_rate: float = 0.2,
        failure_window: int = 200,
        cache: str | Path | None = None,
        extra: Mapping[str, Any] | None = None,
        allow_http: bool = False,
        trust_env: bool = False,
    ) -> None:
        check_sampling("OpenAIJudge", temperature, top_p, max_tokens=max_tokens, failure_window=failure_window)
        if not 0 <= max_failure_rate <= 1:
            raise ValueError(f"OpenAIJudge: max_failure_rate must be in [0, 1], got {max_failure_rate!r}")
        if reserved := set(extra or ()) & set(_RESERVED):
            raise ValueError(f"OpenAIJudge: extra must not set {min(reserved)}")
        self.url, self.model, self.seed = check_url(url, allow_http), model, seed
        self.counts: Counter[str] = Counter()
        fields = {"model": model, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, **(extra or {})}
        self._parameters = {name: value for name, value in fields.items() if value is not None}
        json.dumps(self._parameters, allow_nan=False)
        self._trust, self._structured = trust, structured
        self._limits = limits or Limits()
        self._max_failure_rate, self._window = max_failure_rate, deque[bool](maxlen=failure_window)
        self._cache = None if cache is None else ReplyCache(cache, self.counts)
        key = read_key(api_key_env, api_key_file)
        address = f"{self.url}/chat/completions"
        self._make_client = partial(Client, address, key, self._limits, self.counts, trust_env)
        # With a proxy it is the proxy's name that is looked up.
        self._loopback_only = self.url.startswith("http:") and not allow_http and not trust_env
        self._engine: _Engine | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"OpenAIJudge({self.url!r}, {self.model!r})"

    def close(self) -> None:
        """Close the connections and end the thread; a later call opens new ones."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def critique(self, requests: Sequence[JudgeRequest], num_votes: int, first: int = 0) -> list[list[JudgeReply]]:
        """See `capo.judges.Judge`."""
        check_votes(num_votes, first)
        if not requests or not num_votes:
            return [[] for _ in requests]
        with self._lock:
            if self._engine is None:
                self._engine = _Engine(self._make_client, self._loopback_only)
            engine = self._engine
        return engine.run(partial(self._critique, list(requests), num_votes, first))

    async def _critique(
        self, requests: list[JudgeRequest], num_votes: int, first: int, client: Client
    ) -> list[list[JudgeReply]]:
        results: list[list[JudgeReply]] = [[] for _ in requests]
        jobs = zip(requests, results, strict=True)
        stopped: list[JudgeError] = []

        async def work() -> None:
            for request, replies in jobs:
                try:
                    await self._judge(client, request, num_votes, first, replies)
                    self._count(replies)
                except JudgeError as error:
                    stopped.append(error)
                    group.cancel_scope.cancel()

        with anyio.move_on_after(self._limits.batch_deadline):
            async with anyio.create_task_group() as group:
                for _ in range(min(self._limits.concurrency, len(requests))):
                    group.start_soon(work)
        if stopped:
            raise stopped[0]
        for replies in results:
            if missing := num_votes - len(replies):
                replies.extend([JudgeReply.failure(Fault.DEADLINE.value)] * missing)
                self._count(replies)
        failed = sum(reply.state == "failed" for replies in results for reply in replies)
        total = len(requests) * num_votes
        if failed > self._max_failure_rate * total and (total >= _TELLING or failed == total):
            raise self._outage(f"{failed} of the {total} replies of a call have failed")
        return results

    async def _judge(
        self, client: Client, request: JudgeRequest, num_votes: int, first: int, replies: list[JudgeReply]
    ) -> None:
        """Append the replies to one request."""
        began = time.perf_counter()
        marks = request.marks(self.seed)
        structured = self._structured
        while missing := num_votes - len(replies):
            start = first + len(replies)
            ask = partial(self._ask, client, request, marks, start, missing)
            try:
                try:
                    answer = await ask(structured)
                except CallFailed as error:
                    if not structured or error.reason not in ("http_400", "http_422"):
                        raise
                    structured = False
                    answer = await ask(structured)
                    if self._structured:  # not before the server has taken the same request without
                        self._structured = False
                        self.counts["downgraded"] += 1
            except CallFailed as error:
                failure = JudgeReply.failure(error.reason, seconds=time.perf_counter() - began, nonce=marks.nonce)
                replies.extend([failure] * missing)
                return
            seconds = time.perf_counter() - began
            replies.extend(self._read(answer, len(request.steps), marks.nonce, seconds, structured))

    async def _ask(
        self, client: Client, request: JudgeRequest, marks: Marks, start: int, count: int, structured: bool
    ) -> _Answer:
        """At least one and at most ``count`` choices, from the cache or the server."""
        prompt = render(request.question, request.reference, request.steps, marks.nonce, structured=structured)
        body: dict[str, Any] = {
            **self._parameters,
            "messages": [{"role": "user", "content": prompt}],
            "seed": marks.seed + start,
        }
        if count > 1:
            body["n"] = count
        if structured:
            body["response_format"] = _RESPONSE_FORMAT
        key = {"body": body, "first": start, "count": count}
        if self._cache is not None and (kept := _Answer.restore(self._cache.get(key), count)):
            return kept
        name = f"{marks.nonce}-{start}"
        answer = await client.post(json.dumps(body).encode(), name, partial(_read_answer, count=count))
        if self._cache is not None:
            self._cache.put(key, answer)
        return answer

    def _read(
        self, answer: _Answer, num_steps: int, nonce: str, seconds: float, structured: bool
    ) -> Iterator[JudgeReply]:
        lengths = [len(text) for text, _ in answer.choices]
        written, total = 0, max(1, sum(lengths))
        for index, (text, fault) in enumerate(answer.choices):
            before, written = written, written + lengths[index]
            yield JudgeReply.read(
                text,
                num_steps,
                nonce,
                trust=self._trust,
                fault=None if fault is None else Fault(fault),
                structured=structured,
                prompt_tokens=answer.prompt_tokens if index == 0 else 0,
                completion_tokens=answer.completion_tokens * written // total
                - answer.completion_tokens * before // total,
                seconds=seconds,
            )

    def _count(self, replies: Sequence[JudgeReply]) -> None:
        """Count states; raises JudgeError if too many of the last replies have failed."""
        for reply in replies:
            self.counts[reply.state if reply.error is None else f"{reply.state}/{reply.error}"] += 1
            self._window.append(reply.state == "failed")
        full = len(self._window) == self._window.maxlen
        if full and sum(self._window) > self._max_failure_rate * len(self._window):
            raise self._outage(
                f"{sum(self._window)} of the last {len(self._window)} replies have failed, "
                f"more than max_failure_rate={self._max_failure_rate:g} allows"
            )

    def _outage(self, what: str) -> JudgeError:
        reasons = {name: count for name, count in self.counts.most_common() if name.startswith("failed/")}
        told = ", ".join(f"{name.removeprefix('failed/')} {count}" for name, count in reasons.items())
        return JudgeError(f"{self!r}: {what}; since the start: {told}")


class _Answer(NamedTuple):
    """The choices of one call, in order: text, and the `Fault` that keeps it from being read."""

    choices: list[tuple[str, str | None]]
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def restore(cls, kept: Any, count: int) -> _Answer | None:
        """From JSON; None if there is nothing."""
        if kept is None:
            return None
        choices, prompt_tokens, completion_tokens = kept
        return cls([(text, fault) for text, fault in choices][:count], prompt_tokens, completion_tokens)


def _read_answer(answer: dict[str, Any], count: int) -> _Answer:
    """The choices of a chat completion; raises CallFailed if it is none, or has other choices than were asked for."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise CallFailed(Fault.BAD_BODY.value, "no list of choices", again=True)
    numbers = [choice.get("index") for choice in choices]
    known = all(type(number) is int and 0 <= number < count for number in numbers)
    if not choices or not known or len(set(numbers)) < len(numbers):
        raise CallFailed(Fault.BAD_CHOICES.value, f"asked for {count} choices, got {numbers!r:.80}", again=True)
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return _Answer(
        [_choice(choice) for choice in sorted(choices, key=lambda choice: choice["index"])],
        _tokens(usage.get("prompt_tokens")),
        _tokens(usage.get("completion_tokens")),
    )


def _choice(choice: dict[str, Any]) -> tuple[str, str | None]:
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    fault = None
    if choice.get("finish_reason") == "length":
        fault = Fault.TRUNCATED
    elif choice.get("finish_reason") == "content_filter":
        fault = Fault.FILTERED
    elif not isinstance(text, str):
        fault = Fault.NO_CONTENT
    return text if isinstance(text, str) else "", None if fault is None else fault.value


def _tokens(count: Any) -> int:
    return count if type(count) is int and 0 <= count < 1 << 40 else 0


class _Engine:
    """A thread with an event loop, and the client that lives in it."""

    def __init__(self, make_client: Callable[[], Client], loopback_only: bool) -> None:
        self._loop = Lookup(loopback_only)
        # A daemon, so that a judge that nobody has closed does not keep the interpreter from ending.
        thread = threading.Thread(target=self._loop.run_forever, name="capo judge", daemon=True)
        thread.start()
        self._client = make_client()
        self.close = weakref.finalize(self, _end, self._loop, thread, self._client)

    def run(self, job: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
        """The result of the coroutine function called with the client; if the caller is interrupted, it is cancelled."""
        future = asyncio.run_coroutine_threadsafe(job(self._client), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: Client) -> None:
    with contextlib.suppress(TimeoutError, concurrent.futures.TimeoutError):
        asyncio.run_coroutine_threadsafe(client.close(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
