"""What `capo score` shows: a progress bar with rates, and the summary as a table."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from capo.score import Progress as Report
    from capo.score import ScoreSummary


@contextlib.contextmanager
def progress_bar(name: str) -> Iterator[Report | None]:
    """A bar on stderr while in the block, if that is a terminal; gives the function to report to, or None."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=1.0, rate="")
        started = time.perf_counter()

        def report(share: float, responses: int, tokens: int) -> None:
            seconds = max(time.perf_counter() - started, 1e-9)
            bar.update(
                task, completed=share, rate=f"{responses / seconds:,.0f} responses/s, {tokens / seconds:,.0f} tok/s"
            )

        yield report


def table(summary: ScoreSummary) -> str:
    """The summary as text, in colour where stdout is a terminal."""
    grid = Table(show_header=False, title="Scored", title_justify="left")
    for name, value in _lines(summary):
        grid.add_row(name, value)
    is_terminal = sys.stdout.isatty()
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=None if is_terminal else 100)
    with console.capture() as capture:
        console.print(grid)
    return capture.get()


def _lines(summary: ScoreSummary) -> Iterator[tuple[str, str]]:
    rate = summary.tokens / summary.seconds if summary.seconds else 0.0
    yield "responses", f"{summary.responses:,} in {summary.groups:,} groups"
    yield "outcomes", f"{summary.right:,} right, {summary.wrong:,} wrong, {summary.undecided:,} undecided"
    yield "tokens, steps", f"{summary.tokens:,}, {summary.steps:,}"
    states = ", ".join(f"{count:,} {state}" for state, count in summary.critiques.items())
    yield "critiques", f"{states}; {summary.uncritiqued:,} responses without any"
    if summary.parse_failures:
        yield "invalid because", ", ".join(f"{reason} {count:,}" for reason, count in summary.parse_failures.items())
    rates = ", ".join(f"{name} {_percent(value)}" for name, value in summary.flag_rate.items())
    yield "votes that flag a step", rates
    kappa = "-" if summary.kappa is None else f"{summary.kappa:.3f}"
    yield "votes that agree", f"{_percent(summary.vote_agreement)}, Fleiss' kappa {kappa}"
    yield "groups without signal", f"{summary.zero_signal_groups:,}"
    if summary.other_text:
        yield "ids spell another text", f"{summary.other_text:,} responses; is it the policy's tokenizer?"
    yield "rows refused", f"{summary.bad_rows:,}"
    yield "time", f"{summary.seconds:.2f} s, {rate:,.0f} tokens/s"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
