"""Evaluation: greedy accuracy on problems that training never sees, its curves and tables."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from capo.checkpoint import write_text
from capo.data import ArithmeticTask, Problem
from capo.rollout import sample
from capo.verify import Outcome, Verifier

_SHOWN = (0, 10, 20, 40, 60)  # updates in a comparison's table


def accuracy(
    model: Any,
    task: ArithmeticTask,
    problems: Sequence[Problem],
    verifier: Verifier | None = None,
    *,
    max_new_tokens: int | None = None,
    batch: int = 1024,
) -> float:
    """Share of the problems that the greedy response gets right; an undecided or truncated one counts as not right.

    Args:
        model: a causal language model of transformers.
        task: encodes and decodes.
        problems: at least one.
        verifier: compares answers; None: one that reads plain answers only.
        max_new_tokens: response limit; None: the length of a solution.
        batch: responses sampled at once.

    Raises:
        ValueError: no problems.
    """
    if not problems:
        raise ValueError("accuracy: no problems")
    verifier = verifier or Verifier(engine="plain")
    right = 0
    for first in range(0, len(problems), batch):
        part = problems[first : first + batch]
        rollouts = sample(
            model,
            [task.encode(problem.question) for problem in part],
            1,
            max_new_tokens=max_new_tokens or task.response_length,
            eos_id=task.eos_id,
            temperature=0,
        )
        texts = response_texts(task, rollouts.token_ids, rollouts.cu_seqlens)
        outcomes = verifier.verify(texts, [problem.answer for problem in part])
        right += sum(
            outcome is Outcome.RIGHT and not cut
            for outcome, cut in zip(outcomes, rollouts.truncated.tolist(), strict=True)
        )
    return right / len(problems)


def response_texts(task: ArithmeticTask, token_ids: Tensor, cu_seqlens: Tensor) -> list[str]:
    """The text of each of B packed responses."""
    lengths = cu_seqlens.diff().tolist()
    return [task.decode(ids.tolist()) for ids in torch.split(token_ids, lengths)]


def plot_curves(curves: dict[str, list[tuple[int, float]]], path: Path, title: str) -> None:
    """Write learning curves as a PNG.

    Args:
        curves: by label, (update, accuracy) pairs; labels that begin with the same word share a colour.
        path: the file.
        title: above the plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours: dict[str, str] = {}
    for label, points in curves.items():
        kind = label.split()[0]
        first = kind not in colours
        colour = colours.setdefault(kind, f"C{len(colours)}")
        updates, values = zip(*points, strict=True)
        axes.plot(updates, values, color=colour, marker=".", label=kind if first else None)
    axes.set(xlabel="update", ylabel="held-out greedy accuracy", ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def write_comparison(curves: dict[tuple[str, int], dict[int, float]], folder: Path, title: str) -> str:
    """Write ``comparison.csv``, ``comparison.md`` and ``comparison.png``; returns the table of the second.

    Args:
        curves: by (method, seed), the accuracy by update.
        folder: where the files go; it exists.
        title: above the plot.
    """
    with (folder / "comparison.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "update", "accuracy"])
        writer.writerows((*key, update, value) for key, curve in curves.items() for update, value in curve.items())
    labelled = {f"{method} {seed}": list(curve.items()) for (method, seed), curve in curves.items()}
    plot_curves(labelled, folder / "comparison.png", title)
    table = _comparison_table(curves)
    write_text(folder / "comparison.md", table)
    return table


def _comparison_table(curves: dict[tuple[str, int], dict[int, float]]) -> str:
    """Markdown: one line a run and one for each method's mean, at some updates that all have."""
    updates = [update for update in _SHOWN if all(update in curve for curve in curves.values())]
    lines = [
        f"| method | seed | {' | '.join(f'update {update}' for update in updates)} |",
        "|---|---|" + "---|" * len(updates),
    ]
    for method in dict.fromkeys(method for method, _ in curves):
        runs = {str(seed): curve for (name, seed), curve in curves.items() if name == method}
        runs["mean"] = {update: mean(curve[update] for curve in runs.values()) for update in updates}
        for name, curve in runs.items():
            lines.append(f"| {method} | {name} | {' | '.join(f'{curve[update]:.3f}' for update in updates)} |")
    return "\n".join(lines) + "\n"
