"""The pool of processes behind `capo.verify`: started when first needed, restarted when it dies, ended with its user."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from capo.errors import VerifierError
from capo.verify_worker import KNOWN_PAIRS

_SCRIPT = Path(__file__).with_name("verify_worker.py")
# Not `python FILE`: that would put capo's folder, with modules named like others, in front of the import path.
_BOOTSTRAP = "import sys, runpy; del sys.path[0]; runpy.run_path(sys.argv[1], run_name='__main__')"
_TRIES = 2  # nurseries that an item may see die before it is given up
_STARTS = 3  # failed starts in a row before that is an error


@dataclass(frozen=True)
class Limits:
    """What one comparison, and the pool, may use; see `capo.verify.Verifier`."""

    timeout: float
    cpu: float
    memory: int
    workers: int
    start: float
    stall: float


@dataclass
class _Batch:
    verdicts: list[str | None]
    left: int
    error: str | None = None


@dataclass
class _Item:
    batch: _Batch
    place: int
    line: bytes
    tries: int = field(default=0)


class Pool:
    """Compares pairs of answers in other processes. Any thread may call it, and several at once.

    Args:
        limits: what is allowed.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._reset()
        _POOLS.add(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._writing = threading.Lock()
        self._testing = threading.Lock()
        self._tested = False
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._pending: dict[int, _Item] = {}
        self._next = 0

    def forget(self) -> None:
        """In a forked child: the processes belong to the parent, this copy begins anew."""
        process = self._process
        closed = self._closed
        if process is not None:
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
            process.returncode = 0  # not ours to wait for
        self._reset()
        self._closed = closed

    @property
    def pid(self) -> int | None:
        """The process that the workers are forked from; None where none is running."""
        with self._changed:
            return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the processes, and see that known pairs of answers come out as they should.

        Raises:
            VerifierError: they do not.
        """
        with self._testing:
            if self._tested:
                return
            rest = list(KNOWN_PAIRS)
            for _ in range(3):  # a machine under load may run out of time, but nothing makes a wrong verdict right
                verdicts = self._compare([(known, given) for known, given, _ in rest])
                failed = [(*pair, verdict) for pair, verdict in zip(rest, verdicts, strict=True) if verdict != pair[2]]
                rest = [pair[:3] for pair in failed if pair[3] in ("timeout", "crash")]
                if len(rest) < len(failed) or not rest:
                    break
            if failed:
                known, given, wanted, verdict = failed[0]
                self.close()
                raise VerifierError(
                    f"the verifier's self-test failed for {len(failed)} of {len(KNOWN_PAIRS)} pairs: "
                    f"{given!r} against {known!r} is {verdict}, not {wanted}"
                )
            self._tested = True

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """The verdict on each pair (known answer, given answer): right, wrong, or a reason why there is none.

        Raises:
            VerifierError: the processes do not start, or the pool is closed.
        """
        if not pairs:
            return []
        self.start()
        return self._compare(pairs)

    def _compare(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        batch = _Batch([None] * len(pairs), len(pairs))
        with self._changed:
            if self._closed:
                raise VerifierError("the verifier is closed")
            if self._process is None:
                self._launch()
            numbers = range(self._next, self._next + len(pairs))
            self._next += len(pairs)
            for place, (number, pair) in enumerate(zip(numbers, pairs, strict=True)):
                line = json.dumps([number, *pair]).encode() + b"\n"
                self._pending[number] = _Item(batch, place, line)
            process = self._process
            message = b"".join(self._pending[number].line for number in numbers)
        self._send(process, message)
        with self._changed:
            while batch.left and batch.error is None:
                self._changed.wait()
        if batch.error is not None:
            raise VerifierError(batch.error)
        return [verdict or "crash" for verdict in batch.verdicts]

    def _launch(self) -> None:
        # No variable of ours reaches it; the fixed seed makes SymPy's order of things the same in every run.
        environment = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C.UTF-8"}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        try:
            process = subprocess.Popen(
                [sys.executable, "-s", "-c", _BOOTSTRAP, str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=environment,
                cwd="/",
                start_new_session=True,  # an interrupt from the keyboard is the parent's to handle
            )
        except OSError as error:
            raise VerifierError(f"the verifier's process does not start: {error}") from None
        options = {
            "timeout": self._limits.timeout,
            "cpu": self._limits.cpu,
            "memory": self._limits.memory,
            "workers": self._limits.workers,
            "path": [path for path in sys.path if os.path.isabs(path)],
        }
        self._process = process
        self._send(process, json.dumps(options).encode() + b"\n")
        if threading.current_thread() is not self._reader:
            self._reader = threading.Thread(target=self._read, name="capo-verify", daemon=True)
            self._reader.start()

    def _send(self, process: subprocess.Popen[bytes] | None, message: bytes) -> None:
        if process is None or process.stdin is None:
            return
        try:
            with self._writing:
                rest = memoryview(message)
                while rest:
                    rest = rest[process.stdin.write(rest) or 0 :]
        except (BrokenPipeError, ValueError):
            pass  # it is dead; the reader notices, and sends what is pending to the next one

    # ---- the thread that reads what comes back

    def _read(self) -> None:
        failures = 0
        while True:
            process = self._process
            if process is None:
                return
            ready, error = self._serve(process)
            failures = 0 if ready else failures + 1
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
            with self._changed:
                if self._closed or not self._pending:
                    self._process = None
                    self._reader = None
                    self._fail("the verifier was closed")
                    return
                if failures >= _STARTS or error:
                    self._process = None
                    self._reader = None
                    self._fail(f"the verifier's process does not start: {error or 'it ends at once'}")
                    return
                self._give_up()
                try:
                    self._launch()
                except VerifierError as fault:
                    self._process = None
                    self._reader = None
                    self._fail(str(fault))
                    return
                process = self._process
                message = b"".join(item.line for item in self._pending.values())
            self._send(process, message)

    def _serve(self, process: subprocess.Popen[bytes]) -> tuple[bool, str]:
        """Take verdicts until the process ends or falls silent; returns whether it ever was ready, and its
        complaint."""
        stdout = process.stdout
        ready, error, half = False, "", b""
        if stdout is None:
            return ready, error
        heard = time.monotonic()
        poll = select.poll()  # not select(), which takes no descriptor above 1023
        poll.register(stdout, select.POLLIN)
        while True:
            if not poll.poll(1000):
                with self._changed:
                    waiting = bool(self._pending)
                heard = heard if waiting else time.monotonic()
                if time.monotonic() - heard > (self._limits.stall if ready else self._limits.start):
                    return ready, error
                continue
            data = os.read(stdout.fileno(), 1 << 16)
            if not data:
                return ready, error
            heard = time.monotonic()
            *lines, half = (half + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if isinstance(message, dict):
                    ready, error = "ready" in message, message.get("error", "")
            self._settle([message for message in map(json.loads, lines) if isinstance(message, list)])

    def _settle(self, messages: list[list]) -> None:
        with self._changed:
            for number, verdict in messages:
                item = self._pending.pop(number, None)
                if item is not None:
                    item.batch.verdicts[item.place] = verdict
                    item.batch.left -= 1
            self._changed.notify_all()

    def _give_up(self) -> None:
        """Count a death against what is pending; what has seen too many is not tried again."""
        for number, item in list(self._pending.items()):
            item.tries += 1
            if item.tries >= _TRIES:
                del self._pending[number]
                item.batch.verdicts[item.place] = "crash"
                item.batch.left -= 1
        self._changed.notify_all()

    def _fail(self, error: str) -> None:
        for item in self._pending.values():
            item.batch.error = error
        self._pending.clear()
        self._changed.notify_all()

    def close(self) -> None:
        """End the processes. Comparisons that are under way in other threads raise VerifierError."""
        with self._changed:
            self._closed = True
            process, reader = self._process, self._reader
        if process is not None:
            process.kill()  # its workers end with it
        if reader is not None and reader is not threading.current_thread():
            reader.join(5.0)


_POOLS: weakref.WeakSet[Pool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_POOLS):
        pool.forget()


os.register_at_fork(after_in_child=_after_fork)
