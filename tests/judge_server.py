"""A small OpenAI-compatible server that answers right, or in any of many wrong ways; for tests and benchmarks.

It reads the prompt as a judge would: a step is wrong if its text says so. Which way a request is answered is decided by a
function of the request. Runs in a thread (`FakeServer`) or, so as not to share the client's interpreter, as a process
(`python judge_server.py`, which prints its port; ends when its standard input does).
"""

import asyncio
import contextlib
import datetime
import email.utils
import gzip
import hashlib
import json
import re
import socket
import struct
import sys
import threading

CLOSE = object()

# Each ends as a failed attempt, an invalid reply or a valid one; never as other flags than the true ones.
FAULTS = [
    "reset", "reset_body", "stall", "drip", "429", "429_date", "408", "500", "503", "html", "truncated_json", "array",
    "wrong_id", "swapped", "wrong_index", "same_index", "more", "fewer", "none", "null", "refusal", "empty", "length",
    "filter", "slow", "garbage",
]  # fmt: skip


def read_prompt(prompt):
    """Nonce and flagged steps of a prompt, as a faultless judge finds them."""
    nonce = re.search(r"\[Solution To Judge:?(\w*)\]\n", prompt)[1]
    steps = re.findall(rf"<step_(\d+):{nonce}>\n(.*?)\n</step_\1:{nonce}>", prompt, re.DOTALL)
    return nonce, [int(number) for number, text in steps if "wrong" in text]


def answer_text(prompt, structured=False, nonce=None):
    true_nonce, flagged = read_prompt(prompt)
    nonce = nonce or true_nonce
    if structured:
        verdict = "incorrect" if flagged else "correct"
        return json.dumps({"nonce": nonce, "verdict": verdict, "incorrect_steps": flagged})
    lines = [f"Judgment: Is the solution correct (Yes/No)? {'No' if flagged else 'Yes'}"]
    # The list stands there also if it is empty: its nonce says whose answer this is.
    lines.append(f"<incorrect_steps:{nonce}>{','.join(map(str, flagged))}</incorrect_steps:{nonce}>")
    return "\n".join(lines)


def completion(body, request_id, **changes):
    count = body.get("n", 1)
    text = answer_text(body["messages"][0]["content"], "response_format" in body, changes.pop("nonce", None))
    message = {"role": "assistant", "content": changes.pop("content", text)}
    reason = changes.pop("finish_reason", "stop")
    indices = changes.pop("indices", range(count))
    choices = [{"index": index, "message": message, "finish_reason": reason} for index in indices]
    usage = {"prompt_tokens": 100, "completion_tokens": 10 * len(choices)}
    answer = {"id": f"chatcmpl-{request_id}", "object": "chat.completion", "choices": choices, "usage": usage}
    return {**answer, **changes}


class FakeServer:
    """Serves on a free port of 127.0.0.1 while in the `with` block.

    Args:
        behave: takes body and headers of a request, gives the name of what to do; None: always "healthy".
        delay: seconds before each answer.
    """

    def __init__(self, behave=None, delay=0.0):
        self.behave, self.delay = behave or (lambda body, headers: "healthy"), delay
        self.requests, self.in_flight, self.most_in_flight, self.connections, self.hung_up = [], 0, 0, 0, 0
        self.keep = True  # requests, for tests to look at

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()

        def run():
            asyncio.set_event_loop(self.loop)
            self.loop.run_until_complete(self._start())
            ready.set()
            self.loop.run_forever()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        ready.wait()
        return self

    def __exit__(self, *_):
        async def stop():
            self.server.close()
            for task in asyncio.all_tasks():
                if task is not asyncio.current_task():
                    task.cancel()
            await asyncio.sleep(0.01)

        asyncio.run_coroutine_threadsafe(stop(), self.loop).result(5)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    async def _start(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        self.port = self.server.sockets[0].getsockname()[1]

    async def _serve(self, reader, writer):
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                lines = head.split("\r\n")
                headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines[1:] if line)}
                body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"null")
                if self.keep:
                    self.requests.append((body, headers))
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    if await self._answer(reader, writer, body, headers) is CLOSE:
                        break
                finally:
                    self.in_flight -= 1
        writer.close()

    async def _answer(self, reader, writer, body, headers):
        kind = self.behave(body, headers)
        request_id = headers.get("x-request-id", "none")
        if self.delay:
            await asyncio.sleep(self.delay)
        if kind == "reset":
            # Zero linger: the peer gets a reset, not an orderly end.
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return CLOSE
        status, more, content = _reply(kind, body, request_id)
        head = f"HTTP/1.1 {status} X\r\n" + "".join(f"{name}: {value}\r\n" for name, value in more.items())
        if kind == "endless":
            writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            while not writer.is_closing():
                writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                await writer.drain()
            return CLOSE
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode())
        if kind == "reset_body":
            writer.write(data[: len(data) // 2])
            await writer.drain()
            return CLOSE
        if kind == "stall" and await asyncio.wait_for(reader.read(1), 60) == b"":
            self.hung_up += 1
            return CLOSE
        if kind == "drip":
            for byte in data[:-1]:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.05)
            data = data[-1:]
        if kind == "slow":
            await asyncio.sleep(0.2)
        writer.write(data)
        await writer.drain()


def _reply(kind, body, request_id):
    """Status, headers and content."""
    count = body.get("n", 1)
    status, headers, content = 200, {"Content-Type": "application/json", "X-Request-Id": request_id}, None
    make = lambda **changes: completion(body, request_id, **changes)
    later = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=1)
    error = {"error": {"message": f"{kind}, says the server"}}
    match kind:
        case "429":
            status, content, headers["Retry-After"] = 429, error, "0.02"
        case "429_date":
            status, content, headers["Retry-After"] = 429, error, email.utils.format_datetime(later, usegmt=True)
        case "429_long":
            status, content, headers["Retry-After"] = 429, error, "1000000000"
        case "html":
            content = b"<html><head><title>502 Bad Gateway</title></head></html>"
        case "truncated_json":
            content = json.dumps(make()).encode()[:-20]
        case "array":
            content = [make()]
        case "deep":
            content = b"[" * 100_000
        case "wrong_id":
            headers["X-Request-Id"] = "capo-0000000000000000-0.0."
            content = make(id="chatcmpl-capo-0000000000000000-0.0.")
        case "swapped":
            content = make(nonce="0123456789ab")
        case "wrong_index":
            content = make(indices=range(1, count + 1))
        case "same_index":
            content = make(indices=[0] * count if count > 1 else [])
        case "more":
            content = make(indices=range(count + 1))
        case "fewer" | "ignores_n":
            content = make(indices=range(max(1, count - 1) if kind == "fewer" else 1))
        case "none":
            content = make(indices=[])
        case "null":
            content = make(content=None)
        case "refusal":
            content = make(content="I'm sorry, but I cannot help with marking this solution.")
        case "empty":
            content = make(content="")
        case "length" | "filter":
            content = make(finish_reason={"length": "length", "filter": "content_filter"}[kind])
        case "garbage":
            content = make(content="Judgment: perhaps\n<incorrect_steps>0,1,2</incorrect_steps>")
        case "gzip":
            headers["Content-Encoding"], content = "gzip", gzip.compress(json.dumps(make()).encode())
        case "redirect":
            status, headers["Location"], content = 307, "http://169.254.169.254/latest", {}
        case "echo":
            status, content = 401, error
        case "no_usage":
            content = make(usage=None)
        case kind if kind.isdigit():
            status, content = int(kind), error
        case _:
            content = make()
    return status, headers, content


def often(share, faults=FAULTS, patience=3):
    """A behaviour: this share of the attempts meets a fault, drawn by request id; so does no attempt after the first few."""

    def behave(body, headers):
        request_id = headers.get("x-request-id", "")
        digest = hashlib.sha256(request_id.encode()).digest()
        attempt = int(request_id.split(".")[1]) if "." in request_id else 0
        if attempt >= patience or int.from_bytes(digest[:4], "big") >= share * 2**32:
            return "healthy"
        return faults[int.from_bytes(digest[4:8], "big") % len(faults)]

    return behave


def echo_key(body, headers):
    return "echo"


def main():
    share, delay = (float(value) for value in sys.argv[1:3])
    server = FakeServer(often(share) if share else None, delay)
    server.keep = False
    with server:
        print(server.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
