"""Compares answers with Math-Verify, in processes that can be killed. Run as a script by `capo.verify_pool`; imports
no capo.

The nursery imports Math-Verify once, warms it up with answers of its own, and then only forks and watches: it parses no
answer and evaluates nothing. Workers are forked from it, single-threaded as it is, compare a few pairs each and end, so
that nothing a pair leaves behind lives long. The kernel ends a worker that exceeds its wall clock, which starts when
the worker begins a pair, or its processor time. The nursery keeps the wall clock, too, and does not wait for the end: on a
busy machine a process may take a second to die.

Both ends speak JSON lines. In: one object of options, then ``[number, known, given]``. Out: ``{"ready": ...}`` or
``{"error": ...}``, then ``[number, verdict]``.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import logging
import os
import re
import resource
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

# More than one word a kind, so that counts can tell them apart; "right" and "wrong" are the only decisions.
VERDICTS = ("right", "wrong", "parse", "size", "memory", "timeout", "crash")
LIFE = 32  # pairs that a worker compares before another takes its place
STUCK = 0.08  # seconds of processor time after which a comparison may hang: it no longer keeps others from beginning
SLOWER = 5  # by how much its worker is made nicer
TICK = 0.02  # seconds between two looks at the workers

# Known pairs, for warming up and for the test at the start: known answer, given answer, verdict.
KNOWN_PAIRS = (
    ("x+1", "1+x", "right"),
    ("x+1", "x+2", "wrong"),
    (r"\frac{\pi}{2}", r"\pi/2", "right"),
    (r"\frac{\pi}{2}", r"\frac{\pi}{3}", "wrong"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", "right"),
    ("2*sqrt(3)", r"2\sqrt{3}", "right"),
    ("x**10", "x^{10}", "right"),
    ("x**10", "x^{11}", "wrong"),
    ("(x+1)^2", "x^2+2x+1", "right"),
    ("(x+1)^2", "x^2+1", "wrong"),
    (r"\{1,2\}", r"\{2,1\}", "right"),
    ("1,2,3", "3,2,1", "right"),
    ("1,2,3", "3", "wrong"),
    ("3", "1,2,3", "wrong"),
    ("(1,2)", "[1,2]", "wrong"),
    (r"(-\infty, 2]", r"(-\infty,2]", "right"),
    (r"[0,1)\cup(2,3]", r"(2,3]\cup[0,1)", "right"),
    ("x<2", r"(-\infty,2)", "right"),
    ("5", "x=5", "right"),
    (r"\pm 2", "2,-2", "right"),
    (r"\pm 2", "2", "wrong"),
    ("2+3i", "3i+2", "right"),
    ("2+3i", "2-3i", "wrong"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", "right"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", "wrong"),
    (r"\log_2 8", "3", "right"),
    (r"\sin^2 x+\cos^2 x", "1", "right"),
    ("5!", "120", "right"),
    (r"\binom{5}{2}", "10", "right"),
    ("e^{x}", "e^{2x}", "wrong"),
    ("y=2x+1", "y=1+2x", "right"),
    (r"\frac{1}{2}", r"\int_0^1 x dx", "right"),
    ("1", r"\lim_{x\to 0}\frac{\sin x}{x}", "right"),
    ("55", r"\sum_{n=1}^{10} n", "right"),
    ("x+1", r"\frac{1}{", "wrong"),
    (r"\frac{1}{", "1", "parse"),
)


_LIBC = ctypes.CDLL(None)

# What SymPy imports only when it is needed; a worker may not compile anything, so not import these either.
_LAZY = (
    "combinatorics.perm_groups",
    "concrete.gosper",
    "concrete.summations",
    "functions.special.hyper",
    "integrals.heurisch",
    "integrals.manualintegrate",
    "integrals.meijerint",
    "integrals.risch",
    "physics.units",
    "series.gruntz",
    "series.limits",
    "series.formal",
    "sets.handlers.functions",
    "sets.setexpr",
    "simplify.hyperexpand",
    "solvers.inequalities",
    "solvers.ode",
    "solvers.solveset",
    "tensor.tensor",
)

# ---- comparing


def load() -> Callable[[str, str], str]:
    """Import Math-Verify and make it safe; returns what compares a known with a given answer.

    It is never handed a text to search: its search leads to SymPy's `parse_expr`, which calls `eval`. Its LaTeX grammar
    does not, but builds numbers with `sympy.Number(text)`, which does through `sympify`; so `parse_expr` is replaced
    by a reader of plain numbers.
    """
    import sympy
    from latex2sympy2_extended import latex2sympy2
    from math_verify import grader, parser
    from sympy.parsing import sympy_parser

    logging.disable(logging.CRITICAL)
    for name in _LAZY:
        importlib.import_module(f"sympy.{name}")
    fraction = re.compile(r"(-?[0-9]+)(?:/([0-9]+))?")
    decimal = re.compile(r"-?(?:[0-9]*\.[0-9]+|[0-9]+\.|[0-9]+(?=[eE]))(?:[eE][+-]?[0-9]{1,3})?")

    def number(text: str, *args: Any, **options: Any) -> Any:
        match = fraction.fullmatch(text)
        if match:
            return sympy.Rational(int(match[1]), int(match[2] or 1))
        if decimal.fullmatch(text):
            return sympy.Float(text)
        raise Refused(f"{text!r:.60} is no number")

    for module in (sympy_parser, latex2sympy2, parser):
        module.parse_expr = number  # type: ignore[attr-defined]
    # Its comparison takes any exception for "not equal". These are none: the answer was not compared.
    faults = (MemoryError, RecursionError, OSError, ImportError)
    grader.Exception = _all_but(faults)  # type: ignore[attr-defined]
    config = parser.LatexExtractionConfig().normalization_config

    def parse(written: str) -> Any:
        latex = latex2sympy2.normalize_latex(ascii_to_latex(written), config=config)
        is_real = not grader.should_treat_as_complex(latex)
        value = latex2sympy2.latex2sympy(latex, is_real=is_real, convert_degrees=False, normalization_config=None)
        if not isinstance(value, (sympy.Basic, sympy.MatrixBase)) or value.has(sympy.nan, sympy.zoo):
            raise ValueError("no value")
        return value

    def compare(known: str, given: str) -> str:
        try:
            try:
                value = parse(known)
            except faults:
                raise
            except Exception:  # noqa: BLE001  its parser raises plain Exception
                return "parse"
            try:
                other = parse(given)
            except faults:
                raise
            except Exception:  # noqa: BLE001
                return "wrong"
            # It compares a lone symbol by its name only.
            if isinstance(value, sympy.Symbol) or isinstance(other, sympy.Symbol):
                value, other = value.doit(), other.doit()
            equal = grader.verify(value, other, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)
            return "right" if equal else "wrong"
        except MemoryError:
            return "memory"
        except RecursionError:
            return "size"

    return compare


class Refused(BaseException):
    """Something was about to be run that has no place here. No `except Exception` stops it."""


def _all_but(faults: tuple[type[Exception], ...]) -> tuple[type[Exception], ...]:
    """All exception classes that are none of these and have none of these below them."""
    found, stack = [], [Exception]
    while stack:
        for kind in type.__subclasses__(stack.pop()):
            if kind in faults:
                continue
            if any(issubclass(fault, kind) for fault in faults):
                stack.append(kind)
            else:
                found.append(kind)
    return tuple(found)


def ascii_to_latex(written: str) -> str:
    """An expression in the notation of programs, ``2*sqrt(x)**10``, as LaTeX; anything with a backslash stays as it
    is."""
    if "\\" in written:
        return written
    text = written.replace("**", "^")
    text = re.sub(r"(?:\^ ?-?[0-9A-Za-z.]+ ?)+", _powers, text)
    text = re.sub(r"(?<![A-Za-z\\])(pi|theta|alpha|beta|infty|sin|cos|tan|log|ln)(?![a-z])", r"\\\1 ", text)
    text = re.sub(r"(?<![A-Za-z\\])(?:infinity|oo|inf)(?![A-Za-z])", r"\\infty ", text)
    text = re.sub(r"(?<![A-Za-z\\])sqrt ?\(([^()]*)\)", r"\\sqrt{\1}", text)
    return text.replace("*", r"\cdot ")


def _powers(match: re.Match[str]) -> str:
    """``^a^b`` as ``^{a^{b}}``: a power of a power is one of its exponent."""
    exponents = [exponent.strip() for exponent in match[0].split("^")[1:]]
    return "".join(f"^{{{exponent}" for exponent in exponents) + "}" * len(exponents)


# ---- a worker


def _forbid(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: what a comparison has no business with. SymPy compiles functions of its own for polynomials."""
    if event == "compile":
        source, name = args[0], str(args[1])
        own = isinstance(source, (bytes, str)) and source[:13] in (b"def monomial_", "def monomial_")
        if not own and not name.endswith(".py"):
            raise Refused(event)
    elif event == "open":
        mode, flags = args[1], args[2]
        if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise Refused(event)
    elif event.startswith(("socket.", "subprocess.", "os.", "shutil.", "ctypes.", "pickle.")) and event not in (
        "os.listdir",
        "os.scandir",
    ):  # those two are how modules are found
        raise Refused(event)


def work(pairs: int, verdicts: int, options: dict[str, Any], compare: Callable[[str, str], str]) -> None:
    """Compare the pairs that come in, until none comes; never returns."""
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the nursery
        _LIBC.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    memory = _address_space() + int(options["memory"])
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 32),
    ):
        resource.setrlimit(kind, (most, most))
    clocks = (signal.ITIMER_REAL, float(options["timeout"])), (signal.ITIMER_PROF, float(options["cpu"]))
    setitimer = signal.setitimer
    sys.addaudithook(_forbid)
    with os.fdopen(pairs, "rb") as inbox:
        for line in inbox:
            for clock, seconds in clocks:
                setitimer(clock, seconds)  # when it runs out, the default action of its signal ends this process
            os.write(verdicts, f"begun {time.monotonic()}\n".encode())
            known, given, crowd = json.loads(line)
            if crowd:
                os.sched_yield()  # all of it is to begin before any of it takes its time
            try:
                verdict = compare(known, given)
            except (Refused, Exception):  # noqa: BLE001  a fault of the comparison, counted as such
                verdict = "crash"
            for clock, _ in clocks:
                setitimer(clock, 0)
            os.write(verdicts, f"{verdict}\n".encode())
    os._exit(0)


def _address_space() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 30  # not Linux


# ---- the nursery


class Worker:
    """A forked process, as the nursery sees it."""

    def __init__(self, options: dict[str, Any], compare: Callable[[str, str], str], others: list[int]) -> None:
        pairs, self.pairs = os.pipe()
        self.verdicts, verdicts = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            # Nothing may reach the code of the nursery again.
            try:
                for channel in (self.pairs, self.verdicts, *others):
                    os.close(channel)
                work(pairs, verdicts, options, compare)
            finally:
                os._exit(1)
        os.close(pairs)
        os.close(verdicts)
        self.item: list[Any] | None = None
        self.begun: float | None = None
        self.stuck = False
        self.before = 0.0
        self.done = 0
        self.heard = b""

    def take(self, item: list[Any], crowd: bool) -> None:
        self.item, self.begun, self.stuck, self.before = item, None, False, self.clock()
        try:
            os.write(self.pairs, json.dumps([*item[1:], crowd]).encode() + b"\n")
        except BrokenPipeError:
            pass  # it is dead, and the other pipe will say so

    def clock(self) -> float:
        """Processor time of the process; wall clock where the system does not tell."""
        try:
            return time.clock_gettime(~self.pid << 3 | 2)  # Linux: the clock of another process
        except OSError:
            return time.monotonic()

    def spent(self) -> float:
        """Seconds of processor time on the pair at work. Wall clock says nothing on a busy machine."""
        return self.clock() - self.before if self.item is not None else 0.0

    def end(self) -> None:
        """Let the process end, if it has not ended by itself; `ended` says when it has."""
        os.close(self.pairs)
        os.close(self.verdicts)
        os.kill(self.pid, signal.SIGKILL)

    def ended(self, wait: bool = False) -> int | None:
        """The wait status of a process that was ended, once; None while it is still dying."""
        pid, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
        return status if pid else None


class Nursery:
    """Hands pairs to workers, one pair each at a time, and reports the verdicts."""

    def __init__(self, source: int, sink: int, options: dict[str, Any], compare: Callable[[str, str], str]) -> None:
        self.source, self.sink = source, sink
        self.options, self.compare = options, compare
        self.workers: dict[int, Worker] = {}  # by the descriptor of their verdicts
        self.dying: list[Worker] = []
        self.inbox: deque[list[Any]] = deque()
        self.outbox = b""
        self.half = b""  # a line that has not arrived whole
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.busy = 0
        os.set_blocking(source, False)
        os.set_blocking(sink, False)

    def run(self) -> None:
        """Serve until the other end closes; never blocks on either end."""
        try:
            while True:
                self._hand_out()
                # Forking is slow on a busy machine, so what may be needed at once is forked when there is nothing to
                # do.
                short = not self.busy and len(self.workers) < self.options["workers"]
                wait = 0.0 if short else TICK if self.busy or self.dying else None
                readable, writable, _ = select.select(
                    [self.source, *self.workers], [self.sink] if self.outbox else [], [], wait
                )
                if self.source in readable and not self._receive():
                    return
                for channel in readable:
                    if channel in self.workers:
                        self._listen(self.workers[channel])
                if short and not readable:
                    self._fork()
                self._watch()
                self._reap()
                if writable:
                    self.outbox = self.outbox[os.write(self.sink, self.outbox) :]
        except BrokenPipeError:
            return
        finally:
            for worker in self.workers.values():
                worker.end()
            for worker in (*self.workers.values(), *self.dying):
                worker.ended(wait=True)

    def report(self, message: Any) -> None:
        self.outbox += json.dumps(message).encode() + b"\n"

    def _receive(self) -> bool:
        data = os.read(self.source, 1 << 20)
        *lines, self.half = (self.half + data).split(b"\n")
        self.inbox.extend(json.loads(line) for line in lines)
        return bool(data)

    def _hand_out(self) -> None:
        idle = []
        for worker in list(self.workers.values()):
            if worker.item is None and worker.done and (worker.done >= LIFE or not self.inbox):
                self._bury(worker)
            elif worker.item is None:
                idle.append(worker)
        self.busy = len(self.workers) - len(idle)
        # As many as there are cores, beside those that may hang: harmless ones would starve each other. But where most of
        # what is at work may hang, all of it at once: the last has to begin soon after the first, to end soon after it.
        stuck = sum(worker.stuck for worker in self.workers.values())
        hostile = stuck >= max(self.cores, self.busy / 2)
        allowed = self.options["workers"] if hostile else min(self.cores + stuck, self.options["workers"])
        while self.inbox and self.busy < allowed and len(self.dying) < self.options["workers"]:
            (idle.pop() if idle else self._fork()).take(self.inbox.popleft(), hostile)
            self.busy += 1

    def _fork(self) -> Worker:
        channels = [channel for worker in self.workers.values() for channel in (worker.pairs, worker.verdicts)]
        worker = Worker(self.options, self.compare, [self.source, self.sink, *channels])
        self.workers[worker.verdicts] = worker
        return worker

    def _listen(self, worker: Worker) -> None:
        data = os.read(worker.verdicts, 4096)
        *lines, worker.heard = (worker.heard + data).split(b"\n")
        for line in lines:
            word = line.decode("ascii", "replace")
            if word.startswith("begun "):  # written before the pair is looked at; this process may be late to read it
                worker.begun = float(word[6:])
            elif worker.item is not None:
                self.report([worker.item[0], word if word in VERDICTS else "crash"])
                worker.item, worker.stuck = None, False
                worker.done += 1
        if not data:
            self._bury(worker)

    def _bury(self, worker: Worker, verdict: str | None = None) -> None:
        """End a worker. What it was at is reported at once with a verdict, without one when it is known how it ended."""
        del self.workers[worker.verdicts]
        if verdict is not None and worker.item is not None:
            self.report([worker.item[0], verdict])
            worker.item = None
        worker.end()
        self.dying.append(worker)

    def _reap(self) -> None:
        left = []
        for worker in self.dying:
            status = worker.ended()
            if status is None:
                left.append(worker)
            elif worker.item is not None:
                ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
                clocks = (signal.SIGALRM, signal.SIGPROF, signal.SIGXCPU)
                self.report([worker.item[0], "timeout" if ended_by in clocks else "crash"])
        self.dying = left

    def _watch(self) -> None:
        now = time.monotonic()
        for worker in list(self.workers.values()):
            if worker.item is None or worker.begun is None:
                continue
            if now - worker.begun > self.options["timeout"]:
                self._bury(worker, "timeout")
            elif not worker.stuck and worker.spent() > STUCK:
                worker.stuck, worker.done = True, LIFE  # its last pair
                os.setpriority(os.PRIO_PROCESS, worker.pid, os.getpriority(os.PRIO_PROCESS, 0) + SLOWER)


def main() -> None:
    """Read the options, warm up, serve."""
    source, sink = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for channel in (0, 1):  # what a library prints must not get between the lines
        os.dup2(null, channel)
    for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(kind, (0, 0))
    for number in (signal.SIGALRM, signal.SIGPROF, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    with os.fdopen(os.dup(source), "rb", buffering=0) as first:
        options = json.loads(first.readline())
    sys.path.extend(path for path in options["path"] if path not in sys.path)
    try:
        compare = load()
        for known, given, _ in KNOWN_PAIRS:
            compare(known, given)
    except Exception as error:  # noqa: BLE001  the parent raises it
        os.write(sink, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        return
    # What the workers share with the nursery stays shared while nobody writes to it.
    gc.collect()
    gc.freeze()
    gc.disable()
    nursery = Nursery(source, sink, options, compare)
    nursery.report({"ready": os.getpid()})
    nursery.run()


if __name__ == "__main__":
    main()
