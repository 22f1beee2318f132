"""Reward shaping of rollouts on disk: outcomes and critiques in, token advantages out. ``docs/score.md`` has the formats.

A file is read once, in chunks of whole groups, so that memory does not grow with it. Only if a group turns out to be
scattered over the file is everything read again and held until its groups are complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

import capo
from capo.credit import Credit, CreditRule
from capo.critique import Agreement, agreement
from capo.records import CritiqueIndex, Rejected, Response, Row, Votes, pack_token_ids, read_rows, responses_of
from capo.reference import step_weights
from capo.steps import segment
from capo.tokenizer import Tokenizer, load_tokenizer
from capo.verify import Verifier

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise ImportError("writing parquet needs pyarrow: pip install 'capo[score]'") from error

CHUNK_TOKENS = 1 << 20  # tokens scored at a time, and about those of a row group; at least one whole group
_CHUNKS_AHEAD = 2  # one that is encoded on all cores, and one whose ids are handed over on one
_THREADS = _CHUNKS_AHEAD + 1  # for these, and to write
_SHOWN_REJECTS = 10

SCHEMA = pa.schema(
    [
        ("response_id", pa.string()),
        ("prompt_index", pa.int64()),
        ("response_index", pa.int32()),
        ("group", pa.int32()),
        ("group_id", pa.string()),
        ("outcome", pa.float32()),
        ("token_ids", pa.list_(pa.int32())),
        ("advantages", pa.list_(pa.float32())),
        ("step_starts", pa.list_(pa.int32())),
        ("step_ends", pa.list_(pa.int32())),
        ("step_weights", pa.list_(pa.float32())),
        ("votes", pa.list_(pa.list_(pa.int8()))),
        ("valid_critiques", pa.int32()),
        ("invalid_critiques", pa.int32()),
        ("failed_critiques", pa.int32()),
    ]
)

Progress = Callable[[float, int, int], None]  # share of the file done, responses and tokens so far


class InputError(ValueError):
    """The arguments are at fault; nothing was read or written."""


@dataclass(frozen=True)
class ScoreSummary:
    """What was scored.

    Args:
        responses, tokens, steps, groups: how many.
        right, wrong, undecided: responses by outcome (above 0, at most 0, none).
        flag_rate: share of flagged among the valid votes, over all steps and over those of right, wrong and undecided
            responses; None where there are no votes.
        vote_agreement, kappa: see `capo.critique.Agreement`.
        critiques: valid, invalid and failed ones.
        uncritiqued: responses with steps and without critiques.
        parse_failures: invalid critiques by reason.
        zero_signal_groups: groups in which every advantage is 0.
        bad_rows: refused rows, or responses of rows.
        bad_row_examples: the first of them.
        seconds: wall time.
        undecided_reasons: undecided responses that were verified, by reason; see `capo.verify.Verifier.counts`.
        other_text: responses given as ids and as text where the ids spell another text, white space at the ends apart. The
            ids count; many such responses mean another tokenizer than the policy's.
    """

    responses: int
    tokens: int
    steps: int
    groups: int
    right: int
    wrong: int
    undecided: int
    flag_rate: dict[str, float | None]
    vote_agreement: float | None
    kappa: float | None
    critiques: dict[str, int]
    uncritiqued: int
    parse_failures: dict[str, int]
    zero_signal_groups: int
    bad_rows: int
    bad_row_examples: tuple[str, ...]
    seconds: float
    undecided_reasons: dict[str, int] = field(default_factory=dict)
    other_text: int = 0


class Scored(NamedTuple):
    """What `score` returns: the table of `SCHEMA`, the summary, the refused rows."""

    table: pa.Table
    summary: ScoreSummary
    rejected: list[Rejected]


@dataclass(frozen=True)
class _Options:
    tokenizer: Tokenizer
    rule: CreditRule
    delimiter: str
    num_votes: int | None
    verifier: Verifier


def score(
    rollouts: Iterable[dict],
    critiques: Iterable[dict] | None,
    tokenizer: Any,
    rule: CreditRule = CreditRule(),
    *,
    delimiter: str = "\n\n",
    num_votes: int | None = None,
) -> Scored:
    """Token advantages of records in memory; everything is as in `score_file`.

    Args:
        rollouts: rollout rows.
        critiques: critique rows; None if there are none.
        tokenizer: see `capo.tokenizer.load_tokenizer`.
        rule: how outcomes and votes become advantages.
        delimiter: what separates steps.
        num_votes: number of votes of every step; None: as many as the response has critiques.

    Raises:
        InputError: an argument is at fault. Rows never raise; see ``Scored.rejected``.
        VerifierError: answers need Math-Verify, which does not start.
    """
    options = _options(tokenizer, rule, delimiter, num_votes, critiques is not None)
    index = CritiqueIndex.of_records(critiques or ())
    rows = (Row(line, record, None, b"") for line, record in enumerate(rollouts, 1))
    batches: list[pa.RecordBatch] = []
    rejected: list[Rejected] = []
    run = _Run(options, index, "rollouts", batches.append, rejected.append)
    with options.verifier:
        run.all_at_once(rows)
    return Scored(pa.Table.from_batches(batches, _schema(options)), run.summary(), rejected)


def score_file(
    rollouts: str | PathLike[str],
    critiques: str | PathLike[str] | None,
    tokenizer: Any,
    out: str | PathLike[str],
    rule: CreditRule = CreditRule(),
    *,
    delimiter: str = "\n\n",
    num_votes: int | None = None,
    summary: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> ScoreSummary:
    """Token advantages of a file of rollouts, written to a parquet file.

    ``out`` appears whole or not at all, and an older file in its place stays until then. Rows that cannot be used are
    written to ``<out>.rejected.jsonl`` with the reason, and all others are scored; a file of that name from an earlier
    run is removed if there are none.

    Args:
        rollouts: JSON lines or parquet.
        critiques: JSON lines; None if there are none, for rules that need none.
        tokenizer: see `capo.tokenizer.load_tokenizer`.
        out: the parquet file.
        rule: how outcomes and votes become advantages.
        delimiter: what separates steps.
        num_votes: number of votes of every step, those missing count as abstained, and a response with more critiques is
            refused them; None: as many as the response has critiques.
        summary: where to write the summary as JSON; None: nowhere.
        progress: called now and then.

    Raises:
        InputError: an argument is at fault; nothing was written.
        OSError: reading or writing failed; nothing was left behind.
        VerifierError: answers need Math-Verify, which does not start; nothing was left behind.
    """
    started = time.perf_counter()
    rollouts, out = Path(rollouts), Path(out)
    critiques = None if critiques is None else Path(critiques)
    summary = None if summary is None else Path(summary)
    rejects = out.with_name(f"{out.name}.rejected.jsonl")
    _check_files([file for file in (rollouts, critiques) if file], [file for file in (out, rejects, summary) if file])
    options = _options(tokenizer, rule, delimiter, num_votes, critiques is not None)
    if rollouts.suffix == ".parquet":
        _check_parquet(rollouts)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_no_garbage_collection())
        stack.enter_context(options.verifier)
        table = stack.enter_context(_draft(out))
        listing = stack.enter_context(_draft(rejects))
        report = None if summary is None else stack.enter_context(_draft(summary))
        index = CritiqueIndex.of_records(()) if critiques is None else CritiqueIndex.of_file(critiques)

        def attempt(read: Callable[[_Run, Iterator[Row]], None]) -> _Run:
            for draft in (table, listing):
                draft.restart()
            index.reset()
            with pq.ParquetWriter(table.file, _schema(options), compression="zstd") as writer:
                run = _Run(options, index, str(rollouts), writer.write_batch, listing.write_rejected)
                rows = read_rows(rollouts)
                read(run, rows if progress is None else _watched(rows, rollouts, run, progress))
            return run

        try:
            run = attempt(_Run.in_chunks)
        except _ScatteredGroup:
            run = attempt(_Run.all_at_once)
        result = dataclasses.replace(run.summary(), seconds=time.perf_counter() - started)
        if report is not None:
            report.file.write(json.dumps(dataclasses.asdict(result), indent=2).encode() + b"\n")
            report.commit()
        if result.bad_rows:
            listing.commit()
        table.commit()
    if not result.bad_rows:
        rejects.unlink(missing_ok=True)
    return result


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Rows are millions of containers without a cycle; looking for cycles in them takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _ScatteredGroup(Exception):
    """A response came whose group has been scored already."""


class _Run:
    """One pass over the rows: from rows to groups, chunks, batches, and the counts of the summary.

    Args:
        options: how to score.
        critiques: where the critiques are.
        file: name of the rollouts, for messages.
        write: takes each batch of `SCHEMA`, in another thread.
        reject: takes each refused row.

    Text is encoded some chunks ahead and batches are written a chunk behind, in other threads: both are native code.
    """

    def __init__(
        self,
        options: _Options,
        critiques: CritiqueIndex,
        file: str,
        write: Callable[[pa.RecordBatch], None],
        reject: Callable[[Rejected], None],
    ) -> None:
        self.options = options
        self.tallies = _Tallies()
        self._verified = options.verifier.counts
        self._critiques = critiques
        self._file = file
        self._write = write
        self._reject_to = reject
        self._group_numbers: dict[Any, int] = {}
        self._ids: set[str] = set()
        self._ahead: deque[tuple[list[Response], Future | None]] = deque()
        self._writing: Future | None = None

    def in_chunks(self, rows: Iterable[Row]) -> None:
        """Score rows whose groups are adjacent; raises `_ScatteredGroup` as soon as they are not."""
        chunk: list[Response] = []
        size, first_open = 0, 0
        with ThreadPoolExecutor(_THREADS) as threads:
            for response in self._responses(rows):
                if response.group < first_open:
                    raise _ScatteredGroup
                if size >= CHUNK_TOKENS and response.group != chunk[-1].group:
                    first_open = response.group
                    self._push(chunk, threads)
                    chunk, size = [], 0
                chunk.append(response)
                size += response.size
            self._finish([chunk], threads)

    def all_at_once(self, rows: Iterable[Row]) -> None:
        """Score rows in any order; the responses of a group come out together."""
        groups: dict[int, list[Response]] = {}
        for response in self._responses(rows):
            groups.setdefault(response.group, []).append(response)
        with ThreadPoolExecutor(_THREADS) as threads:
            self._finish(_chunks(groups.values()), threads)

    def summary(self) -> ScoreSummary:
        verified = self.options.verifier.counts - self._verified
        reasons = {name.split("/")[1]: number for name, number in verified.items() if name.startswith("undecided/")}
        return dataclasses.replace(self.tallies.summary(), undecided_reasons=reasons)

    def _finish(self, chunks: Iterable[list[Response]], threads: ThreadPoolExecutor) -> None:
        for chunk in chunks:
            self._push(chunk, threads)
        while self._ahead:
            self._score_next(threads)
        if self._writing is not None:
            self._writing.result()
        for rejected in self._critiques.rejected():
            self._reject(rejected)

    def _push(self, chunk: list[Response], threads: ThreadPoolExecutor) -> None:
        """Begin to encode a chunk of whole groups, and score the one that is longest under way."""
        texts = [response.text or "" for response in chunk if response.token_ids is None]
        if texts and self.options.tokenizer.why_not:
            raise InputError(f"a response is given as text and cannot be encoded: {self.options.tokenizer.why_not}")
        self._ahead.append((chunk, threads.submit(self._encode, texts) if texts else None))
        if len(self._ahead) > _CHUNKS_AHEAD:
            self._score_next(threads)

    def _score_next(self, threads: ThreadPoolExecutor) -> None:
        chunk, encoding = self._ahead.popleft()
        batch = self._scored(chunk, encoding.result() if encoding else [])
        if self._writing is not None:
            self._writing.result()
        self._writing = threads.submit(self._write, batch) if batch is not None else None

    def _responses(self, rows: Iterable[Row]) -> Iterator[Response]:
        """The responses that can be used, each with the number of its group, in order of first appearance."""
        for row in rows:
            for response in responses_of(row, len(self.options.tokenizer.token_bytes)):
                if isinstance(response, Rejected):
                    self._reject(dataclasses.replace(response, file=self._file))
                elif response.id in self._ids:
                    self._reject(response.rejected(self._file, f"response id {response.id!r} was there before"))
                else:
                    self._ids.add(response.id)
                    response.group = self._group_numbers.setdefault(response.group_key, len(self._group_numbers))
                    yield response

    def _reject(self, rejected: Rejected) -> None:
        self.tallies.bad_rows += 1
        if len(self.tallies.bad_row_examples) < _SHOWN_REJECTS:
            self.tallies.bad_row_examples.append(str(rejected))
        self._reject_to(rejected)

    def _encode(self, texts: list[str]) -> list[bytes]:
        tokenizer = self.options.tokenizer
        return [pack_token_ids(ids, len(tokenizer.token_bytes)) for ids in tokenizer.encode(texts)]

    def _scored(self, responses: list[Response], encoded: list[bytes]) -> pa.RecordBatch | None:
        """The rows of the output for whole groups; None if none of their responses can be used."""
        options = self.options
        responses = self._with_ids(responses, encoded)
        if not responses:
            return None
        self._verify(responses)
        packed_ids = [response.token_ids or b"" for response in responses]
        token_ids = np.frombuffer(bytearray().join(packed_ids), np.int32)
        cu_seqlens = np.zeros(len(responses) + 1, np.int64)
        np.cumsum([len(ids) // 4 for ids in packed_ids], out=cu_seqlens[1:])
        packed = torch.from_numpy(token_ids), torch.from_numpy(cu_seqlens)
        steps = segment(*packed, options.tokenizer.token_bytes, options.delimiter)
        cu_steps = steps.cu_steps.numpy()
        heard = [
            self._critiques.take(response, count, options.num_votes)
            for response, count in zip(responses, np.diff(cu_steps).tolist(), strict=True)
        ]
        votes = Votes.of(heard, cu_steps, options.num_votes)
        outcomes = torch.from_numpy(np.array([response.outcome for response in responses], np.float32))
        groups = torch.from_numpy(np.array([response.group for response in responses], np.int32))
        credit = Credit(outcomes, torch.from_numpy(votes.table), steps, packed[1], groups, options.rule)
        chunk = _Chunk(responses, votes, token_ids, credit, credit.advantages().numpy())
        self.tallies.add(chunk)
        return chunk.batch(options)

    def _with_ids(self, responses: list[Response], encoded: list[bytes]) -> list[Response]:
        """The responses, those given as text with the ids they were encoded to, if their logprobs are as many."""
        rest = iter(encoded)
        kept = []
        for response in responses:
            if response.token_ids is not None and response.text is not None:
                ids = memoryview(response.token_ids).cast("i")
                spelled = self.options.tokenizer.token_bytes.join(ids)
                self.tallies.other_text += spelled.strip() != response.text.encode().strip()
            if response.token_ids is None:
                response.token_ids = next(rest)
            length = len(response.token_ids) // 4
            if response.num_logprobs in (None, length):
                kept.append(response)
            else:
                reason = f"{response.num_logprobs} logprobs, but the text has {length} tokens"
                self._reject(response.rejected(self._file, reason))
        return kept

    def _verify(self, responses: list[Response]) -> None:
        """Give every response an outcome: verified where the file gives none, NaN where there is no answer either."""
        open_ones = [response for response in responses if response.outcome is None and response.answer is not None]
        # What the policy sampled is what is verified, and that is the ids.
        join = self.options.tokenizer.token_bytes.join
        texts = [
            join(memoryview(response.token_ids or b"").cast("i")).decode("utf-8", "replace") for response in open_ones
        ]
        verified = self.options.verifier.verify(texts, [response.answer or "" for response in open_ones])
        for response, outcome in zip(open_ones, verified, strict=True):
            response.outcome = outcome.reward
        for response in responses:
            if response.outcome is None:
                response.outcome = math.nan


@dataclass(frozen=True)
class _Chunk:
    """Responses and what was made of them, packed."""

    responses: list[Response]
    votes: Votes
    token_ids: np.ndarray
    credit: Credit
    advantages: np.ndarray

    @cached_property
    def valid(self) -> np.ndarray:
        """Valid votes on each step. [M]"""
        return _count(self.votes.table >= 0)

    @cached_property
    def flagged(self) -> np.ndarray:
        """Votes that flag each step. [M]"""
        return _count(self.votes.table == 1)

    @cached_property
    def cases(self) -> tuple[np.ndarray, np.ndarray]:
        """The pairs (valid, flagged) that occur, [C, 2], and which of them each step is, [M]."""
        base = self.votes.table.shape[1] + 1
        codes, place = np.unique(self.valid * base + self.flagged, return_inverse=True)
        return np.stack([codes // base, codes % base], 1), place

    def batch(self, options: _Options) -> pa.RecordBatch:
        """The rows of the output, made of flat buffers and offsets."""
        steps = self.credit.steps
        cu_seqlens, cu_steps = self.credit.cu_seqlens.numpy(), steps.cu_steps.numpy()
        offsets, step_offsets = pa.array(cu_seqlens, pa.int32()), pa.array(cu_steps, pa.int32())
        origins = np.repeat(cu_seqlens[:-1], np.diff(cu_steps))
        # The weight depends on how many votes say what, and there are few such cases.
        cases, place = self.cases
        weights = step_weights(_votes_saying(cases), options.rule.vote).numpy()[place]

        def by_token(values: np.ndarray) -> pa.Array:
            return pa.ListArray.from_arrays(offsets, pa.array(values))

        def by_step(values: Any, dtype: Any) -> pa.Array:
            return pa.ListArray.from_arrays(step_offsets, pa.array(values.astype(dtype)))

        columns = [
            pa.array([response.id for response in self.responses], pa.string()),
            pa.array([response.line - 1 for response in self.responses], pa.int64()),
            pa.array([response.index for response in self.responses], pa.int32()),
            pa.array(self.credit.groups.numpy()),
            pa.array([response.group_id for response in self.responses], pa.string()),
            pa.array(self.credit.outcomes.numpy(), from_pandas=True),  # NaN is null
            by_token(self.token_ids),
            by_token(self.advantages),
            by_step(steps.starts.numpy() - origins, np.int32),
            by_step(steps.ends.numpy() - origins, np.int32),
            by_step(weights, np.float32),
            pa.ListArray.from_arrays(step_offsets, self._votes(options.num_votes)),
            *(pa.array(count.astype(np.int32)) for count in (self.votes.valid, self.votes.invalid, self.votes.failed)),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=_schema(options))

    def _votes(self, num_votes: int | None) -> pa.ListArray:
        """The votes of each step, without the columns that only other responses have."""
        table = self.votes.table
        num_steps = np.diff(self.credit.steps.cu_steps.numpy())
        own = np.full_like(self.votes.given, num_votes) if num_votes else self.votes.given
        widths = np.repeat(own, num_steps)
        values = table[np.arange(table.shape[1]) < widths[:, None]]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(widths)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


@dataclass
class _Tallies:
    """The counts of the summary."""

    responses: int = 0
    tokens: int = 0
    steps: int = 0
    signal_groups: int = 0
    groups: int = 0
    uncritiqued: int = 0
    other_text: int = 0
    bad_rows: int = 0
    bad_row_examples: list[str] = field(default_factory=list)
    by_outcome: Counter[str] = field(default_factory=Counter)
    critiques: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    valid_votes: Counter[str] = field(default_factory=Counter)
    flagged_votes: Counter[str] = field(default_factory=Counter)
    cases: Counter[tuple[int, int]] = field(default_factory=Counter)  # steps by (valid votes, flagged votes)

    def add(self, chunk: _Chunk) -> None:
        credit = chunk.credit
        cu_steps = credit.steps.cu_steps.numpy()
        outcomes, groups = credit.outcomes.numpy(), credit.groups.numpy()
        valid_of, flagged_of = _sums(chunk.valid, cu_steps), _sums(chunk.flagged, cu_steps)
        classes = {"right": outcomes > 0, "wrong": outcomes <= 0, "undecided": np.isnan(outcomes)}
        for name, members in classes.items():
            self.by_outcome[name] += int(members.sum())
            self.valid_votes[name] += int(valid_of[members].sum())
            self.flagged_votes[name] += int(flagged_of[members].sum())
        cases, place = chunk.cases
        for case, count in zip(map(tuple, cases.tolist()), np.bincount(place, minlength=len(cases)), strict=True):
            self.cases[case] += int(count)
        has_signal = np.diff(np.searchsorted(np.flatnonzero(chunk.advantages), credit.cu_seqlens.numpy())) > 0
        self.signal_groups += len(np.unique(groups[has_signal]))
        self.groups += len(np.unique(groups))
        self.responses += len(chunk.responses)
        self.tokens += len(chunk.token_ids)
        self.steps += len(chunk.valid)
        votes = chunk.votes
        for name, counts in (("valid", votes.valid), ("invalid", votes.invalid), ("failed", votes.failed)):
            self.critiques[name] += int(counts.sum())
        self.reasons.update(votes.reasons)
        self.uncritiqued += int((np.diff(cu_steps)[votes.silent] > 0).sum())

    def agreement(self) -> Agreement:
        """Agreement of all votes; how the votes on a step are arranged does not matter, only how many say what."""
        cases = sorted(self.cases.items())  # so that chunks change no bit
        counts = torch.tensor([count for _, count in cases], dtype=torch.int64)
        return agreement(_votes_saying(np.array([case for case, _ in cases], np.int64).reshape(-1, 2)), counts)

    def summary(self) -> ScoreSummary:
        agreed = self.agreement()
        flag_rate = {"all": agreed.flag_rate}
        for name in ("right", "wrong", "undecided"):
            valid = self.valid_votes[name]
            flag_rate[name] = self.flagged_votes[name] / valid if valid else None
        return ScoreSummary(
            responses=self.responses,
            tokens=self.tokens,
            steps=self.steps,
            groups=self.groups,
            right=self.by_outcome["right"],
            wrong=self.by_outcome["wrong"],
            undecided=self.by_outcome["undecided"],
            flag_rate=flag_rate,
            vote_agreement=agreed.agreement,
            kappa=agreed.kappa,
            critiques={state: self.critiques[state] for state in ("valid", "invalid", "failed")},
            uncritiqued=self.uncritiqued,
            parse_failures=dict(self.reasons.most_common()),
            zero_signal_groups=self.groups - self.signal_groups,
            bad_rows=self.bad_rows,
            bad_row_examples=tuple(self.bad_row_examples),
            seconds=0.0,
            other_text=self.other_text,
        )


def _count(votes: np.ndarray) -> np.ndarray:
    """True values per row; by column, since there are few and the rows are many."""
    total = np.zeros(len(votes), np.int64)
    for column in votes.T:
        total += column
    return total


def _votes_saying(cases: np.ndarray) -> torch.Tensor:
    """A vote table with a row for each pair (valid votes, flagged votes)."""
    column = np.arange(cases[:, 0].max(initial=0))
    rows = np.where(column < cases[:, 1:], 1, np.where(column < cases[:, :1], 0, -1))
    return torch.from_numpy(rows.astype(np.int8))


def _sums(values: np.ndarray, cumulative: np.ndarray) -> np.ndarray:
    """Sum of the values of each segment; 0 for an empty one."""
    totals = np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])
    return totals[cumulative[1:]] - totals[cumulative[:-1]]


def _chunks(groups: Iterable[list[Response]]) -> Iterator[list[Response]]:
    chunk: list[Response] = []
    size = 0
    for group in groups:
        chunk += group
        size += sum(response.size for response in group)
        if size >= CHUNK_TOKENS:
            yield chunk
            chunk, size = [], 0
    yield chunk


def _schema(options: _Options) -> pa.Schema:
    """The columns, with what they were made with in the metadata."""
    made_with = {
        "version": capo.__version__,
        "rule": dataclasses.asdict(options.rule),
        "delimiter": options.delimiter,
        "num_votes": options.num_votes,
    }
    return SCHEMA.with_metadata({"capo": json.dumps(made_with)})


# ---- checks and files


def _options(tokenizer: Any, rule: CreditRule, delimiter: str, num_votes: int | None, critiqued: bool) -> _Options:
    if not delimiter:
        raise InputError("the delimiter is empty")
    if num_votes is not None and num_votes < 1:
        raise InputError(f"num_votes must be at least 1, got {num_votes}")
    if rule.process_weight > 0 and not critiqued:
        raise InputError(
            f"the rule gives the steps a weight of {rule.process_weight:g}, but there are no critiques; "
            "give critiques or a process weight of 0"
        )
    try:
        return _Options(load_tokenizer(tokenizer), rule, delimiter, num_votes, Verifier())
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"tokenizer: {error}") from error


def _check_files(inputs: list[Path], outputs: list[Path]) -> None:
    for file in inputs:
        if not file.exists():
            raise InputError(f"{file} does not exist")
        if not file.is_file():
            raise InputError(f"{file} is not a file")
    taken = {file.resolve() for file in inputs}
    for file in outputs:
        if file.is_dir():
            raise InputError(f"{file} is a directory")
        if not file.parent.is_dir():
            raise InputError(f"{file.parent} is not a directory")
        if file.resolve() in taken:
            raise InputError(f"{file} would overwrite another file of this run")
        taken.add(file.resolve())


def _check_parquet(file: Path) -> None:
    try:
        pq.read_schema(file)
    except pa.ArrowInvalid as error:
        raise InputError(f"{file} is not a parquet file: {error}") from error


@dataclass(frozen=True)
class _Draft:
    """A file written beside its place; see `_draft`."""

    file: BinaryIO
    temporary: Path
    place: Path

    def restart(self) -> None:
        """Throw away what was written."""
        self.file.seek(0)
        self.file.truncate()

    def write_rejected(self, rejected: Rejected) -> None:
        self.file.write(rejected.to_json() + b"\n")

    def commit(self) -> None:
        """Put the file in its place, whole."""
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self.temporary, self.place)


@contextlib.contextmanager
def _draft(place: Path) -> Iterator[_Draft]:
    """A file to be moved to its place by `_Draft.commit`, and gone at the end of the block if it was not.

    Raises:
        InputError: the folder cannot be written to.
    """
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(temporary, "wb"))
        except OSError as error:
            raise InputError(f"cannot write to {place.parent}: {error.strerror}") from error
        stack.callback(temporary.unlink, missing_ok=True)
        yield _Draft(file, temporary, place)


def _watched(rows: Iterator[Row], file: Path, run: _Run, progress: Progress) -> Iterator[Row]:
    """The rows, with a call of ``progress`` now and then."""
    is_parquet = file.suffix == ".parquet"
    total = pq.read_metadata(file).num_rows if is_parquet else file.stat().st_size
    done = 0
    for number, row in enumerate(rows):
        if number % 256 == 0:
            progress(done / max(total, 1), run.tallies.responses, run.tallies.tokens)
        done += 1 if is_parquet else len(row.raw)
        yield row
    progress(1.0, run.tallies.responses, run.tallies.tokens)
