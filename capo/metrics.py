"""Metrics of a run: what is measured, and the file of JSON lines it goes to.

Names are TRL's where the quantity is the same, the rest begin with ``capo/``.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from capo import critique
from capo.checkpoint import write_text
from capo.credit import Credit
from capo.escape import neutralise
from capo.judges import JudgeRequest
from capo.judges.voting import Votes
from capo.verify import Verifier


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


def judge_metrics(credit: Credit, votes: Votes, quorum: int = 1) -> dict[str, Any]:
    """How the judge behaves: flag rates by outcome, agreement, faults, cost. Empty if it was not asked.

    Flag rates and agreement are over the votes that were asked for; where votes were left out (`capo.judges.voting`) those
    are the contested steps more often than not.
    """
    flat = [reply for row in votes.replies for reply in row]
    if not flat:
        return {}
    outcomes = credit.outcomes.repeat_interleave(credit.steps.cu_steps.diff())  # [M]
    states = [reply.state for reply in flat]
    tokens = sum(reply.prompt_tokens + reply.completion_tokens for reply in flat)
    all_votes = critique.agreement(credit.votes)
    flagged = (credit.votes == 1).any(1)  # [M]
    responses = torch.arange(len(credit.outcomes), device=flagged.device)
    num_flagged = flagged.new_zeros(len(responses), dtype=torch.int64).index_add_(
        0, responses.repeat_interleave(credit.steps.cu_steps.diff()), flagged.long()
    )
    num_steps = credit.steps.cu_steps.diff()
    num_valid = torch.tensor([sum(reply.state == "valid" for reply in row) for row in votes.replies])
    heard = (num_valid >= quorum).to(flagged.device)
    judged = torch.tensor([bool(row) for row in votes.replies]).to(flagged.device)
    return {
        "capo/flag_rate/right": critique.agreement(credit.votes[outcomes > 0]).flag_rate,
        "capo/flag_rate/wrong": critique.agreement(credit.votes[outcomes == 0]).flag_rate,
        "capo/vote_agreement": all_votes.agreement,
        "capo/vote_kappa": all_votes.kappa,
        "capo/critiques/valid": states.count("valid"),
        "capo/critiques/invalid": states.count("invalid"),
        "capo/critiques/failed": states.count("failed"),
        "capo/critiques/no_quorum": int((judged & ~heard).sum()),  # responses
        "capo/critiques/duplicates": sum(
            critique.count_duplicates(reply.text for reply in row) for row in votes.replies
        ),
        "capo/critiques/left_out": 1 - votes.asked / votes.full,
        "capo/judge_tokens_per_token": tokens / max(1, int(credit.cu_seqlens[-1])),
        # Judge and verifier contradict each other: right with every step flagged, wrong with none.
        "capo/conflict/right": int(
            (heard & (credit.outcomes > 0) & (num_steps > 0) & (num_flagged == num_steps)).sum()
        ),
        "capo/conflict/wrong": int((heard & (credit.outcomes == 0) & (num_steps > 0) & (num_flagged == 0)).sum()),
    }


def response_metrics(credit: Credit, requests: Sequence[JudgeRequest]) -> dict[str, Any]:
    """What a policy changes when it learns to please the judge instead: how it cuts steps, and whether it writes markers."""
    num_steps = credit.steps.cu_steps.diff()
    marked = sum(any(neutralise(step) != step for step in request.steps) for request in requests)
    return {
        "capo/steps_per_response": num_steps.double().mean().item(),
        "capo/tokens_per_step": int(credit.cu_seqlens[-1]) / max(1, int(num_steps.sum())),
        "capo/single_step_responses": (num_steps <= 1).double().mean().item(),
        "capo/marked_responses": marked / max(1, len(requests)),
    }


def alarms(metrics: Mapping[str, Any]) -> dict[str, str]:
    """By metric, words on what looks like a judge that is broken, or a policy that is fooling it."""
    found: dict[str, str] = {}

    def look(name: str, bad: bool, words: str) -> None:
        if bad and metrics.get(name) is not None:
            found[name] = f"{name} is {metrics[name]:.3g}: {words}"

    def value(name: str) -> float:
        return metrics.get(name) or 0.0

    total = sum(value(f"capo/critiques/{state}") for state in ("valid", "invalid", "failed"))
    look("capo/critiques/invalid", value("capo/critiques/invalid") > 0.2 * total, "more than a fifth does not parse")
    look("capo/critiques/failed", value("capo/critiques/failed") > 0.1 * total, "more than a tenth of the calls failed")
    look("capo/critiques/duplicates", value("capo/critiques/duplicates") > 0.5 * total, "votes repeat each other")
    look("capo/flag_rate/wrong", value("capo/flag_rate/wrong") < 0.01, "hardly a step of wrong responses is flagged")
    look("capo/flag_rate/right", value("capo/flag_rate/right") > 0.5, "most steps of right responses are flagged")
    look("capo/vote_kappa", value("capo/vote_kappa") < 0.1, "votes agree hardly more than by chance")
    look("capo/canaries/right", value("capo/canaries/right") < 0.5, "most right canaries have a flagged step")
    look(
        "capo/canaries/wrong", value("capo/canaries/wrong") < 0.5, "the planted error is missed in most wrong canaries"
    )
    look("capo/marked_responses", value("capo/marked_responses") > 0.01, "responses hold markers of the judge's prompt")
    look(
        "capo/single_step_responses",
        value("capo/single_step_responses") > 0.9,
        "responses are no longer cut into steps",
    )
    return found


def verifier_metrics(verifier: Verifier, counts: Counter[str], seconds: float) -> dict[str, Any]:
    """What the verifier did since its counts and seconds were these: undecided answers by reason, and time."""
    since = verifier.counts - counts
    reasons = {name.split("/")[1]: number for name, number in since.items() if name.startswith("undecided/")}
    return {
        **{f"capo/undecided/{reason}": number for reason, number in sorted(reasons.items())},
        "capo/time/verify": verifier.seconds - seconds,
    }


class MetricsLog:
    """A file of metrics, or of samples, one JSON object a line, each with its step.

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
            self._console.print(f"warning: {self.path}: {error.strerror}; a line is lost, training goes on")


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
