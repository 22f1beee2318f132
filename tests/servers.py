"""Real servers for tests: a command line, a port, and patience until it answers."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def serving(command, port, *, health="/health", timeout=120.0, env=None):
    """Run a server while in the block; gives its address, with ``/v1``.

    Args:
        command: its words.
        port: where it will listen on 127.0.0.1, see `free_port`.
        health: a path that answers with status 200 once the server is ready.
        timeout: seconds until it must be.
        env: environment variables beside those of this process.

    Raises:
        RuntimeError: it ended or was not ready in time; with the last lines it wrote.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})},
            start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + timeout
            while not _answers(f"http://127.0.0.1:{port}{health}"):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]}: not ready (exit code {process.poll()}):\n{log.read()[-3000:]}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            # The whole session: servers have workers.
            for stop in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, stop)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)


def _answers(address):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False
