"""HTTP for judges: connections that are kept, deadlines, bounded retries, bodies read up to a limit, no redirects.

httpx2 and not the openai package: deadline, size and redirects can be decided for each attempt while its body arrives, and
nothing is retried behind our back. The key lives in one dict of headers and nowhere else.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import anyio
import httpx2

import capo
from capo.judges import Fault, JudgeError

T = TypeVar("T")

KEEPALIVE = 4.0  # seconds; uvicorn, and with it most servers, closes idle connections after 5
REQUEST_ID = "capo-"
_STOP = {401, 403, 404, 405}  # the next request would fare no better
_RETRY = {408, 409, 425, 429}


@dataclass(frozen=True)
class Limits:
    """How long, how often and how much.

    Args:
        concurrency: requests in flight, and connections.
        attempt_timeout: seconds for one attempt, from connecting to the last byte.
        deadline: seconds for a request with all its attempts and waits.
        batch_deadline: seconds for all requests of one call; what is not there by then has failed.
        retries: attempts after the first one, on 408, 409, 425, 429, 5xx, connection faults and answers that are none.
        backoff: seconds before the first retry; doubles each time, with jitter.
        max_wait: seconds, the longest wait before a retry, also where the server's ``Retry-After`` asks for more.
        max_body: bytes of an answer that are read.

    Raises:
        ValueError: a number out of range.
    """

    concurrency: int = 64
    attempt_timeout: float = 120.0
    deadline: float = 600.0
    batch_deadline: float = 3600.0
    retries: int = 6
    backoff: float = 0.5
    max_wait: float = 60.0
    max_body: int = 8 << 20

    def __post_init__(self) -> None:
        for name in ("concurrency", "attempt_timeout", "deadline", "batch_deadline", "max_wait", "max_body", "backoff"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"Limits: {name} must be above 0 and finite, got {getattr(self, name)!r}")
        if self.retries < 0:
            raise ValueError(f"Limits: retries must be at least 0, got {self.retries!r}")


class CallFailed(Exception):
    """One request has failed.

    Args:
        reason: a `capo.judges.Fault` or ``http_STATUS``.
        detail: for people; holds no secret.
        again: whether another attempt may help.
        wait: seconds the server asks to wait before it.
    """

    def __init__(self, reason: str, detail: str, *, again: bool, wait: float = 0.0) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.again, self.wait = reason, detail, again, wait


class Client:
    """POSTs JSON to one address. To be used from one event loop.

    Args:
        url: the address.
        key: goes into the Authorization header; None: no such header.
        limits: see there.
        counts: ``attempts`` and ``retries/REASON`` are counted here.
        trust_env: proxies and certificates from environment variables are used.
    """

    def __init__(self, url: str, key: str | None, limits: Limits, counts: Counter[str], trust_env: bool) -> None:
        self._url, self._limits, self._counts = httpx2.URL(url), limits, counts
        self._redact: Callable[[str], str] = (lambda text: text.replace(key, "***")) if key else (lambda text: text)
        # A compressed body could unpack to any size, so none is asked for.
        self._headers = {
            "Host": self._url.netloc.decode(),
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": f"capo/{capo.__version__}",
        }
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        # One pool for each connection: what a pool of many does for each request grows with their number.
        verify, proxy = httpx2.create_ssl_context(trust_env=trust_env), _proxy(self._url) if trust_env else None
        one = httpx2.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=KEEPALIVE)
        # And not an AsyncClient, for what that does around it: redirects, cookies, log lines.
        self._pools = [
            httpx2.AsyncHTTPTransport(verify, limits=one, proxy=proxy, trust_env=trust_env)
            for _ in range(limits.concurrency)
        ]
        # The one used last comes first: its connection is the likeliest to be open still.
        self._free: asyncio.LifoQueue[httpx2.AsyncHTTPTransport] = asyncio.LifoQueue()
        for pool in self._pools:
            self._free.put_nowait(pool)

    async def close(self) -> None:
        """Close all connections."""
        for pool in self._pools:
            await pool.aclose()

    async def post(self, body: bytes, name: str, read: Callable[[dict[str, Any]], T]) -> T:
        """Send until there is an answer that can be read, or a limit is reached.

        Args:
            body: JSON.
            name: of the request; each attempt tells the server a request id made of it.
            read: makes the result of the answer's JSON object, or raises `CallFailed`.

        Raises:
            CallFailed: the last attempt's error.
            JudgeError: the server will answer no request.
        """
        limits = self._limits
        deadline = time.monotonic() + limits.deadline
        for attempt in range(limits.retries + 1):
            timeout = min(limits.attempt_timeout, deadline - time.monotonic())
            self._counts["attempts"] += 1
            try:
                return read(await self._attempt(body, f"{REQUEST_ID}{name}.{attempt}.", timeout))
            except CallFailed as error:
                backoff = min(limits.max_wait, limits.backoff * 2**attempt) * random.uniform(0.5, 1.0)
                wait = max(backoff, min(error.wait, limits.max_wait))
                if not error.again or attempt == limits.retries or time.monotonic() + wait >= deadline:
                    raise
                self._counts[f"retries/{error.reason}"] += 1
            await anyio.sleep(wait)
        raise RuntimeError("unreachable")

    async def _attempt(self, body: bytes, request_id: str, timeout: float) -> dict[str, Any]:
        headers = {**self._headers, "X-Request-Id": request_id}
        request = httpx2.Request("POST", self._url, headers=headers, content=body)
        try:
            with anyio.fail_after(timeout):
                pool = await self._free.get()
                try:
                    response = await pool.handle_async_request(request)
                    try:
                        content = await self._content(response)
                    finally:
                        await response.aclose()
                finally:
                    self._free.put_nowait(pool)
        except TimeoutError:
            raise CallFailed(Fault.DEADLINE.value, f"no answer in {timeout:.3g} s", again=True) from None
        except (httpx2.TransportError, OSError) as error:
            # The text of such an error may quote what was sent.
            raise CallFailed(Fault.CONNECTION.value, type(error).__name__, again=True) from None
        if response.status_code != 200:
            raise self._refusal(response, content)
        return self._answer(response, content, request_id)

    async def _content(self, response: httpx2.Response) -> bytes:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise CallFailed(Fault.BAD_BODY.value, "a compressed body, which was not asked for", again=False)
        chunks, length = [], 0
        stream = cast(httpx2.AsyncByteStream, response.stream)  # as it comes: nothing is decoded
        async for chunk in stream:
            length += len(chunk)
            if length > self._limits.max_body:
                raise CallFailed(Fault.TOO_LARGE.value, f"over {self._limits.max_body} bytes", again=False)
            chunks.append(chunk)
        return b"".join(chunks)

    def _refusal(self, response: httpx2.Response, content: bytes) -> CallFailed:
        """What an answer of another status than 200 means; raises JudgeError where it is the end."""
        status = response.status_code
        detail = f"status {status}: {self._excerpt(content)!r}"
        if status < 400:
            target = urlsplit(response.headers.get("Location", "")).hostname
            raise JudgeError(f"{self._url}: status {status}, a redirect to {target!r}; redirects are not followed")
        if status in _STOP:
            raise JudgeError(f"{self._url}: {detail}; is the address, the model's name, the key right?")
        again = status in _RETRY or status >= 500
        wait = retry_after(response.headers.get("Retry-After"))
        return CallFailed(f"http_{status}", detail, again=again, wait=wait)

    def _answer(self, response: httpx2.Response, content: bytes, request_id: str) -> dict[str, Any]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            detail = f"status 200, but no JSON object: {self._excerpt(content)!r}"
            raise CallFailed(Fault.BAD_BODY.value, detail, again=True)
        # Servers that know the header give it back, or (vLLM) build the answer's id of it; others have ids of their own.
        for told in (response.headers.get("X-Request-Id"), answer.get("id")):
            if isinstance(told, str) and REQUEST_ID in told and request_id not in told:
                raise CallFailed(Fault.WRONG_ID.value, f"asked {request_id}, got {told[:100]!r}", again=True)
        return answer

    def _excerpt(self, content: bytes) -> str:
        """The beginning of an answer, for people; servers have been seen to echo the key."""
        return self._redact(content[:4096].decode("utf-8", "replace"))[:200]


def _proxy(url: httpx2.URL) -> str | None:
    return None if proxy_bypass(url.host) else getproxies().get(url.scheme)


def retry_after(value: str | None) -> float:
    """Seconds to wait by a Retry-After header, in seconds or as a date; 0 if it says nothing sensible."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
        seconds = (date - datetime.now(timezone.utc)).total_seconds()
    return seconds if seconds > 0 else 0.0
