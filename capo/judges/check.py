"""What `capo judge` does: a judge is run on responses whose wrong steps are known, and its votes are held against them.

Dimension key: B responses, M steps, K critiques.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from capo.credit import Vote
from capo.critique import Agreement, agreement, count_duplicates, vote_table
from capo.errors import UsageError
from capo.judges import Judge, JudgeReply, JudgeRequest
from capo.reference import step_weights

MAX_LINE = 16 << 20  # bytes
RULES = tuple(rule for rule in get_args(Vote) if rule != "average")  # the average decides nothing


@dataclass(frozen=True)
class Labelled:
    """A response whose wrong steps are known, all of them or up to the first.

    Args:
        request: the response, as a judge is asked.
        wrong: per step, True wrong, False right, None unknown.
    """

    request: JudgeRequest
    wrong: tuple[bool | None, ...]

    @property
    def first(self) -> int | None:
        """The first wrong step."""
        return self.wrong.index(True) if True in self.wrong else None


def load(path: str | Path) -> list[Labelled]:
    """Read labelled responses: JSON lines in ProcessBench's form, or with labels of all steps.

    A line is an object with ``problem`` (or ``question``), ``steps`` (a list of texts), optionally ``reference`` (or
    ``solution``, ``answer``), and either ``label``, the 0-based number of the first wrong step, -1 if there is none, or
    ``wrong``, the list of all wrong steps. Other fields are ignored.

    Raises:
        UsageError: no such file, or a line that is none of this; with its number.
    """
    found = []
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
                if len(line) > MAX_LINE:
                    raise UsageError(f"{path}:{number}: more than {MAX_LINE} bytes")
                if line.strip():
                    try:
                        found.append(_labelled(json.loads(line)))
                    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                        raise UsageError(
                            f"{path}:{number}: not JSON ({error}); each line is one labelled response"
                        ) from None
                    except (ValueError, TypeError) as error:
                        raise UsageError(f"{path}:{number}: {error}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot read the labelled responses: {error.strerror}") from None
    if not found:
        raise UsageError(f"{path}: no labelled responses")
    return found


def _labelled(row: Any) -> Labelled:
    if not isinstance(row, dict):
        raise TypeError("not a JSON object")
    question = row.get("problem", row.get("question"))
    steps = row.get("steps")
    reference = next((row[name] for name in ("reference", "solution", "answer") if row.get(name) is not None), None)
    if not isinstance(question, str):
        raise TypeError("needs a problem (or question), a string")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        raise ValueError("needs steps, a list of strings with at least one")
    if reference is not None and not isinstance(reference, str):
        raise ValueError("the reference must be a string")
    request = JudgeRequest(question, reference, tuple(steps))
    if "wrong" in row:
        wrong = row["wrong"]
        if not isinstance(wrong, list) or any(type(i) is not int or not 0 <= i < len(steps) for i in wrong):
            raise ValueError(f"wrong must be a list of step numbers from 0 to {len(steps) - 1}, got {wrong!r:.80}")
        return Labelled(request, tuple(i in wrong for i in range(len(steps))))
    label = row.get("label")
    if type(label) is not int or not -1 <= label < len(steps):
        raise ValueError(f"needs label, -1 or a step number from 0 to {len(steps) - 1}, got {label!r:.80}")
    if label < 0:
        return Labelled(request, (False,) * len(steps))
    return Labelled(request, (False,) * label + (True,) + (None,) * (len(steps) - label - 1))


def known_wrong(labelled: Sequence[Labelled]) -> Callable[[JudgeRequest], list[bool]]:
    """The checker for a scripted judge: it knows the labels; unknown steps count as right."""
    labels = {one.request: [wrong is True for wrong in one.wrong] for one in labelled}
    return labels.__getitem__


@dataclass(frozen=True)
class Quality:
    """How the votes of one rule compare with the labels; None where it is not defined.

    Args:
        votes: K, the first so many critiques of each response.
        rule: how they become flags.
        precision: share of the flagged steps that are wrong.
        recall: share of the wrong steps that are flagged.
        f1: their harmonic mean. These three look at steps with a known label.
        first_error: share of the responses with an error whose first flagged step is the first wrong one.
        all_right: share of the responses without an error that have no flagged step.
        first_error_f1: harmonic mean of these two, ProcessBench's figure.
        unheard: share of the responses without a valid vote. They flag nothing, and count in neither share.
    """

    votes: int
    rule: str
    precision: float | None
    recall: float | None
    f1: float | None
    first_error: float | None
    all_right: float | None
    first_error_f1: float | None
    unheard: float


@dataclass(frozen=True)
class Report:
    """What `check` found.

    Args:
        qualities: one for each number of votes and rule.
        responses: B.
        states: replies by state.
        errors: invalid and failed replies by reason.
        duplicates: replies that repeat another one on the same response.
        agreement: of the votes.
        tokens: of prompts and replies, per 1,000 responses.
        seconds: per 1,000 responses.
    """

    qualities: list[Quality]
    responses: int
    states: dict[str, int]
    errors: dict[str, int]
    duplicates: int
    agreement: Agreement
    tokens: float
    seconds: float


def check(
    judge: Judge,
    labelled: Sequence[Labelled],
    num_votes: int,
    *,
    batch: int = 128,
    on_batch: Callable[[int, str], None] = lambda done, text: None,
) -> tuple[Report, list[list[JudgeReply]]]:
    """Run a judge on labelled responses.

    Args:
        judge: any.
        labelled: the responses.
        num_votes: K, at least 1.
        batch: responses per call.
        on_batch: called after each with the number of responses done and a few words.

    Raises:
        capo.judges.JudgeError: from the judge.
    """
    replies: list[list[JudgeReply]] = []
    began = time.perf_counter()
    for first in range(0, len(labelled), batch):
        replies += judge.critique([one.request for one in labelled[first : first + batch]], num_votes)
        valid = sum(reply.state == "valid" for row in replies for reply in row)
        on_batch(len(replies), f"{valid / max(1, sum(map(len, replies))):.0%} valid")
    seconds = time.perf_counter() - began
    flat = [reply for row in replies for reply in row]
    counts = [len(one.wrong) for one in labelled]
    table = vote_table([[reply.critique for reply in row] for row in replies], counts, num_votes)
    doubling = (1 << power for power in range(num_votes.bit_length()))
    sizes = sorted({*range(1, min(num_votes, 8) + 1), *doubling, num_votes})
    return Report(
        qualities=[quality(table[:, :k], rule, labelled) for k in sizes for rule in (RULES if k > 1 else RULES[:1])],
        responses=len(labelled),
        states=dict(Counter(reply.state for reply in flat)),
        errors=dict(Counter(reply.error for reply in flat if reply.error is not None).most_common()),
        duplicates=sum(count_duplicates(reply.text for reply in row) for row in replies),
        agreement=agreement(table),
        tokens=1000 / len(labelled) * sum(reply.prompt_tokens + reply.completion_tokens for reply in flat),
        seconds=1000 / len(labelled) * seconds,
    ), replies


def quality(votes: Tensor, rule: str, labelled: Sequence[Labelled]) -> Quality:
    """Compare the flags of a vote rule with the labels.

    Args:
        votes: int8 [M, K], see `capo.critique.vote_table`.
        rule: see `capo.CreditRule`.
        labelled: [B] the responses.
    """
    flags = (step_weights(votes, rule) >= 0.5).tolist()
    heard = (votes >= 0).any(1).tolist()
    hits = Counter[tuple[bool, bool]]()  # (flagged, wrong)
    found = errors = clean = faultless = unheard = 0
    start = 0
    for one in labelled:
        end = start + len(one.wrong)
        flagged = flags[start:end]
        if not any(heard[start:end]):
            unheard += 1
            start = end
            continue
        hits.update((flag, wrong) for flag, wrong in zip(flagged, one.wrong, strict=True) if wrong is not None)
        first = flagged.index(True) if True in flagged else None
        if one.first is not None:
            errors += 1
            found += first == one.first
        elif None not in one.wrong:
            faultless += 1
            clean += first is None
        start = end
    precision = _share(hits[True, True], hits[True, True] + hits[True, False])
    recall = _share(hits[True, True], hits[True, True] + hits[False, True])
    first_error, all_right = _share(found, errors), _share(clean, faultless)
    f1, first_error_f1 = _harmonic(precision, recall), _harmonic(first_error, all_right)
    shares = (precision, recall, f1, first_error, all_right, first_error_f1)
    return Quality(votes.shape[1], rule, *shares, unheard=unheard / len(labelled))


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _harmonic(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return None
    return 2 * one * other / (one + other) if one + other else 0.0


def write_csv(report: Report, path: Path) -> None:
    """The qualities, one a row; shares with four digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, [field.name for field in fields(Quality)])
        rows.writeheader()
        for one in report.qualities:
            rows.writerow(
                {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in asdict(one).items()}
            )


def write_replies(labelled: Sequence[Labelled], replies: Sequence[Sequence[JudgeReply]], path: Path) -> None:
    """Every reply, as JSON lines, one response a line."""
    with path.open("w", encoding="utf-8") as file:
        for one, row in zip(labelled, replies, strict=True):
            told = [
                {"state": r.state, "error": r.error, "flagged": r.critique and r.critique.flagged, "text": r.text}
                for r in row
            ]
            line = {"problem": one.request.question, "wrong": one.wrong, "replies": told}
            file.write(json.dumps(line) + "\n")


def plot(report: Report, path: Path) -> None:
    """Precision, recall and first-error F1 against the number of votes, a line for each rule, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {"precision": "precision of flags", "recall": "recall of wrong steps", "first_error_f1": "first-error F1"}
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    single = [one for one in report.qualities if one.votes == 1]
    for axes, (name, title) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        for number, rule in enumerate(RULES):
            points = single + [one for one in report.qualities if one.rule == rule and one.votes > 1]
            values = [math.nan if getattr(one, name) is None else getattr(one, name) for one in points]
            axes.plot([one.votes for one in points], values, marker="o", ms=4, color=f"C{number}", label=rule)
        axes.set(title=title, xlabel="critiques per response", ylim=(0, 1.03))
        axes.set_xticks(sorted({one.votes for one in report.qualities}))
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)


def table(report: Report) -> list[Any]:
    """The report as tables of rich."""
    from rich.table import Table

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.1f}"

    found = Table(title="Flags against labels, in %", title_justify="left")
    for heading in ("K", "rule", "precision", "recall", "F1", "first error", "all right", "first-error F1", "unheard"):
        found.add_column(heading, justify="left" if heading == "rule" else "right")
    before = None
    for one in report.qualities:
        if before not in (None, one.votes):
            found.add_section()
        before = one.votes
        shares = (one.precision, one.recall, one.f1, one.first_error, one.all_right, one.first_error_f1, one.unheard)
        found.add_row(str(one.votes), one.rule if one.votes > 1 else "any", *map(percent, shares))

    rest = Table(show_header=False, title="Replies", title_justify="left")
    rest.add_row("responses", f"{report.responses:,}")
    rest.add_row("replies", ", ".join(f"{count:,} {state}" for state, count in sorted(report.states.items())))
    if report.errors:
        rest.add_row("because", ", ".join(f"{reason} {count:,}" for reason, count in report.errors.items()))
    rest.add_row("repeat another", f"{report.duplicates:,}")
    told = report.agreement
    kappa = "-" if told.kappa is None else f"{told.kappa:.3f}"
    rest.add_row("votes that flag, that agree", f"{percent(told.flag_rate)} %, {percent(told.agreement)} %")
    rest.add_row("Fleiss' kappa", kappa)
    rest.add_row("per 1,000 responses", f"{report.tokens:,.0f} tokens, {report.seconds:,.1f} s")
    return [found, rest]
