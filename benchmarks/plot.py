"""Figures from the CSV files of run.py and gpu.py; nothing is timed here.

    python benchmarks/plot.py [FOLDER ...]     folders of results; all of benchmarks/results by default

Each <op>.csv that they wrote gives PNG files beside it.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

CAPO, OTHER, FLOOR = "#1768ac", "#9aa5b1", "#d1495b"
OURS = "native", "triton"
LINES = {
    "capo": CAPO,
    "capo, in place": "#06a77d",
    "capo, live rows": "#4cc9f0",
    "capo CUDA": CAPO,
    "capo Triton": "#5fa8d3",
    "eager": "#6c757d",
    "eager, live rows": "#b08968",
}
LINES |= {"eager, row loop": "#b08968", "torch.compile": "#7b2cbf", "TRL": "#e09f3e"}
Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("median_ms")]


def is_floor(row: dict[str, str]) -> bool:
    return row["what"].startswith("floor")


def case_of(row: dict[str, str]) -> tuple[str, ...]:
    return row["shape"], row["dtype"], row["inputs"], row["live"]


def number(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def tick(value: float, _) -> str:
    return number(value)


def errorbars(row: dict[str, str], scale: float = 1.0) -> tuple[float, list[list[float]]]:
    """Median, and the distances to p20 and p80 as matplotlib wants them."""
    low, middle, high = (scale * float(row[key]) for key in ("p20_ms", "median_ms", "p80_ms"))
    return middle, [[middle - low], [high - middle]]


def footer(figure, row: dict[str, str]) -> None:
    words = (
        f"{row['cpu']}, {row['threads']} thread(s), {row['isa']}; torch {row['torch']}; capo {row['capo']} {row['git']}"
    )
    figure.text(0.01, 0.005, f"{words}; median, whiskers p20 to p80; {row['date']}", fontsize=7, color="#555555")


def bars(rows: Rows, path: Path) -> None:
    """One case: time of every variant, and its error beside it where there is a gradient."""
    shown = [row for row in rows if not is_floor(row)]
    # The order of the file within each kind, the first at the top.
    kinds = list(dict.fromkeys(row["what"] for row in shown))
    shown.sort(key=lambda row: -kinds.index(row["what"]))
    shown = [row for kind in reversed(kinds) for row in reversed([r for r in shown if r["what"] == kind])]
    errors = any(float(row["gradient_error"] or 0) > 0 for row in shown)
    figure, axes = plt.subplots(
        1, 1 + errors, figsize=(11 if errors else 8, 1.8 + 0.36 * len(shown)), sharey=True, squeeze=False,
        width_ratios=[3, 1] if errors else [1],
    )  # fmt: skip
    axis = axes[0, 0]
    plate = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    for y, row in enumerate(shown):
        middle, error = errorbars(row)
        axis.barh(y, middle, xerr=error, color=CAPO if row["backend"] in OURS else OTHER, ecolor="#333333", capsize=2)
        ratio = f"  ({number(float(row['ratio_floor']), 2)} x floor)" if row["ratio_floor"] else ""
        axis.text(
            float(row["p80_ms"]) * 1.08, y, f"{number(middle)} ms{ratio}", va="center", fontsize=8, zorder=4, bbox=plate
        )
    several = len(kinds) > 1
    labels = [f"{row['variant']}\n({row['what']})" if several else row["variant"] for row in shown]
    axis.set_yticks(range(len(shown)), labels, fontsize=8)
    for row, style in zip(filter(is_floor, rows), ("-", "--"), strict=False):
        label = f"{row['what']}: {row['variant']}, {number(float(row['median_ms']))} ms"
        axis.axvline(float(row["median_ms"]), color=FLOOR, linestyle=style, linewidth=1.2, label=label, zorder=3)
    low = min(float(row["p20_ms"]) for row in rows)
    axis.set(xscale="log", xlabel="time of a call (ms)", xlim=(low / 2, 12 * max(float(row["p80_ms"]) for row in rows)))
    axis.xaxis.set_major_formatter(FuncFormatter(tick))
    if any(map(is_floor, rows)):
        axis.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), fontsize=8, frameon=False, ncols=2)
    if errors:
        axes[0, 1].set(xscale="log", xlabel="gradient: relative L2 error\nagainst float64")
        axes[0, 1].xaxis.set_minor_formatter(NullFormatter())
        for y, row in enumerate(shown):
            if float(row["gradient_error"] or 0) > 0:
                color = CAPO if row["backend"] in OURS else OTHER
                axes[0, 1].plot(float(row["gradient_error"]), y, "o", color=color)
        axes[0, 1].grid(axis="x", alpha=0.3)
    first = rows[0]
    words = [first["op"], first["shape"], first["dtype"], first["inputs"]]
    figure.suptitle(", ".join(filter(None, words)), x=0.01, y=0.99, ha="left", fontsize=10)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    footer(figure, first)
    save(figure, path)


def lines(cases: list[Rows], x_of, xlabel: str, title: str, path: Path, per_token: bool = False) -> None:
    """One line a variant over cases, log-log."""
    figure, axis = plt.subplots(figsize=(7.5, 4.8))
    series = defaultdict(list)
    for rows in cases:
        for row in rows:
            if not is_floor(row) and row["what"] != "loss + gradient":
                continue
            scale = 1e3 / int(row["shape"].split()[0]) if per_token else 1.0
            series[row["variant"]].append((x_of(row), *errorbars(row, scale), is_floor(row)))
    for name, points in series.items():
        points.sort(key=lambda point: point[0])
        if len(points) < 2:
            continue
        floor = points[0][3]
        axis.errorbar(
            [p[0] for p in points], [p[1] for p in points], [[p[2][i][0] for p in points] for i in (0, 1)],
            label=f"floor: {name}" if floor else name, color=FLOOR if floor else LINES.get(name, "#333333"),
            linestyle=("-" if name.endswith("_") else "--") if floor else "-", marker=None if floor else "o",
            markersize=4, capsize=2, linewidth=1.2,
        )  # fmt: skip
    ticks = sorted({p[0] for points in series.values() for p in points})
    axis.set(
        xscale="log", yscale="log", xlabel=xlabel, ylabel="time (us a token)" if per_token else "time of a call (ms)"
    )
    axis.minorticks_off()
    axis.set_xticks(ticks, [number(x) for x in ticks])
    axis.yaxis.set_major_formatter(FuncFormatter(tick))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set_title(title, loc="left", fontsize=10)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    footer(figure, cases[0][0])
    save(figure, path)


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(path)


def plot(path: Path) -> None:
    rows = read(path)
    cases = defaultdict(list)
    for row in rows:
        cases[case_of(row)].append(row)
    if not cases:
        return
    first = next(iter(cases.values()))
    bars(first, path.with_suffix(".png"))
    op = first[0]["op"]
    if op not in ("policy_loss", "linear_policy_loss"):
        return
    key = case_of(first[0])
    live = [case for k, case in cases.items() if k[:3] == key[:3]]
    if len(live) > 1:
        title = f"{op}, {key[0]}, {key[1]}: loss and gradient"
        target = path.with_name(f"{op}_live.png")
        lines(live, lambda row: float(row["live"]), "share of tokens with an advantage", title, target)
    # The sweep over vocabularies has about as many logits in each case, fewer than the first.
    sweep = [case for k, case in cases.items() if k[0] != key[0] and k[1:] == key[1:]]
    if len(sweep) > 1:
        title = f"{op}, {key[1]}: loss and gradient"
        target = path.with_name(f"{op}_vocab.png")
        lines(sweep, lambda row: int(row["shape"].split()[-1]), "vocabulary V", title, target, per_token=True)


def main() -> None:
    folders = [Path(name) for name in sys.argv[1:]] or sorted(Path(__file__).resolve().parent.glob("results/*/"))
    for folder in folders:
        for path in sorted(folder.glob("*.csv")):
            plot(path)


if __name__ == "__main__":
    main()
