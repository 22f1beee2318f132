"""What a run shows while it goes on: its progress, with rates."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Stage(Protocol):
    """Called after each step of a stage with the number of steps done and a few words on how it goes."""

    def __call__(self, done: int, text: str, /) -> None: ...


@contextmanager
def stage(console: Console, name: str, total: int, done: int = 0) -> Iterator[Stage]:
    """Show a stage of known length: a bar on a terminal, else about ten plain lines."""
    began = time.perf_counter()

    def rate(step: int) -> str:
        return f"{(step - done) / max(time.perf_counter() - began, 1e-9):.2f}/s"

    if console.is_terminal:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[text]}"), console=console) as bar:
            task = bar.add_task(name, total=total, completed=done, text="")
            yield lambda step, text: bar.update(task, completed=step, text=f"{rate(step)} {text}")
        return

    every = max(1, math.ceil(total / 10))

    def line(step: int, text: str) -> None:
        if step % every == 0 or step == total:
            # print() and not console.print(), which wraps at 80 columns where there is no terminal.
            print(f"{name} {step}/{total} {rate(step)} {text}", file=console.file, flush=True)

    yield line
