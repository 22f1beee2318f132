"""Metrics of a run: what is measured, and the file of JSON lines it goes to.

Names are TRL's where the quantity is the same, the rest begin with ``capo/``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from capo import critique
from capo.checkpoint import write_text
from capo.credit import Credit
from capo.judges import JudgeReply


def outcome_metrics(outcomes: Tensor, groups: Tensor) -> dict[str, Any]:
    """Reward statistics as TRL names them, over decided outcomes; None where there is none.

    Args:
        outcomes: [B], NaN for undecided ones.
        groups: [B] int64, the group of each response, ascending.
    """
    decided = outcomes[~outcomes.isnan()]
    sizes = groups.unique_consecutive(return_counts=True)[1].tolist()
    parts = [part[~part.isnan()].double() for part in outcomes.split(sizes)]
    stds = [part.std().item() for part in parts if len(part) > 1]
    return {
        "reward": decided.double().mean().item() if len(decided) else None,
        "reward_std": sum(stds) / len(stds) if stds else None,
        "frac_reward_zero_std": sum(std == 0 for std in stds) / len(stds) if stds else None,
        "capo/undecided": len(outcomes) - len(decided),
    }


def judge_metrics(credit: Credit, replies: Sequence[Sequence[JudgeReply]]) -> dict[str, Any]:
    """How the judge behaves: flag rates by outcome, agreement, faults, cost. Empty if it was not asked."""
    flat = [reply for row in replies for reply in row]
    if not flat:
        return {}
    outcomes = credit.outcomes.repeat_interleave(credit.steps.cu_steps.diff())  # [M]
    states = [reply.state for reply in flat]
    tokens = sum(reply.prompt_tokens + reply.completion_tokens for reply in flat)
    return {
        "capo/flag_rate/right": critique.agreement(credit.votes[outcomes > 0]).flag_rate,
        "capo/flag_rate/wrong": critique.agreement(credit.votes[outcomes == 0]).flag_rate,
        "capo/vote_agreement": critique.agreement(credit.votes).agreement,
        "capo/critiques/invalid": states.count("invalid"),
        "capo/critiques/failed": states.count("failed"),
        "capo/judge_tokens_per_token": tokens / int(credit.cu_seqlens[-1]),
    }


class MetricsLog:
    """A file of metrics, one JSON object a line.

    Args:
        path: the file.
        last_step: lines of later steps are dropped, and so is a line that an interrupted run left half written; -1
            begins anew.
        console: where a failure to write is told; training goes on.
    """

    def __init__(self, path: Path, last_step: int, console: Console) -> None:
        self.path = path
        self._console = console
        write_text(path, "".join(json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= last_step))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; numbers that JSON has no form for become null, None is left out."""
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
            if value is not None
        }
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(clean, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._console.print(f"warning: {self.path}: {error.strerror}; metrics are lost, training goes on")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, without a half-written last line; none if there is no file.

    Raises:
        ValueError: a line other than the last is no JSON object with a step.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if "step" not in row:
                raise ValueError("no step")
        except (ValueError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{path}:{number}: not a line of metrics: {error}") from None
        rows.append(row)
    return rows
