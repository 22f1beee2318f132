"""Responses to look at, with steps, votes and token advantages: written by `capo train`, read by `capo view`."""

from __future__ import annotations

import codecs
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from capo.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from capo.credit import Credit
    from capo.judges.voting import Votes
    from capo.steps import TokenBytes

_COLUMNS = ("advantages", "step_starts", "step_ends", "step_weights", "votes")
_OF_PARQUET = ("response_id", "prompt_index", "response_index", "group", "group_id", "outcome", "token_ids", *_COLUMNS)


class Kind(str, Enum):
    """What a response can be; flagged, and one of the others."""

    RIGHT = "right"
    WRONG = "wrong"
    UNDECIDED = "undecided"
    FLAGGED = "flagged"


class Run(NamedTuple):
    """Text of consecutive tokens of one advantage."""

    text: str
    num_tokens: int
    advantage: float


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of a response: a step, or what lies between two.

    Args:
        runs: the tokens.
        number: of the step, from 0; None outside of steps.
        weight: the votes on the step aggregated, from 0, right, to 1, wrong.
        votes: of each critique: 1 flagged, 0 clear, -1 abstained.
    """

    runs: list[Run]
    number: int | None = None
    weight: float = 0.0
    votes: Sequence[int] = ()


@dataclass(frozen=True)
class Sample:
    """One response.

    Args:
        id: of the response.
        group: name of its group.
        outcome: None if undecided.
        parts: all tokens, in order.
        prompt: None if unknown.
        replies: what the judge wrote, one text a critique.
    """

    id: str
    group: str
    outcome: float | None
    parts: list[Part]
    prompt: str | None = None
    replies: Sequence[str] = ()

    @property
    def steps(self) -> list[Part]:
        """The parts that are steps."""
        return [part for part in self.parts if part.number is not None]

    @property
    def kinds(self) -> list[Kind]:
        """What the response is: its outcome, and flagged if any step has a weight above 0."""
        outcome = Kind.UNDECIDED if self.outcome is None else Kind.RIGHT if self.outcome > 0 else Kind.WRONG
        return [outcome, Kind.FLAGGED] if any(step.weight > 0 for step in self.steps) else [outcome]


def token_texts(token_ids: Iterable[int], token_bytes: TokenBytes) -> list[str]:
    """The text of each token; a character split over several tokens is with its last, a token without bytes is its id."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = []
    for token_id in token_ids:
        content = token_bytes[token_id]
        texts.append(decoder.decode(content) if content else f"{decoder.decode(b'', final=True)}⟨{token_id}⟩")
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


# ---- written by the trainer


def rows_of_group(
    step: int,
    group: int,
    prompt: str,
    token_ids: Tensor,
    credit: Credit,
    advantages: Tensor,
    votes: Votes,
    token_bytes: TokenBytes,
) -> Iterator[dict[str, Any]]:
    """Rows of a samples file: the responses of one group, with the judge's replies.

    Args:
        step: number of the update.
        group: whose responses.
        prompt: of the group.
        token_ids: [N] int64, all responses of the update.
        credit: of the update.
        advantages: [N] float32, of the credit.
        votes: the judge's replies to all responses of the update.
        token_bytes: of the policy's tokenizer.
    """
    from capo.reference import step_weights

    cu_seqlens, cu_steps = credit.cu_seqlens.tolist(), credit.steps.cu_steps.tolist()
    weights = step_weights(credit.votes, credit.rule.vote).tolist()
    for response in (credit.groups == group).nonzero()[:, 0].tolist():
        first, end = cu_seqlens[response], cu_seqlens[response + 1]
        steps = slice(cu_steps[response], cu_steps[response + 1])
        outcome = credit.outcomes[response].item()
        yield {
            "step": step,
            "response_id": f"{step}/{response}",
            "group": f"update {step}",
            "prompt": prompt,
            "outcome": None if math.isnan(outcome) else outcome,
            "tokens": token_texts(token_ids[first:end].tolist(), token_bytes),
            "advantages": advantages[first:end].tolist(),
            "step_starts": (credit.steps.starts[steps] - first).tolist(),
            "step_ends": (credit.steps.ends[steps] - first).tolist(),
            "step_weights": weights[steps],
            "votes": credit.votes[steps].tolist(),
            "critiques": [{"text": reply.text, "error": reply.error} for reply in votes.replies[response]],
        }


# ---- read for people


def read_samples(
    file: Path,
    token_bytes: TokenBytes | None = None,
    *,
    rollouts: Path | None = None,
    critiques: Path | None = None,
    wanted: Callable[[Sample], bool] = lambda sample: True,
    most: int | None = None,
) -> list[Sample]:
    """The first responses of a file that are wanted.

    Args:
        file: what ``capo score`` wrote (``.parquet``) or ``capo train`` (``samples.jsonl``).
        token_bytes: of the policy's tokenizer; a parquet file has ids only, and needs it.
        rollouts: the file that was scored, for the prompts.
        critiques: the file of critiques, for what the judge wrote.
        wanted: which responses.
        most: how many; None: all.

    Raises:
        UsageError: a file of another kind, a row that contradicts itself, ids that the tokenizer does not know.
    """
    rows = _parquet_rows(file, token_bytes) if file.suffix == ".parquet" else _json_rows(file)
    chosen = []
    for number, row in enumerate(rows, 1):
        try:
            sample = _sample(row)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            words = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UsageError(f"{file}, row {number}: {words}") from None
        if wanted(sample):
            chosen.append((row, sample))
            if len(chosen) == most:
                break
    prompts = _prompts(rollouts, {row["prompt_index"] for row, _ in chosen}) if rollouts else {}
    replies = _replies(critiques, [row for row, _ in chosen]) if critiques else {}
    return [
        Sample(
            sample.id,
            sample.group,
            sample.outcome,
            sample.parts,
            sample.prompt or prompts.get(row.get("prompt_index")),
            sample.replies or replies.get(sample.id, ()),
        )
        for row, sample in chosen
    ]


def _parquet_rows(file: Path, token_bytes: TokenBytes | None) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError("reading parquet needs pyarrow: pip install 'capo[score]'") from error
    if token_bytes is None:
        raise UsageError(f"{file} holds token ids; say which tokenizer they are of with --tokenizer")
    try:
        with pq.ParquetFile(file) as content:
            missing = [name for name in _OF_PARQUET if name not in content.schema_arrow.names]
            if missing:
                raise UsageError(f"{file} was not written by `capo score`: no column {', '.join(missing)}")
            for batch in content.iter_batches(batch_size=64, columns=list(_OF_PARQUET)):
                for row in batch.to_pylist():
                    top = max(row["token_ids"], default=0)
                    if top >= len(token_bytes):
                        raise UsageError(
                            f"{file}: response {row['response_id']} has token {top}, but the tokenizer has "
                            f"{len(token_bytes)} tokens; is it the one of `capo score`?"
                        )
                    yield {**row, "tokens": token_texts(row["token_ids"], token_bytes)}
    except pa.ArrowInvalid as error:
        raise UsageError(f"{file} is not a parquet file: {error}") from None


def _json_rows(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                if line.endswith("\n"):
                    raise UsageError(f"{file}:{number}: not JSON: {error}") from None
                return  # being written right now


def _sample(row: dict[str, Any]) -> Sample:
    columns = [row[name] for name in _COLUMNS]
    tokens, advantages = row["tokens"], columns[0]
    starts, ends, weights, votes = columns[1:]
    if len(tokens) != len(advantages):
        raise ValueError(f"{len(tokens)} tokens, but {len(advantages)} advantages")
    if not len(starts) == len(ends) == len(weights) == len(votes):
        raise ValueError(
            f"{len(starts)} step_starts, {len(ends)} step_ends, {len(weights)} step_weights, {len(votes)} votes"
        )
    if other := {vote for step in votes for vote in step} - {-1, 0, 1}:
        raise ValueError(f"votes must be 1, 0 or -1, got {other}")
    parts, done = [], 0
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if not done <= start <= end <= len(tokens):
            raise ValueError(f"step {number} is from {start} to {end}, after {done}, of {len(tokens)} tokens")
        if start > done:
            parts.append(Part(_runs(tokens[done:start], advantages[done:start])))
        parts.append(
            Part(_runs(tokens[start:end], advantages[start:end]), number, float(weights[number]), votes[number])
        )
        done = end
    if done < len(tokens):
        parts.append(Part(_runs(tokens[done:], advantages[done:])))
    group, outcome = row.get("group_id"), row["outcome"]
    return Sample(
        str(row["response_id"]),
        str(row["group"] if group is None else group),
        None if outcome is None else float(outcome),
        parts,
        row.get("prompt"),
        [_said(item) for item in row.get("critiques") or ()],
    )


def _runs(tokens: Sequence[str], advantages: Sequence[float]) -> list[Run]:
    runs = []
    for advantage, pairs in itertools.groupby(zip(tokens, advantages, strict=True), key=lambda pair: pair[1]):
        texts = [text for text, _ in pairs]
        runs.append(Run("".join(texts), len(texts), float(advantage)))
    return runs


def _said(item: Any) -> str:
    """One critique, in any of the forms of docs/score.md, as text."""
    if isinstance(item, dict) and "flagged" in item:
        return f"flagged: {item['flagged']}" if item.get("valid", True) else f"invalid: {item.get('error')}"
    text, error = (item.get("text"), item.get("error")) if isinstance(item, dict) else (item, None)
    if text is None:
        return f"no reply{f': {error}' if error else ''}"
    return f"{text}\n[invalid: {error}]" if error else str(text)


def _prompts(file: Path, wanted: set[int]) -> dict[int, str]:
    """The prompts of some rows, from 0, of a file of rollouts."""
    from capo.records import _first, read_rows
    from capo.shaping import question_text

    found: dict[int, str] = {}
    for row in read_rows(file):
        if row.line - 1 in wanted and isinstance(row.record, dict):
            prompt = _first(row.record, "prompt", "question")
            try:
                found[row.line - 1] = "" if prompt is None else question_text(prompt)
            except (AttributeError, TypeError):
                raise UsageError(f"{file}:{row.line}: prompt must be a string or a list of messages") from None
            if len(found) == len(wanted):
                break
    return found


def _replies(file: Path, rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What the judge wrote about some responses, by their ids, from a file of critiques."""
    from capo.records import BadRow, _critique_key, read_rows

    ids: dict[str | tuple[int, int], str] = {row["response_id"]: row["response_id"] for row in rows}
    ids.update({(row["prompt_index"], row["response_index"]): row["response_id"] for row in rows})
    found: dict[str, list[str]] = {}
    for row in read_rows(file):
        try:
            key = _critique_key(row.record)
        except BadRow:  # `capo score` has told of it
            continue
        if key in ids and isinstance(said := row.record.get("critiques"), list):
            found.setdefault(ids[key], [_said(item) for item in said])
            if len(found) == len(rows):
                break
    return found
