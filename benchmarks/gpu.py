"""Times every op on a GPU next to its floor and its peers; the tests first, CSV files and figures last.

    python benchmarks/gpu.py [--op policy_loss] [--quick]
    TRITON_INTERPRET=1 python benchmarks/gpu.py --dry-run      # tiny, on a CPU: does all of it run?

Peers that are not installed are rows without numbers that say so; they come without their dependencies:
`pip install --no-deps trl liger-kernel cut-cross-entropy verl`, and `pip install quack-kernels`. Every variant first has to
give the right result on a small batch. Results: results/<gpu>/<op>.csv, with the columns of run.py and these: forward_ms and
backward_ms, the halves of median_ms; peak_mb, memory above what was there before the call; new_lengths_ms, what 20 numbers of
rows cost when they come for the first time, beyond what they cost again: compilations.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import gpu_variants
import plot
import run
import torch
import typer
from gpu_variants import Case
from run import Measured, console
from variants import Skip, Timed, Variant

import capo

HERE = Path(__file__).resolve().parent
COLUMNS = [*run.COLUMNS, "forward_ms", "backward_ms", "peak_mb", "new_lengths_ms"]
LENGTHS = 20


@dataclass(frozen=True)
class Sizes:
    """Of the inputs; the defaults are those that others publish."""

    rows: int = 8192
    vocab: int = 151_936
    vocabularies: tuple[int, ...] = (128_256, 151_936, 151_937, 262_144)  # the third is a prime
    tokens: int = 4096
    hidden: int = 4096
    words: int = 128_256
    responses: int = 4096
    length: int = 8192


TINY = Sizes(8, 67, (66, 97), 8, 16, 67, 8, 64)
OPS: dict[str, tuple[str, tuple[Variant, ...], Callable[[Sizes], list]]] = {
    "policy_loss": (
        "policy_loss or logprobs", gpu_variants.LOGITS_VARIANTS, lambda s: gpu_variants.logits_cases(s.rows, s.vocab, s.vocabularies)
    ),
    "linear_policy_loss": (
        "linear", gpu_variants.HIDDEN_VARIANTS, lambda s: gpu_variants.hidden_cases(s.tokens, s.hidden, s.words)
    ),
    "linear_logprobs": (
        "linear", gpu_variants.LOGPROBS_VARIANTS, lambda s: gpu_variants.logprobs_cases(s.tokens, s.hidden, s.words)
    ),
    "product": (
        "linear", gpu_variants.PRODUCT_VARIANTS, lambda s: gpu_variants.product_cases(s.tokens, s.hidden, s.words)
    ),
    "credit": ("credit", gpu_variants.CREDIT_VARIANTS, lambda s: gpu_variants.credit_cases(s.responses, s.length)),
}  # fmt: skip


class Clock:
    """Milliseconds and bytes of calls on a device; on a CPU, where they mean nothing, only to see that all runs."""

    def __init__(self, device: str):
        self.device = device
        self.flush = torch.empty(256 * 2**20 if device == "cuda" else 1, dtype=torch.uint8, device=device)

    def parts(self, timed: Timed) -> list[float]:
        """Time of a call, or of each of its halves, with a cold L2 cache."""
        timed.reset()
        self.flush.zero_()
        gc.disable()
        try:
            marks = [self._mark()]
            if timed.halves is None:
                result = timed.call()
            else:
                value = timed.halves[0]()
                marks.append(self._mark())
                result = timed.halves[1](value)
            marks.append(self._mark())
            if self.device == "cuda":
                marks[-1].synchronize()
        finally:
            gc.enable()
        del result
        return [self._between(first, second) for first, second in itertools.pairwise(marks)]

    def _mark(self):
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first, second) -> float:
        return first.elapsed_time(second) if self.device == "cuda" else 1e3 * (second - first)

    def wall(self, timed: Timed) -> float:
        """Wall time, compilation included."""
        timed.reset()
        start = time.perf_counter()
        timed.call()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def peak_mb(self, timed: Timed) -> float | None:
        """Memory that a call takes at its highest, beyond what is there before, the gradient included."""
        if self.device != "cuda":
            return None
        timed.reset()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed.call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6


def new_lengths(variant: Variant, case: Case, clock: Clock) -> float | None:
    """Milliseconds that new numbers of rows cost beyond what known ones do."""
    if "rows" not in case.sizes or variant.is_floor:
        return None
    first, number = (512, LENGTHS) if clock.device == "cuda" else (3, 2)
    sizes = {**case.sizes, "vocab": min(case.sizes["vocab"], 4096)}
    if "hidden" in sizes:
        sizes["hidden"] = min(sizes["hidden"], 512)
    calls = [
        variant.make(replace(case, sizes={**sizes, "rows": first * (i + 14) // 14}, live=1.0).make(clock.device))
        for i in range(number)
    ]
    spent = sum(map(clock.wall, calls))
    return max(spent - sum(map(clock.wall, calls)), 0.0)


def measure(case: Case, variants: list[Variant], clock: Clock, rounds: int, seconds: float, first: bool) -> list[dict]:
    """Check, warm up, then time the variants of a case, round by round, each round in another order; rows of the CSV.

    Args:
        case: the inputs.
        variants: the ways to compute.
        clock: of the device.
        rounds: how many.
        seconds: no round begins after these, but for three.
        first: whether this is the first case of its op, whose rows have compilation times, too.
    """
    x = case.make(clock.device)
    results, halves = [Measured(variant) for variant in variants], {}
    for r in results:
        torch.compiler.reset()
        try:
            r.gradient_error = gpu_variants.check(r.variant, case, clock.device)
            lengths = new_lengths(r.variant, case, clock) if first else None
            r.timed = r.variant.make(x)
            r.first = clock.wall(r.timed)
            clock.parts(r.timed)
            r.circumstances = {"new_lengths_ms": lengths, "peak_mb": clock.peak_mb(r.timed)}
        except Skip as reason:
            r.note = f"skipped: {reason}"
        except torch.cuda.OutOfMemoryError:
            r.note = "skipped: out of memory"
        except Exception as broken:  # a peer that breaks must not take the others' numbers along
            if r.variant.backend in ("native", "triton"):
                raise
            r.note = f"skipped: {type(broken).__name__}: {str(broken).splitlines()[0]:.200}"
        if r.note.startswith("skipped"):
            r.timed = None
            console.print(f"[yellow]{case.op}, {r.variant.name}: {r.note}[/yellow]")
    running = [r for r in results if r.timed]
    rng, end = random.Random(0), time.monotonic() + seconds
    for done in range(rounds):
        if done >= 3 and time.monotonic() > end:
            break
        for r in rng.sample(running, len(running)):
            parts = clock.parts(r.timed)
            r.wall.append(sum(parts))
            if len(parts) == 2:
                halves.setdefault(r.variant.name, []).append(parts)
    for r in results:
        r.timed = None
        both = halves.get(r.variant.name)
        if both:
            names = zip(("forward_ms", "backward_ms"), zip(*both, strict=True), strict=True)
            r.circumstances |= {name: statistics.median(times) for name, times in names}
        r.circumstances |= {**run.circumstances(), "cpu": device_name(clock.device), "isa": architecture(clock.device)}
    return run.rows(case.op, case, results)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "a CPU"


def architecture(device: str) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability()) if device == "cuda" else ""


def gate(names: list[str]) -> None:
    """Run the tests of the ops on the GPU; exit if one fails."""
    words = " or ".join(dict.fromkeys(OPS[name][0] for name in names))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "gpu", "-k", words, "-p", "no:cacheprovider"]
    if subprocess.run(command, cwd=HERE.parent, check=False).returncode:
        console.print("[red]The tests fail; nothing is timed.[/red]")
        raise typer.Exit(1)


def main(
    op: Annotated[list[str] | None, typer.Option(help=f"Ops: {', '.join(OPS)}; all by default.")] = None,
    quick: Annotated[bool, typer.Option(help="The first case of each op only.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each case.")] = 20,
    seconds: Annotated[float, typer.Option(help="A case ends after this time, but not before three rounds.")] = 20.0,
    skip_tests: Annotated[bool, typer.Option(help="For a look: no tests, and nothing is written.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Tiny, on the CPU; nothing is written.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = HERE / "results",
) -> None:
    """Time the ops of capo on a GPU next to floors and peers."""
    names = run.chosen(op, OPS)
    if not dry_run and not torch.cuda.is_available():
        console.print(
            "gpu.py needs a GPU, or --dry-run; gpu_report.py and cuda_report.py say what is predicted for one"
        )
        raise typer.Exit(1)
    if not dry_run and not skip_tests:
        gate(names)
    clock, sizes = (Clock("cpu"), TINY) if dry_run else (Clock("cuda"), Sizes())
    device = "dry-run" if dry_run else re.sub(r"[^a-z0-9]+", "-", device_name("cuda").lower()).strip("-")
    folder = out / device
    for name in names:
        table = []
        _, variants, cases = OPS[name]
        for number, (case, wanted) in enumerate(cases(sizes)[: 1 if quick else None]):
            chosen = [v for v in variants if wanted is None or v.name in wanted]
            if dry_run:  # Triton's interpreter knows no products in bfloat16
                case = replace(case, dtype=torch.float32)
            with capo.use_backend("triton") if dry_run else contextlib.nullcontext():
                rows = measure(case, chosen, clock, 1 if dry_run else rounds, seconds, number == 0)
            table += rows
            run.show(rows)
        if skip_tests or (dry_run and out == HERE / "results"):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.csv"
        run.write(path, table, COLUMNS)
        console.print(f"{len(table)} measurements in {os.path.relpath(path)}")
        plot.plot(path)


if __name__ == "__main__":
    typer.run(main)
