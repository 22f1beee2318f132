"""Times every op of capo next to its floor and its peers; see README.md beside this file.

    python benchmarks/run.py [--op policy_loss] [--quick]

The op's tests run first: if they fail there are no numbers. Results go to results/<machine>/<op>.csv, one row a measurement.
"""

from __future__ import annotations

import csv
import datetime
import functools
import gc
import importlib.metadata
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch._inductor.config
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from table import OPS
from variants import FLOOR, FRESH_FLOOR, Op, Skip, Timed, Variant

import capo

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
COLUMNS = [
    "op",
    "variant",
    "backend",
    "what",
    "dtype",
    "shape",
    "inputs",
    "live",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "cpu_ms",
    "rounds",
    "ratio_floor",
    "ratio_fresh_floor",
    "tokens_per_s",
    "first_call_ms",
    "extra_memory_mb",
    "value_error",
    "gradient_error",
    "note",
    "capo",
    "git",
    "torch",
    "cpu",
    "threads",
    "isa",
    "load",
    "date",
]
PAUSE = 0.02  # s before each timing: worker threads of the variant before stop spinning
console = Console(width=None if sys.stdout.isatty() else 120)


# ---- what is measured on


def cpu_model() -> str:
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    try:
        kib = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        kib = None
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": kib and round(kib / 2**20, 1),
        "isa_torch": torch.backends.cpu.get_cpu_capability(),
        "isa_capo": native_isa(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "capo": capo.__version__,
    }


def native_isa() -> str:
    try:
        from capo import _native
    except ImportError:
        return "none"
    return _native.isa()


def slug() -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu_model()} {os.cpu_count()} cores".lower()).strip("-")


def revision() -> str:
    """Short hash of the commit; with ``+`` if files other than results have changed since."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
    return git("rev-parse", "--short=10", "HEAD") + "+" * bool(changed)


def backend_version(backend: str) -> str:
    if backend not in ("trl", "liger-kernel", "cut-cross-entropy"):
        return backend
    try:
        return f"{backend} {importlib.metadata.version(backend)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{backend} (not installed)"


# ---- measuring


def gate(names: list[str]) -> None:
    """Run the tests of the ops; exit if one fails."""
    tests = [test for name in names for test in OPS[name].tests]
    console.print(f"Tests first: {', '.join(tests)}")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        console.print("[red]The tests fail; nothing is timed.[/red]")
        raise typer.Exit(1)


def timed_once(timed: Timed) -> tuple[float, float]:
    """Wall and CPU time of one call, in ms. The result is freed outside the timing."""
    timed.reset()
    gc.disable()
    time.sleep(PAUSE)
    try:
        cpu, start = time.process_time(), time.perf_counter()
        result = timed.call()
        end, cpu_end = time.perf_counter(), time.process_time()
    finally:
        gc.enable()
    del result
    return 1e3 * (end - start), 1e3 * (cpu_end - cpu)


def extra_memory_mb(name: str, number: int, variant: Variant, quick: bool) -> tuple[float | None, str]:
    """Megabytes, or None and why."""
    command = [sys.executable, HERE / "memory.py", name, str(number), variant.name, "--threads"]
    command += [str(torch.get_num_threads()), *["--quick"] * quick]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        console.print(f"[yellow]no memory of {variant.name}: {why}[/yellow]")
        return None, f"no memory: {why:.200}"
    return int(done.stdout.split()[-1]) / 1e6, ""


class Measured:
    """Measurements of one variant on one case."""

    def __init__(self, variant: Variant):
        self.variant, self.note = variant, variant.note
        self.timed: Timed | None = None
        self.circumstances: dict[str, object] = {}
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.first = self.memory = self.value_error = self.gradient_error = None

    def rounds(self, most: int) -> int:
        return min(most, self.variant.rounds or most)

    @property
    def median(self) -> float | None:
        return statistics.median(self.wall) if self.wall else None


def measure(op: Op, name: str, case, results: list[Measured], rounds, seconds, progress, finished) -> None:
    """Check, warm up, then time variants of a case: round by round, each round in another random order.

    ``finished`` is called whenever each of them has been timed once more.
    """
    title = title_of(name, case)
    task = progress.add_task(f"{title}: check and warm-up", total=2 * len(results))
    inputs = case.make()

    def check(r: Measured) -> None:
        if not r.variant.is_floor:
            r.value_error, r.gradient_error = op.check(r.variant, case)

    def warm_up(r: Measured) -> None:
        r.timed = r.variant.make(inputs)
        if not r.variant.is_slow:
            r.first = timed_once(r.timed)[0]

    able = results
    for step in (check, warm_up):
        torch.compiler.reset()  # code made for the small shape would be made again for any shape
        able = [r for r in able if succeeds(step, r, progress, task)]
    running = [r for r in results if r.timed]
    rounds = min(rounds, max((r.rounds(rounds) for r in running), default=0))
    progress.update(task, description=f"{title}: rounds", total=rounds, completed=0)
    rng, end = random.Random(0), time.monotonic() + min(seconds, getattr(case, "seconds", seconds))
    for done in range(rounds):
        if done >= 5 and time.monotonic() > end:
            break
        for r in rng.sample(running, len(running)):
            if done < r.rounds(rounds):
                wall, cpu = timed_once(r.timed)
                r.wall.append(wall)
                r.cpu.append(cpu)
        finished()
        progress.advance(task)
    for r in running:
        r.timed = None
    progress.remove_task(task)


def succeeds(step: Callable[[Measured], None], r: Measured, progress, task) -> bool:
    """Do it; what is not installed or breaks gets a note instead of numbers, capo's own errors end the run."""
    progress.advance(task)
    try:
        step(r)
        return True
    except Skip as reason:
        r.note = f"skipped: {reason}"
    except AssertionError as error:
        console.print(f"[red]{r.variant.name} is wrong: {error}[/red]")
        raise typer.Exit(1) from error
    except Exception as error:  # a peer that breaks must not take the others' numbers along
        if r.variant.backend in ("native", "torch"):
            raise
        traceback.print_exc()
        r.note = f"skipped: {type(error).__name__}: {str(error).splitlines()[0]:.200}"
    r.timed = None
    return False


def measure_memory(name: str, number: int, case, results: list[Measured], quick, progress) -> None:
    measured = [r for r in results if not r.variant.is_floor and not r.note.startswith("skipped")]
    task = progress.add_task(f"{title_of(name, case)}: memory", total=len(measured))
    for r in measured:
        r.memory, why = extra_memory_mb(name, number, r.variant, quick)
        r.note = why or r.note
        progress.advance(task)
    progress.remove_task(task)


def title_of(name: str, case) -> str:
    return f"{name}, {case.shape}, {str(case.dtype).removeprefix('torch.')}"


def rows(name: str, case, results: list[Measured]) -> list[dict]:
    floors = {what: next((r.median for r in results if r.variant.what == what), None) for what in (FLOOR, FRESH_FLOOR)}
    table = []
    for r in results:
        row = {
            "op": name,
            "variant": r.variant.name,
            "backend": backend_version(r.variant.backend),
            "what": r.variant.what,
            "dtype": str(case.dtype).removeprefix("torch."),
            "shape": case.shape,
            "inputs": case.logits,
            "live": case.live,
            "rounds": len(r.wall),
            "first_call_ms": r.first,
            "extra_memory_mb": r.memory,
            "value_error": r.value_error,
            "gradient_error": r.gradient_error,
            "note": r.note,
            **r.circumstances,
        }
        if r.wall:
            row |= {
                "median_ms": r.median,
                "p20_ms": float(np.percentile(r.wall, 20)),
                "p80_ms": float(np.percentile(r.wall, 80)),
                "cpu_ms": statistics.median(r.cpu) if r.cpu else None,
                "tokens_per_s": 1e3 * case.tokens / r.median,
                "ratio_floor": floors[FLOOR] and r.median / floors[FLOOR],
                "ratio_fresh_floor": floors[FRESH_FLOOR] and r.median / floors[FRESH_FLOOR],
            }
        table.append({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})
    return table


def write(path: Path, table: list[dict], columns: list[str] = COLUMNS) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table)


def show(table: list[dict]) -> None:
    first = table[0]
    words = [str(first[key]) for key in ("op", "shape", "dtype", "inputs") if first[key]]
    if first["live"] is not None:
        words.append(f"live {first['live']}")
    view = Table(title=", ".join(words), title_justify="left")
    for heading in ("variant", "ms", "p20", "p80", "CPU ms", "x floor", "x fresh floor", "extra MB", "error"):
        view.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in table:
        keys = ("median_ms", "p20_ms", "p80_ms", "cpu_ms", "ratio_floor", "ratio_fresh_floor", "extra_memory_mb")
        error = row["gradient_error"] if row["gradient_error"] is not None else row["value_error"]
        values = (f"{float(v):.3g}" if v is not None else "" for v in (*(row.get(key) for key in keys), error))
        view.add_row(row["variant"], *values)
    console.print(view)


def chosen(names: list[str] | None, ops: Collection[str]) -> list[str]:
    """The ops asked for, or all."""
    for name in names or ():
        if name not in ops:
            raise typer.BadParameter(f"no op {name!r}; there are {', '.join(ops)}")
    return names or list(ops)


def main(
    op: Annotated[list[str] | None, typer.Option(help=f"Ops: {', '.join(OPS)}; all by default.")] = None,
    quick: Annotated[bool, typer.Option(help="Small shapes, few rounds: does it run? Not for publication.")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each case; 25, or 5 with --quick.")] = None,
    seconds: Annotated[
        float, typer.Option(help="A case ends after this time at the latest, but not before five rounds.")
    ] = 90.0,
    memory: Annotated[bool, typer.Option(help="Measure peak memory of the first case, too.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default what PyTorch takes.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = HERE / "results",
) -> None:
    """Time the ops of capo next to floors and peers."""
    names = chosen(op, OPS)
    threads = threads or torch.get_num_threads()
    gate(names)
    torch.use_deterministic_algorithms(False)
    torch._inductor.config.force_disable_caches = True  # first_call_ms is to hold a whole compilation
    folder = out / (slug() + "-quick" * quick)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps(machine(), indent=2) + "\n")
    for name in names:
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        ) as progress:
            torch.set_num_threads(OPS[name].threads or threads)
            path = folder / f"{name}.csv"
            count = time_op(name, path, quick, rounds or (5 if quick else 25), seconds, memory, progress)
        console.print(f"{count} measurements in {os.path.relpath(path)}")


def time_op(name: str, path: Path, quick, rounds, seconds, memory, progress) -> int:
    """All cases, then the slow variants of each; the file is up to date after every round. Number of rows."""
    op, tables = OPS[name], {}
    cases = [
        (number, case, [Measured(v) for v in op.variants if wanted is None or v.name in wanted])
        for number, (case, wanted) in enumerate(op.cases(quick))
    ]
    jobs = [(*case, [r for r in case[2] if r.variant.is_slow == slow]) for slow in (False, True) for case in cases]
    jobs = [job for job in jobs if job[3]]
    overall = progress.add_task(f"{name}: cases", total=len(jobs))
    for number, case, results, these in jobs:

        def finished(number=number, case=case, results=results, these=these) -> None:
            for r in these:
                r.circumstances = circumstances()
            tables[number] = rows(name, case, [r for r in results if r.circumstances])
            write(path, [row for table in tables.values() for row in table])

        try:
            measure(op, name, case, these, rounds, seconds, progress, finished)
        except Skip as reason:  # of the inputs
            console.print(f"[yellow]{name}, case {number} skipped: {reason}[/yellow]")
            continue
        if memory and getattr(case, "memory", number == 0):
            measure_memory(name, number, case, these, quick, progress)
        finished()
        show(tables[number])
        progress.advance(overall)
    return sum(map(len, tables.values()))


@functools.cache
def unchanging() -> dict[str, object]:
    return {
        "capo": capo.__version__,
        "git": revision(),
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "isa": native_isa(),
    }


def circumstances() -> dict[str, object]:
    return {
        **unchanging(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }


if __name__ == "__main__":
    typer.run(main)
