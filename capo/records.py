"""Rows of rollout and critique files: read, checked one by one, refused with a reason. ``docs/score.md`` has the format."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from capo.critique import REASONS, check_nonce, read_votes

try:
    from capo import _native
except ImportError:  # built without the native module
    _native = None

try:
    import orjson
except ImportError as error:
    raise ImportError("reading rollout files needs orjson and pyarrow: pip install 'capo[score]'") from error

_FLOAT32_MAX = 3.4028234663852886e38
_NUMBER = (bool, int, float)  # made once: a union of types costs more than the check


class BadRow(ValueError):
    """A row, or one response of it, that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Rejected:
    """A refused row, whole, so that it can be mended and run again.

    Args:
        file: where it came from.
        line: its number there, from 1.
        response: which of the row's responses, from 0; None for the row itself.
        reason: why.
        row: the row as it came, bytes where it is not JSON; of a row with several responses, with the refused one only.
    """

    file: str
    line: int
    response: int | None
    reason: str
    row: Any

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}"
        return (
            f"{place}: {self.reason}" if self.response is None else f"{place}, response {self.response}: {self.reason}"
        )

    def to_json(self) -> bytes:
        """One line of JSON; a row that is not UTF-8 stands there in base64, as ``row_base64``."""
        content = {"file": self.file, "line": self.line, "response": self.response, "reason": self.reason}
        if not isinstance(self.row, bytes):
            return orjson.dumps({**content, "row": self.row}, default=str)
        try:
            return orjson.dumps({**content, "row": self.row.decode()})
        except UnicodeDecodeError:
            import base64

            return orjson.dumps({**content, "row_base64": base64.b64encode(self.row).decode()})


class Row(NamedTuple):
    """A row of a file: its number from 1, its content or why it has none, and its bytes, for files made of them."""

    line: int
    record: Any
    error: str | None
    raw: bytes


@dataclass(slots=True)
class Response:
    """One response of a rollout row. ``outcome`` is NaN if undecided, None if the answer is yet to be verified;
    ``token_ids`` are the bytes of int32 values, None if they are yet to be encoded."""

    id: str
    line: int
    index: int
    record: Any
    group_key: Any
    group_id: str | None
    outcome: float | None
    answer: str | None
    text: str | None
    token_ids: bytes | None
    num_logprobs: int | None
    group: int = -1

    @property
    def size(self) -> int:
        """What it takes of a chunk: its tokens, about, if it is not encoded yet, and something for itself."""
        return 8 + (len(self.token_ids) // 4 if self.token_ids is not None else len(self.text or "") // 3)

    def rejected(self, file: str, reason: str) -> Rejected:
        """This response as a refused row."""
        responses = self.record.get("responses")
        if responses is None:
            return Rejected(file, self.line, None, reason, self.record)
        return Rejected(file, self.line, self.index, reason, {**self.record, "responses": [responses[self.index]]})


# ---- files


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON lines or parquet file; blank lines are counted and left out. Bad lines come as errors."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            line = 0
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    line += 1
                    yield Row(line, record, None, b"")
        return
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            if (row := read_line(line, raw)) is not None:
                yield row


def read_line(line: int, raw: bytes) -> Row | None:
    """One line of a JSON lines file; None if it is blank."""
    text = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
    try:
        return Row(line, orjson.loads(text), None, raw)
    except orjson.JSONDecodeError as error:
        if not text.strip():
            return None
        # Python writes NaN and Infinity, which are no JSON. Where they matter is found out value by value.
        record = _with_nan(text) if b"NaN" in text or b"Infinity" in text else None
        reason = None if record is not None else f"not valid JSON: {error}"
        return Row(line, record, reason, raw.rstrip(b"\r\n"))


def _with_nan(text: bytes) -> Any:
    try:
        record = json.loads(text)
        orjson.dumps(record)  # refuses what only json lets pass: halves of characters, integers of any size
    except (ValueError, TypeError, RecursionError):
        return None
    return record


# ---- rollouts


def responses_of(row: Row, vocabulary: int) -> Iterator[Response | Rejected]:
    """The responses of a rollout row, those that cannot be used as `Rejected` (``file`` left empty).

    Args:
        row: the row.
        vocabulary: token ids must be below this.
    """
    if row.error is not None:
        yield Rejected("", row.line, None, row.error, row.raw)
        return
    record = row.record
    try:
        if not isinstance(record, dict):
            raise BadRow(f"a row must be an object, got {_kind(record)}")
        elements = record.get("responses")
        if elements is not None and not isinstance(elements, list):
            raise BadRow(f"responses must be a list, got {_kind(elements)}")
        if elements == []:
            raise BadRow("responses is empty")
        group_key, group_id = _group(record, row.line, alone=elements is None)
        answer = _answer(record)
    except BadRow as error:
        yield Rejected("", row.line, None, str(error), record)
        return
    for index, element in enumerate([record] if elements is None else elements):
        try:
            yield _response(element, record, row.line, index, group_key, group_id, answer, vocabulary)
        except BadRow as error:
            if elements is None:
                yield Rejected("", row.line, None, str(error), record)
            else:
                yield Rejected("", row.line, index, str(error), {**record, "responses": [element]})


def _response(
    element: Any, record: Any, line: int, index: int, group_key: Any, group_id: str | None, answer: Any, vocabulary: int
) -> Response:
    if isinstance(element, str):
        element = {"text": element}
    if not isinstance(element, dict):
        raise BadRow(f"a response must be an object or a string, got {_kind(element)}")
    token_ids = element.get("token_ids")
    text = _first(element, "response", "text", "completion")
    packed = None
    if token_ids is not None:
        packed = pack_token_ids(token_ids, vocabulary)
    elif text is None:
        raise BadRow("missing key: a response needs token_ids or text")
    if text is not None:
        _check_text("the text of a response", text)
    logprobs = element.get("logprobs")
    if logprobs is not None and not isinstance(logprobs, list):
        raise BadRow(f"logprobs must be a list, got {_kind(logprobs)}")
    num_logprobs = None if logprobs is None else len(logprobs)
    if token_ids is not None and num_logprobs not in (None, len(token_ids)):
        raise BadRow(f"{num_logprobs} logprobs for {len(token_ids)} token_ids")
    id_ = _identifier(element, "id", "response_id")
    if id_ is None:
        id_ = f"{line - 1}/{index}"
    outcome = _outcome(element)
    # By position, which takes half as long as by name.
    return Response(id_, line, index, record, group_key, group_id, outcome, answer, text, packed, num_logprobs)


def pack_token_ids(token_ids: Any, vocabulary: int) -> bytes:
    """A list of integers in [0, vocabulary) as the bytes of int32 values.

    Raises:
        BadRow: it is something else.
    """
    if not isinstance(token_ids, list):
        raise BadRow(f"token_ids must be a list, got {_kind(token_ids)}")
    if _native is not None and (packed := _native.pack_ids(token_ids, vocabulary)) is not None:
        return packed
    for place, value in enumerate(token_ids):
        if type(value) is not int:
            raise BadRow(f"token_ids must be integers, got {_kind(value)} at position {place}")
    for place, value in enumerate(token_ids):
        if not 0 <= value < vocabulary:
            raise BadRow(f"token id {value} at position {place} is outside the vocabulary of {vocabulary}")
    return array("i", token_ids).tobytes()


def _outcome(element: dict) -> float | None:
    if "outcome" not in element:
        return None
    outcome = element["outcome"]
    if outcome is None:
        return math.nan
    if not isinstance(outcome, _NUMBER):
        raise BadRow(f"outcome must be a number or null, got {_kind(outcome)}")
    if not abs(outcome) <= _FLOAT32_MAX:
        raise BadRow(f"outcome must be finite, got {outcome}; null says undecided")
    return float(outcome)


def _group(record: dict, line: int, alone: bool) -> tuple[Any, str | None]:
    """What the responses of one group share, and the group's name if the file gives one."""
    prompt = _first(record, "prompt", "question")
    if prompt is not None and not isinstance(prompt, list):
        _check_text("prompt", prompt, "a string or a list of messages")
    group_id = _identifier(record, "group", "group_id", "prompt_id")
    if group_id is not None:
        return ("group", group_id), group_id
    if prompt is None:
        raise BadRow("missing key: prompt (or group)")
    if not alone:
        return ("line", line), None
    # Keys of all groups are kept, so they are short.
    try:
        written = orjson.dumps(prompt, option=orjson.OPT_SORT_KEYS)
    except TypeError as error:
        raise BadRow(f"prompt is not JSON: {error}") from error
    return hashlib.blake2b(written, digest_size=16).digest(), None


def _answer(record: dict) -> str | None:
    answer = _first(record, "answer", "reference", "solution", "label")
    if answer is None and isinstance(record.get("reward_model"), dict):
        answer = record["reward_model"].get("ground_truth")
    if answer is None:
        return None
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise BadRow(f"answer must be a string or a number, got {_kind(answer)}")
    return str(answer)


def _identifier(record: dict, *names: str) -> str | None:
    for name in names:
        if (value := record.get(name)) is not None:
            if type(value) is int:
                return str(value)
            _check_text(name, value, "a string or an integer")
            return value
    return None


def _check_text(name: str, value: Any, wanted: str = "a string") -> None:
    """Raise BadRow unless this is a string that can be written as UTF-8; one from JSON always can."""
    if not isinstance(value, str):
        raise BadRow(f"{name} must be {wanted}, got {_kind(value)}")
    if value.isascii():
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{name} has half a character at position {error.start}") from error


def _first(record: dict, *names: str) -> Any:
    for name in names:
        if (value := record.get(name)) is not None:
            return value
    return None


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "an integer",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


# ---- critiques


@dataclass(slots=True)
class Heard:
    """What the critiques of one response say: for each a judge's reply, or the list of steps it flags, or None; and
    ``about`` it the nonce of the reply, or why there is None: a reason, or None where no reply came."""

    said: list[str | list[int] | None]
    about: list[str | None]


@dataclass(frozen=True)
class Votes:
    """The votes of B responses on their steps.

    Args:
        table: int8 [M, K], see `capo.critique.vote_table`.
        given, valid, invalid, failed: int64 [B], how many critiques.
        silent: bool [B], the responses of which no critiques are known.
        reasons: invalid critiques by reason.
    """

    table: np.ndarray
    given: np.ndarray
    valid: np.ndarray
    invalid: np.ndarray
    failed: np.ndarray
    silent: np.ndarray
    reasons: Counter[str]

    @classmethod
    def of(cls, heard: list[Heard | None], cu_steps: np.ndarray, num_votes: int | None) -> Votes:
        """Read what was heard of each response, if anything; ``num_votes`` is K, None takes the most that one has."""
        known = [one for one in heard if one is not None]
        said = list(chain.from_iterable([one.said for one in known]))
        about = list(chain.from_iterable([one.about for one in known]))
        given = np.array([0 if one is None else len(one.said) for one in heard], np.int64)
        cu_said = np.concatenate([np.zeros(1, np.int64), np.cumsum(given)])
        width = int(given.max(initial=0)) if num_votes is None else num_votes
        table, states = read_votes(said, about, cu_said, cu_steps, width)
        unsaid = np.flatnonzero(states == 255)
        lost = unsaid[[about[place] is None for place in unsaid.tolist()]]
        counts = np.bincount(states, minlength=1 + len(REASONS))
        reasons = Counter({reason.value: int(counts[1 + i]) for i, reason in enumerate(REASONS) if counts[1 + i]})
        reasons.update(why for place in unsaid.tolist() if (why := about[place]) is not None)
        response = np.repeat(np.arange(len(heard)), given)
        valid = np.bincount(response[states == 0], minlength=len(heard))
        failed = np.bincount(response[lost], minlength=len(heard))
        silent = np.array([one is None for one in heard], bool)
        return cls(table, given, valid, given - valid - failed, failed, silent, reasons)


class CritiqueIndex:
    """Where the critiques of each response lie. Rows are read until those wanted are found: once only if they come in the
    order of the responses, and if they do not, again when their response is scored.

    Args:
        file: name of the source, for messages.
        rows: the rows, each with what finds it again: the record itself, or its first and last byte in ``data``.
        data: bytes of the file.
    """

    def __init__(self, file: str, rows: Iterator[tuple[Row, Any]], data: Any = None) -> None:
        self.file = file
        self._unread = rows
        self._data = data
        self._rows: list[tuple[int, Any]] = []  # line number; what finds it again
        self._places: dict[str | tuple[int, int], int] = {}
        self._last_read: Any = None  # the record of the last of these rows
        self._taken: set[int] = set()
        self._unreadable: list[Rejected] = []
        self._refused: list[Rejected] = []

    @classmethod
    def of_file(cls, path: Path) -> CritiqueIndex:
        """Of a JSON lines file; a row without place or content is refused."""
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return cls(str(path), iter(()))
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(str(path), _placed_rows(data), data)

    @classmethod
    def of_records(cls, records: Iterable[dict]) -> CritiqueIndex:
        """Of records in memory."""
        return cls("critiques", ((Row(line, record, None, b""), record) for line, record in enumerate(records, 1)))

    def take(self, response: Response, num_steps: int, num_votes: int | None) -> Heard | None:
        """The critiques of one response; those that do not fit it are refused, and then it has none."""
        places, by_id, by_position = self._places, response.id, (response.line - 1, response.index)
        while by_id not in places and by_position not in places:
            if not self._read_row():
                return None
        found = {places[key] for key in (by_id, by_position) if key in places}
        place = min(found)
        self._taken |= found
        for other in found - {place}:
            self._refuse(other, f"a second row of critiques of response {response.id}")
        try:
            return critiques_of(self._record(place), num_steps, num_votes)
        except BadRow as error:
            self._refuse(place, str(error))
            return None

    def rejected(self) -> list[Rejected]:
        """All rows that were refused, and those whose response never came."""
        while self._read_row():
            pass
        for place in range(len(self._rows)):
            if place not in self._taken:
                self._refuse(place, "critiques of a response that is not there, was refused, or has others already")
        return sorted(self._unreadable + self._refused, key=lambda rejected: rejected.line)

    def reset(self) -> None:
        """Forget which critiques were taken or refused."""
        self._taken.clear()
        self._refused.clear()

    def _read_row(self) -> bool:
        """Read one more row, if there is one."""
        row, where = next(self._unread, (None, None))
        if row is None:
            return False
        try:
            if row.error is not None:
                raise BadRow(row.error)
            key = _critique_key(row.record)
            if key in self._places:
                first_line = self._rows[self._places[key]][0]
                raise BadRow(f"critiques of this response are in line {first_line} already")
            critiques = row.record.get("critiques")
            if not isinstance(critiques, list):
                raise BadRow(f"critiques must be a list, got {_kind(critiques)}")
        except BadRow as error:
            content = row.raw if row.error is not None else row.record
            self._unreadable.append(Rejected(self.file, row.line, None, str(error), content))
            return True
        self._places[key] = len(self._rows)
        self._rows.append((row.line, where))
        self._last_read = row.record
        return True

    def _record(self, place: int) -> dict:
        if place == len(self._rows) - 1:
            return self._last_read
        line, where = self._rows[place]
        if self._data is None:
            return where
        row = read_line(line, self._data[slice(*where)])
        if row is None or row.error is not None:
            raise BadRow("the file changed while it was read")
        return row.record

    def _refuse(self, place: int, reason: str) -> None:
        self._refused.append(Rejected(self.file, self._rows[place][0], None, reason, self._record(place)))


def _placed_rows(data: Any) -> Iterator[tuple[Row, tuple[int, int]]]:
    """The rows of a file of JSON lines, each with its first and last byte."""
    start = 0
    for line, raw in enumerate(iter(data.readline, b""), 1):
        end = start + len(raw)
        if (row := read_line(line, raw)) is not None:
            yield row, (start, end)
        start = end


def _critique_key(record: Any) -> str | tuple[int, int]:
    if not isinstance(record, dict):
        raise BadRow(f"a row must be an object, got {_kind(record)}")
    id_ = _identifier(record, "response_id")
    if id_ is not None:
        return id_
    prompt_index, response_index = record.get("prompt_index"), record.get("response_index")
    if prompt_index is None or response_index is None:
        raise BadRow("missing key: response_id, or prompt_index and response_index")
    for value in (prompt_index, response_index):
        if type(value) is not int:
            raise BadRow(f"prompt_index and response_index must be integers, got {_kind(value)}")
    return prompt_index, response_index


def critiques_of(record: dict, num_steps: int, num_votes: int | None) -> Heard:
    """The critiques of a row.

    Args:
        record: the row.
        num_steps: of its response.
        num_votes: at most this many critiques; None: any number.

    Raises:
        BadRow: a critique of no known form, a flagged step that is not there, too many critiques.
    """
    items = record["critiques"]
    if num_votes is not None and len(items) > num_votes:
        raise BadRow(f"{len(items)} critiques, but there are to be {num_votes} votes")
    nonce = record.get("nonce")
    if _native is not None and (plain := _native.plain_critiques(items, nonce, num_steps)) is not None:
        return Heard(*plain)
    heard = Heard([], [])
    for position, item in enumerate(items):
        try:
            said, about = _critique(item, nonce, num_steps)
        except ValueError as error:
            raise BadRow(f"critique {position}: {error}") from error
        heard.said.append(said)
        heard.about.append(about)
    return heard


def _critique(item: Any, nonce: Any, num_steps: int) -> tuple[str | list[int] | None, str | None]:
    """What one critique says, and about it; see `Heard`."""
    if isinstance(item, dict) and "text" in item:
        text, nonce = item["text"], item.get("nonce", nonce)
    elif isinstance(item, dict):
        return _flagged(item, num_steps)
    else:
        text = item
    if text is None:
        return None, None
    if not isinstance(text, str):
        what = "text must be a string" if text is not item else "must be text, an object or null"
        raise BadRow(f"{what}, got {_kind(text)}")
    if nonce is not None:
        if not isinstance(nonce, str):
            raise BadRow(f"nonce must be a string, got {_kind(nonce)}")
        check_nonce(nonce)
    return text, nonce


def _flagged(item: dict, num_steps: int) -> tuple[list[int] | None, str | None]:
    """What a critique that was read before says."""
    valid = item.get("valid", True)
    if not isinstance(valid, bool):
        raise BadRow(f"valid must be true or false, got {_kind(valid)}")
    if not valid:
        return None, str(item.get("error") or "marked_invalid")
    flagged = item.get("flagged")
    if not isinstance(flagged, list):
        raise BadRow(f"needs text or a list of flagged steps, got flagged = {_kind(flagged)}")
    for index in flagged:
        if type(index) is not int:
            raise BadRow(f"flagged must hold integers, got {_kind(index)}")
        if not 0 <= index < num_steps:
            raise BadRow(f"step {index} is flagged, but the response has {num_steps} steps, counted from 0")
    return flagged, None
