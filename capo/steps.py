"""Steps of packed responses: the type, and how steps are found in token ids."""

from __future__ import annotations

import base64
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    from capo import _native
except ImportError:  # built without the native module
    _native = None

_BLANK = frozenset(b" \t\n\v\f\r")


@dataclass(frozen=True, eq=False)
class Steps:
    """Half-open token ranges of the steps of B packed responses.

    The steps of response ``i`` are ``cu_steps[i]:cu_steps[i + 1]``; within a response they are in order and do not
    overlap. A token in no range belongs to no step (weight 0).

    Args:
        starts: [M] integer, first token of each step, in packed coordinates.
        ends: [M] integer, one past the last token of each step.
        cu_steps: [B + 1] integer, cumulative number of steps per response.
    """

    starts: Tensor
    ends: Tensor
    cu_steps: Tensor

    def __post_init__(self) -> None:
        for name in ("starts", "ends", "cu_steps"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"Steps: {name} must be a 1-D int32 or int64 tensor, got {_describe(value)}")
            object.__setattr__(self, name, value.to(torch.int64).contiguous())
        if self.starts.shape != self.ends.shape:
            raise ValueError(
                f"Steps: starts {list(self.starts.shape)} and ends {list(self.ends.shape)} differ in length"
            )
        if self.cu_steps.numel() == 0:
            raise ValueError("Steps: cu_steps is empty; for B responses it has B + 1 entries, the first of them 0")

    def to(self, device: torch.device | str) -> Steps:
        """The same steps on another device."""
        return Steps(self.starts.to(device), self.ends.to(device), self.cu_steps.to(device))


class TokenBytes:
    """The byte string of every token id of a vocabulary.

    Equivalent to the list ``tokens``, with ``b""`` in place of special tokens: those contribute no text and belong to
    no step. Kept as ``data`` (uint8, all strings end to end), ``offsets`` (int64 [V + 1], into data), ``special`` and
    ``eos`` (bool [V]). Do not change these tensors.

    Args:
        tokens: V byte strings; the position is the token id. A token without bytes that is not special is text all the
            same: it stays with the token before it.
        special_ids: control tokens (begin of text, padding, role markers, ...).
        eos_ids: tokens that end a response; special, too.
        num_tokens: pads V to the model's vocabulary (its logits can be wider than the tokenizer) with special tokens.

    Raises:
        ValueError: a token that is not bytes, an id outside the vocabulary, ``num_tokens`` smaller than it.
    """

    def __init__(
        self,
        tokens: Iterable[bytes],
        *,
        special_ids: Iterable[int] = (),
        eos_ids: int | Iterable[int] = (),
        num_tokens: int | None = None,
    ) -> None:
        pieces = list(tokens)
        for id_, piece in enumerate(pieces):
            if not isinstance(piece, bytes):
                raise _wrong(f"TokenBytes: token {id_}", "bytes", piece)
        known = len(pieces)
        size = known if num_tokens is None else num_tokens
        if size < known:
            raise ValueError(f"TokenBytes: num_tokens is {num_tokens}, but there are {known} tokens")
        pieces += [b""] * (size - known)
        self.eos = _flags_of(eos_ids, "eos_ids", size)
        self.special = _flags_of(special_ids, "special_ids", size) | self.eos
        self.special[known:] = True
        self._is_special = self.special.tolist()
        self._pieces = [b"" if special else piece for piece, special in zip(pieces, self._is_special, strict=True)]
        self.data = torch.from_numpy(np.frombuffer(b"".join(self._pieces), np.uint8).copy())
        lengths = np.fromiter(map(len, self._pieces), np.int64, size)
        self.offsets = torch.from_numpy(np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Any, *, eos_ids: int | Iterable[int] | None = None, num_tokens: int | None = None
    ) -> TokenBytes:
        """The bytes of a Hugging Face fast tokenizer, read from its decoder and checked against its ``decode``.

        Byte-level BPE and sentencepiece-style vocabularies (with or without byte fallback) are understood. A token's
        bytes do not depend on its place: the leading space that sentencepiece decoders strip from a text is kept, since
        a response continues a prompt. Added tokens that are not special (``<think>`` in many models) are text.

        Args:
            tokenizer: a fast tokenizer of transformers, or a ``tokenizers.Tokenizer``.
            eos_ids: tokens that end a response; by default the tokenizer's ``eos_token_id``. Chat models often have
                more than one: pass ``model.generation_config.eos_token_id``.
            num_tokens: as for :class:`TokenBytes`; pass the width of the model's logits.

        Raises:
            ValueError: a slow or custom tokenizer, a decoder that does not map each token to bytes of its own, or bytes
                that do not give back what the tokenizer decodes.
        """
        name = type(tokenizer).__name__
        backend = getattr(tokenizer, "backend_tokenizer", None) or tokenizer
        if not hasattr(backend, "to_str"):
            raise ValueError(
                f"TokenBytes: {name} has no byte mapping: it is not a fast tokenizer. Load it with "
                "AutoTokenizer (the model then needs a tokenizer.json), or give the byte string of every id: "
                "TokenBytes(tokens, special_ids=..., eos_ids=...)"
            )
        decoder = _Decoder(json.loads(backend.to_str())["decoder"], name)
        added = backend.get_added_tokens_decoder()
        by_id = {id_: token for token, id_ in backend.get_vocab(with_added_tokens=True).items()}
        special_ids = {id_ for id_, token in added.items() if token.special}
        special_ids.update(getattr(tokenizer, "all_special_ids", ()))
        size = max(by_id, default=-1) + 1
        special_ids.update(id_ for id_ in range(size) if id_ not in by_id)
        tokens = [
            decoder.added_token(by_id[id_]) if id_ in added else decoder.token(by_id[id_]) if id_ in by_id else b""
            for id_ in range(size)
        ]
        if eos_ids is None:
            eos_ids = getattr(tokenizer, "eos_token_id", None)
            eos_ids = () if eos_ids is None else eos_ids
        table = cls(tokens, special_ids=special_ids, eos_ids=eos_ids, num_tokens=num_tokens)
        _check_against_decode(table, backend, decoder.strips_first_space, name)
        return table

    @classmethod
    def from_tiktoken_file(
        cls,
        path: str | PathLike[str],
        *,
        special_tokens: Mapping[str, int] | Iterable[str] = (),
        eos_tokens: Iterable[str] = (),
        num_tokens: int | None = None,
    ) -> TokenBytes:
        """The bytes of a tiktoken file (Qwen's ``qwen.tiktoken``, Llama 3's ``tokenizer.model``).

        Args:
            path: the file; a line is the token's bytes in base64, a space, the token id.
            special_tokens: names and ids of the special tokens; names alone are numbered on from the file's last id.
            eos_tokens: the names of those that end a response.
            num_tokens: as for :class:`TokenBytes`.

        Raises:
            ValueError: a line of another form (named with its number), an id twice, an unknown name in ``eos_tokens``.
        """
        by_id: dict[int, bytes] = {}
        for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
            if not line:
                continue
            try:
                token, rank = line.split()
                piece, id_ = base64.b64decode(token, validate=True), int(rank)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: expected a base64 token and its id, got {line[:80]!r}") from error
            if id_ < 0 or id_ in by_id:
                raise ValueError(f"{path}:{number}: token id {id_} is negative or was there before")
            by_id[id_] = piece
        if not isinstance(special_tokens, Mapping):
            special_tokens = {name: id_ for id_, name in enumerate(special_tokens, max(by_id, default=-1) + 1)}
        eos_tokens = list(eos_tokens)
        for name in eos_tokens:
            if name not in special_tokens:
                raise ValueError(f"TokenBytes: eos_tokens has {name!r}, which is not among the special_tokens")
        size = max([*by_id, *special_tokens.values()], default=-1) + 1
        return cls(
            [by_id.get(id_, b"") for id_ in range(size)],
            special_ids=[*special_tokens.values(), *(id_ for id_ in range(size) if id_ not in by_id)],
            eos_ids=[special_tokens[name] for name in eos_tokens],
            num_tokens=num_tokens,
        )

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, token_id: int) -> bytes:
        return self._pieces[token_id]

    def __repr__(self) -> str:
        return f"TokenBytes({len(self)} tokens, {int(self.special.sum())} special, {int(self.eos.sum())} eos)"

    def join(self, token_ids: Iterable[int]) -> bytes:
        """The bytes of a sequence of token ids, end to end."""
        return b"".join(map(self._pieces.__getitem__, token_ids))

    @cached_property
    def _native_flags(self) -> Tensor:
        flags = torch.empty(len(self), dtype=torch.uint8)
        _native.token_flags(
            self.data.data_ptr(),
            self.offsets.data_ptr(),
            len(self),
            self.special.data_ptr(),
            self.eos.data_ptr(),
            flags.data_ptr(),
        )
        return flags


@dataclass(frozen=True)
class OutsideFences:
    r"""A delimiter for :func:`segment` that does not cut what belongs together: fenced code and LaTeX environments.

    A delimiter that begins between a line of three or more backticks or tildes and the line that closes it (Markdown's
    fenced code), or between ``\begin{name}`` and its ``\end{name}``, is none. What is never closed is no fence, and after a
    fence that is never closed there are no others. Found in Python, in linear time: slower than a plain delimiter.

    Args:
        delimiter: text, bytes or a compiled pattern, as `segment` takes it.
    """

    delimiter: str | bytes | re.Pattern[str] | re.Pattern[bytes] = "\n\n"


def segment(
    token_ids: Tensor,
    cu_seqlens: Tensor,
    token_bytes: TokenBytes,
    delimiter: str | bytes | re.Pattern[str] | re.Pattern[bytes] | OutsideFences = "\n\n",
    *,
    max_steps: int | None = None,
    num_threads: int | None = None,
) -> Steps:
    r"""The steps of packed responses: where a delimiter follows text and more text follows it, a step begins.

    Delimiters are looked for in the bytes of the tokens; nothing is encoded again. The rule is VinePPO's:

    * A delimiter's bytes belong to the step that follows, and a token belongs to the step of its first byte. So
      ``.\n\n`` as one token ends a step, ``\n\n`` as one token begins the next.
    * No step is blank. Delimiters before the first text and white space between delimiters go to the step that follows;
      delimiters and white space at the end go to the last step. White space is ASCII (space, tab, \n, \v, \f, \r);
      no-break spaces, U+2028 and other such characters are text. What counts is the text of a step's own tokens: a step
      that lies entirely inside a token of the step before it does not exist.
    * A response that is empty, or only white space, delimiters and special tokens, has no step.
    * Special tokens belong to no step. As a step is one range, one within a response ends the step, and the text after
      it begins another; delimiters do not reach over it. White space alone between special tokens is in no step.
    * Exception: an EOS directly after the last step joins it, if only special tokens follow. A second EOS does not (it
      is padding).
    * No step begins inside a UTF-8 character: a token that begins with a continuation byte of a character begun before
      goes with the token before it. Bytes that are no valid UTF-8 are otherwise like any other text.

    Each response's steps are a function of its own tokens. Linear time; results do not depend on the thread count.

    Args:
        token_ids: [N] int32 or int64, as sampled.
        cu_seqlens: [B + 1] int32 or int64; response i is ``token_ids[cu_seqlens[i]:cu_seqlens[i + 1]]``.
        token_bytes: the bytes of every token id.
        delimiter: text or bytes, found from left to right without overlap. If it is line ends only (``"\n\n"``,
            ``"\n"``), lines may also end with ``\r\n``; a blank line with spaces in it is not ``"\n\n"``. Or a
            compiled pattern: of str, it is matched on the text (UTF-8; other bytes as surrogate escapes), of bytes, on
            the bytes, in either case between special tokens; a match of no length (a lookahead) is a place where a step
            may begin. Or either of them as `OutsideFences`.
        max_steps: at most this many steps per response. The last takes in the text up to the next special token, text
            after that belongs to no step.
        num_threads: CPU threads; by default PyTorch's number.

    Returns:
        The steps, on the device of token_ids. Tensors on a GPU are copied to the CPU and back.

    Raises:
        ValueError: an argument of the wrong type, shape or range, or a token id unknown to token_bytes; the message
            names it with its position.
    """
    ids = _ids_on_cpu(token_ids, token_bytes)
    cu = _bounds_on_cpu(cu_seqlens, ids.numel())
    find = _Delimiter(delimiter)
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"segment: max_steps must be at least 1, got {max_steps}")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"segment: num_threads must be at least 1, got {num_threads}")
    if _native is None:
        steps = _segment_reference(ids, cu, token_bytes, find, max_steps)
    else:
        steps = _segment_native(ids, cu, token_bytes, find, max_steps, num_threads or torch.get_num_threads())
    return steps.to(token_ids.device)


def step_texts(token_ids: Tensor, steps: Steps, token_bytes: TokenBytes) -> list[list[str]]:
    """The text of each step of each response, as a judge reads it.

    Equivalent to decoding ``token_ids[start:end]`` for every step: leading delimiters are part of it, special tokens
    are not, and bytes that are no valid UTF-8 become U+FFFD.

    Args:
        token_ids: [N] int32 or int64, the ids that ``steps`` were found in.
        steps: M steps of B responses.
        token_bytes: the bytes of every token id.

    Raises:
        ValueError: ``token_ids`` or an id in it does not fit, or a step ends beyond N.
    """
    ids = _ids_on_cpu(token_ids, token_bytes)
    _check_ids(ids, token_bytes)
    ends = steps.ends.tolist()
    if any(end > ids.numel() for end in ends):
        raise ValueError(f"step_texts: steps end at token {max(ends)}, but token_ids has {ids.numel()}")
    tokens = ids.tolist()
    texts = [
        token_bytes.join(tokens[start:end]).decode("utf-8", "replace")
        for start, end in zip(steps.starts.tolist(), ends, strict=True)
    ]
    cu_steps = steps.cu_steps.tolist()
    return [texts[first:last] for first, last in pairwise(cu_steps)]


def truncated(token_ids: Tensor, cu_seqlens: Tensor, token_bytes: TokenBytes) -> Tensor:
    """Whether each response was cut off: it has no EOS, so that its last step is incomplete.

    Args:
        token_ids: [N] int32 or int64.
        cu_seqlens: [B + 1] int32 or int64.
        token_bytes: the bytes of every token id.

    Returns:
        bool [B], on the device of token_ids.

    Raises:
        ValueError: as for :func:`segment`, or ``token_bytes`` has no EOS.
    """
    ids = _ids_on_cpu(token_ids, token_bytes)
    cu = _bounds_on_cpu(cu_seqlens, ids.numel())
    _check_ids(ids, token_bytes)
    if not token_bytes.eos.any():
        raise ValueError("truncated: token_bytes has no eos_ids, so that no response can be seen to end")
    num_eos = torch.cat([torch.zeros(1, dtype=torch.int64), token_bytes.eos[ids.long()].cumsum(0)])[cu]
    return (num_eos[1:] == num_eos[:-1]).to(token_ids.device)


def _segment_native(
    ids: Tensor, cu: Tensor, token_bytes: TokenBytes, delimiter: _Delimiter, max_steps: int | None, num_threads: int
) -> Steps:
    spans = [np.empty(0, np.int64)] * 3 if delimiter.newlines else _spans(ids, cu, token_bytes, delimiter)
    # NumPy, not PyTorch, makes and copies arrays here: a pool of threads that wakes up costs more than the work.
    room = [np.empty(ids.numel(), np.int64) for _ in range(2)]
    cu_steps = np.empty(cu.numel(), np.int64)
    num_steps = _native.segment(
        ids=ids.data_ptr(),
        ids_are_int64=ids.dtype == torch.int64,
        cu_seqlens=cu.data_ptr(),
        num_responses=cu.numel() - 1,
        data=token_bytes.data.data_ptr(),
        offsets=token_bytes.offsets.data_ptr(),
        flags=token_bytes._native_flags.data_ptr(),
        size=len(token_bytes),
        newlines=delimiter.newlines,
        span_starts=spans[0].ctypes.data,
        span_ends=spans[1].ctypes.data,
        cu_spans=spans[2].ctypes.data,
        max_steps=2**63 - 1 if max_steps is None else max_steps,
        starts=room[0].ctypes.data,
        ends=room[1].ctypes.data,
        cu_steps=cu_steps.ctypes.data,
        num_threads=num_threads,
    )
    if num_steps < 0:
        raise _unknown_id(ids, -1 - num_steps, token_bytes)
    starts, ends = (torch.from_numpy(values[:num_steps].copy()) for values in room)
    return Steps(starts, ends, torch.from_numpy(cu_steps))


def _spans(ids: Tensor, cu: Tensor, token_bytes: TokenBytes, delimiter: _Delimiter) -> list[np.ndarray]:
    """Delimiters as byte positions within each response's text: starts [S], ends [S], cumulative counts [B + 1]."""
    _check_ids(ids, token_bytes)
    tokens, bounds = ids.tolist(), cu.tolist()
    spans: list[tuple[int, int]] = []
    cu_spans = [0]
    for first, last in pairwise(bounds):
        position = 0
        for begin, end in _sections(tokens, first, last, token_bytes):
            text = token_bytes.join(tokens[begin:end])
            spans += [(position + start, position + stop) for start, stop in delimiter.find(text)]
            position += len(text)
        cu_spans.append(len(spans))
    starts, ends = np.array(spans, np.int64).reshape(-1, 2).T.copy()
    return [starts, ends, np.array(cu_spans, np.int64)]


def _segment_reference(
    ids: Tensor,
    cu: Tensor,
    token_bytes: TokenBytes,
    delimiter: _Delimiter,
    max_steps: int | None = None,
) -> Steps:
    """The rule of :func:`segment`, to be read as its definition; also what runs where there is no native module."""
    _check_ids(ids, token_bytes)
    tokens, bounds = ids.tolist(), cu.tolist()
    starts: list[int] = []
    ends: list[int] = []
    cu_steps = [0]
    for first, last in pairwise(bounds):
        room = last - first if max_steps is None else max_steps
        eos_place = None
        for begin, end in _sections(tokens, first, last, token_bytes):
            section_starts = [begin + t for t in _step_starts(tokens[begin:end], token_bytes, delimiter)][:room]
            room -= len(section_starts)
            starts += section_starts
            ends += [*section_starts[1:], end] if section_starts else []
            eos_place = end if section_starts else None
        if eos_place is not None and eos_place < last and token_bytes.eos[tokens[eos_place]]:
            ends[-1] += 1
        cu_steps.append(len(starts))
    return Steps(*(torch.tensor(values, dtype=torch.int64) for values in (starts, ends, cu_steps)))


def _sections(tokens: list[int], first: int, last: int, token_bytes: TokenBytes) -> Iterator[tuple[int, int]]:
    """The longest ranges of ``tokens[first:last]`` without a special token."""
    is_special = token_bytes._is_special
    for special, run in groupby(range(first, last), key=lambda t: is_special[tokens[t]]):
        if not special:
            section = list(run)
            yield section[0], section[-1] + 1


def _step_starts(tokens: list[int], token_bytes: TokenBytes, delimiter: _Delimiter) -> list[int]:
    """The tokens that begin a step, in a sequence without special tokens."""
    pieces = [token_bytes[id_] for id_ in tokens]
    text = b"".join(pieces)
    offsets = [0, *accumulate(map(len, pieces))]  # of each token's first byte in text
    may_begin = [t for t, piece in enumerate(pieces) if piece and not _inside_character(text, offsets[t])]
    delimiters = list(delimiter.find(text))

    is_content = [byte not in _BLANK for byte in text]
    for start, end in delimiters:
        is_content[start:end] = [False] * (end - start)
    num_content = [0, *accumulate(is_content)]  # before each byte of text
    if num_content[-1] == 0:
        return []

    step_starts = [0]
    step_begin = 0  # the byte where the current step's own tokens begin
    for position, _ in delimiters:
        index = bisect_left(may_begin, position, key=lambda t: offsets[t])
        if index == len(may_begin):
            break
        token = may_begin[index]
        has_content_before = position > step_begin and num_content[position] > num_content[step_begin]
        has_content_after = num_content[-1] > num_content[offsets[token]]
        if has_content_before and has_content_after:
            step_starts.append(token)
            step_begin = offsets[token]
    return step_starts


def _inside_character(text: bytes, position: int) -> bool:
    """Whether the byte at ``position`` continues a UTF-8 character that begins before it."""
    if not 0x80 <= text[position] <= 0xBF:
        return False
    for back in range(1, min(position, 3) + 1):
        byte = text[position - back]
        if not 0x80 <= byte <= 0xBF:
            length = 2 if 0xC2 <= byte <= 0xDF else 3 if 0xE0 <= byte <= 0xEF else 4 if 0xF0 <= byte <= 0xF4 else 1
            return length > back
    return False


class _Delimiter:
    """A delimiter as a pattern; ``newlines`` is the number of line ends if it consists of nothing else, or 0."""

    def __init__(self, delimiter: str | bytes | re.Pattern[str] | re.Pattern[bytes] | OutsideFences) -> None:
        self.newlines = 0
        self._pattern: re.Pattern[Any]
        self._fences = isinstance(delimiter, OutsideFences)
        if isinstance(delimiter, OutsideFences):
            delimiter = delimiter.delimiter
        if isinstance(delimiter, re.Pattern):
            self._pattern = delimiter
            return
        if not isinstance(delimiter, str | bytes) or not delimiter:
            raise ValueError(
                f"segment: delimiter must be text, bytes or a compiled pattern, not empty; got {delimiter!r}"
            )
        literal = delimiter.encode() if isinstance(delimiter, str) else delimiter
        lines = literal.replace(b"\r\n", b"\n")
        if lines.strip(b"\n"):
            self._pattern = re.compile(re.escape(literal))
        else:
            self.newlines = 0 if self._fences else len(lines)
            self._pattern = re.compile(rb"(?:\r?\n){%d}" % len(lines))

    def find(self, text: bytes) -> Iterator[tuple[int, int]]:
        """The delimiters of a text as byte ranges, in order."""
        if not self._fences:
            yield from self._matches(text)
            return
        ends = _fence_ends(text)
        place = reach = 0  # fences that begin before the delimiter, and how far they reach
        for start, end in self._matches(text):
            while place < len(ends) and ends[place][0] < start:
                reach = max(reach, ends[place][1])
                place += 1
            if start >= reach:
                yield start, end

    def _matches(self, text: bytes) -> Iterator[tuple[int, int]]:
        if isinstance(self._pattern.pattern, bytes):
            yield from (match.span() for match in self._pattern.finditer(text))
            return
        decoded = text.decode("utf-8", "surrogateescape")
        chars = position = 0  # the same place, in characters and in bytes
        for match in self._pattern.finditer(decoded):
            start = position + _num_bytes(decoded[chars : match.start()])
            position = start + _num_bytes(match.group())
            chars = match.end()
            yield start, position


_CODE_FENCE = re.compile(rb"^ {0,3}(?P<marks>`{3,}|~{3,})(?P<rest>[^\r\n]*)", re.MULTILINE)
_ENVIRONMENT = re.compile(rb"\\(?P<which>begin|end)\{(?P<name>[A-Za-z]{1,40}\*?)\}")


def _fence_ends(text: bytes) -> list[tuple[int, int]]:
    """Fenced code blocks and LaTeX environments that are closed, as byte ranges by their first byte; some hold others."""
    found = []
    opened: re.Match[bytes] | None = None
    for line in _CODE_FENCE.finditer(text):
        if opened is None:
            opened = None if line["marks"].startswith(b"`") and b"`" in line["rest"] else line
        elif line["marks"].startswith(opened["marks"]) and not line["rest"].strip():
            found.append((opened.start(), line.end()))
            opened = None
    environments: list[re.Match[bytes]] = []
    for mark in _ENVIRONMENT.finditer(text):
        if mark["which"] == b"begin":
            environments.append(mark)
        elif environments and environments[-1]["name"] == mark["name"]:
            found.append((environments.pop().start(), mark.end()))
    return sorted(found)


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def _ids_on_cpu(token_ids: Tensor, token_bytes: TokenBytes) -> Tensor:
    _check_integers("token_ids", token_ids)
    if not isinstance(token_bytes, TokenBytes):
        raise _wrong("token_bytes", "a capo.TokenBytes", token_bytes)
    return token_ids.detach().cpu().contiguous()


def _bounds_on_cpu(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    _check_integers("cu_seqlens", cu_seqlens)
    cu = cu_seqlens.detach().cpu().to(torch.int64).contiguous()
    if cu.numel() == 0 or cu[0] != 0 or cu[-1] != num_tokens:
        shown = f"{cu[0]} .. {cu[-1]}" if cu.numel() else "empty"
        raise ValueError(f"cu_seqlens must begin with 0 and end with len(token_ids) = {num_tokens}, got {shown}")
    falls = np.flatnonzero(np.diff(cu.numpy()) < 0)
    if falls.size:
        i = int(falls[0])
        raise ValueError(f"cu_seqlens must not fall, but entry {i} is {cu[i]} and entry {i + 1} is {cu[i + 1]}")
    return cu


def _check_integers(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype not in (torch.int32, torch.int64):
        raise _wrong(name, "a 1-D int32 or int64 tensor", value)


def _check_ids(ids: Tensor, token_bytes: TokenBytes) -> None:
    unknown = ((ids < 0) | (ids >= len(token_bytes))).nonzero()
    if unknown.numel():
        raise _unknown_id(ids, int(unknown[0]), token_bytes)


def _wrong(name: str, expected: str, value: object) -> ValueError:
    return ValueError(f"{name} must be {expected}, got {_describe(value)}")


def _unknown_id(ids: Tensor, position: int, token_bytes: TokenBytes) -> ValueError:
    return ValueError(
        f"token_ids[{position}] is {int(ids[position])}, but token_bytes knows ids 0 to {len(token_bytes) - 1}; if the "
        "model's vocabulary is padded beyond the tokenizer's, make TokenBytes with num_tokens="
    )


def _flags_of(ids: int | Iterable[int], name: str, size: int) -> Tensor:
    flags = torch.zeros(size, dtype=torch.bool)
    for id_ in (ids,) if isinstance(ids, int) else ids:
        if not isinstance(id_, int) or not 0 <= id_ < size:
            raise ValueError(f"TokenBytes: {name} has {id_!r}, but the ids are 0 to {size - 1}")
        flags[id_] = True
    return flags


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies: the byte's own if it prints, else U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


class _Decoder:
    """What a Hugging Face decoder (its JSON form) makes of one token."""

    def __init__(self, spec: dict[str, Any] | None, name: str) -> None:
        self._steps = _flat_decoder(spec)
        self._alphabet = _byte_alphabet()
        self.strips_first_space = False
        kinds = [step["type"] for step in self._steps]
        self._byte_level = "ByteLevel" in kinds
        for index, step in enumerate(self._steps):
            match step:
                case {"type": "ByteLevel" | "ByteFallback" | "Fuse"} | {"type": "Replace", "pattern": {"String": _}}:
                    pass
                case {"type": "Metaspace"}:
                    self.strips_first_space |= step.get("prepend_scheme", "always") != "never"
                case {"type": "Strip", "content": " ", "stop": 0} if "Fuse" in kinds[:index]:
                    self.strips_first_space = True
                case _:
                    raise ValueError(self._advice(name, json.dumps(step)))
        if not {"ByteLevel", "Metaspace", "Replace", "ByteFallback"} & set(kinds):
            raise ValueError(self._advice(name, json.dumps(spec)))

    @staticmethod
    def _advice(name: str, step: str) -> str:
        return (
            f"TokenBytes: {name} has no byte mapping: its decoder {step} does not give each token bytes of its own "
            "(byte-level and sentencepiece-style decoders do). Give the byte string of every id: "
            "TokenBytes(tokens, special_ids=..., eos_ids=...)"
        )

    def token(self, token: str) -> bytes:
        for step in self._steps:
            match step["type"]:
                case "ByteLevel":
                    if all(char in self._alphabet for char in token):
                        return bytes(map(self._alphabet.__getitem__, token))
                case "ByteFallback":
                    if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token):
                        return bytes.fromhex(byte[1])
                case "Replace":
                    token = token.replace(step["pattern"]["String"], step["content"])
                case "Metaspace":
                    token = token.replace(step["replacement"], " ")
        return token.encode()

    def added_token(self, token: str) -> bytes:
        # Added tokens of byte-level vocabularies are written as they are, not in the byte alphabet.
        return token.encode() if self._byte_level else self.token(token)


def _flat_decoder(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    if spec is None:
        return []
    if spec["type"] == "Sequence":
        return [step for inner in spec["decoders"] for step in _flat_decoder(inner)]
    return [spec]


# Where byte mappings go wrong: white space, line ends, characters of two to four bytes, characters joined of several.
_PROBES = (
    "Step 1: 2 + 3 = 5.\n\nSo x^2 >= 0, don't you think?",
    " leading  and   inner spaces\t\r\n\r\n\n\n",
    "na\u00efve caf\u00e9 \u2014 \u03c0 \u2248 3.14",
    "\u7b54\u6848\u662f\u4e03\u3002\n\n\u6240\u4ee5",
    "\U0001f642 \U0001f469\u200d\U0001f52c",
)


def _check_against_decode(table: TokenBytes, backend: Any, strips_first_space: bool, name: str) -> None:
    for probe in _PROBES:
        # eos_ids may name tokens that are text to the tokenizer.
        ids = [id_ for id_ in backend.encode(probe, add_special_tokens=False).ids if not table._is_special[id_]]
        expected = backend.decode(ids, skip_special_tokens=True)
        actual = table.join(ids).decode("utf-8", "replace")
        if strips_first_space and actual != expected:
            actual = actual.removeprefix(" ")
        if actual != expected:
            at = next((i for i, (a, b) in enumerate(zip(actual, expected, strict=False)) if a != b), None)
            at = min(len(actual), len(expected)) if at is None else at
            raise ValueError(
                f"TokenBytes: the bytes of {name}'s tokens are not what it decodes: for {probe!r} the bytes give "
                f"{actual!r}, decode gives {expected!r}; they differ from character {at} on. Give every id's bytes: "
                "TokenBytes(tokens, special_ids=..., eos_ids=...)"
            )


def _describe(value: object) -> str:
    return (
        f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r:.80}"
    )
