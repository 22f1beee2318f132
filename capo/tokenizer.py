"""A tokenizer from wherever it lies: the bytes of every token id, and the way from text to ids if there is one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from capo.steps import TokenBytes

_TIKTOKEN_SUFFIXES = (".tiktoken", ".model")


@dataclass(frozen=True)
class Tokenizer:
    """The bytes of every token id, and an encoder for responses that come as text.

    Args:
        token_bytes: the byte table; its length is the vocabulary.
        encode: token ids of each of a list of texts in turn, without special tokens around them.
        why_not: why text cannot be encoded; None if it can.
    """

    token_bytes: TokenBytes
    encode: Callable[[list[str]], Iterable[list[int]]]
    why_not: str | None = None


def load_tokenizer(
    source: Any,
    *,
    num_tokens: int | None = None,
    eos_ids: Sequence[int] | None = None,
    tiktoken_pattern: str | None = None,
) -> Tokenizer:
    r"""The tokenizer behind a path, a name or an object.

    Args:
        source: a folder with ``tokenizer.json``, such a file, a tiktoken file (``.tiktoken``, ``.model``), a name that
            ``transformers.AutoTokenizer`` knows, a fast tokenizer, a `capo.TokenBytes` or a `Tokenizer`.
        num_tokens: width of the model's logits, where that is more than the tokenizer knows; the ids above are special
            tokens. Tiktoken files need it: they do not list their special tokens.
        eos_ids: tokens that end a response; None takes those that the files beside ``tokenizer.json`` name.
        tiktoken_pattern: the regular expression that splits text before merging; a tiktoken file does not hold it.

    Raises:
        FileNotFoundError: a path to nothing.
        ValueError: a file of another kind, a tokenizer whose tokens have no bytes of their own, an id out of range.
        ImportError: the package that could read this is not installed.
    """
    if isinstance(source, Tokenizer):
        return source
    if isinstance(source, TokenBytes):
        return _without_encoder(source, "a byte table has no encoder; give token_ids or a tokenizer")
    if not isinstance(source, str | PathLike):
        return _hugging_face(source, num_tokens, eos_ids)
    path = Path(source)
    if path.suffix in _TIKTOKEN_SUFFIXES:
        return _tiktoken(path, num_tokens, eos_ids, tiktoken_pattern)
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        return _tokenizer_file(file, num_tokens, eos_ids)
    if path.is_absolute() or path.suffix == ".json" or str(source).startswith("."):
        raise FileNotFoundError(f"no tokenizer at {source}")
    return _hugging_face(_auto_tokenizer(str(source)), num_tokens, eos_ids)


def _tokenizer_file(file: Path, num_tokens: int | None, eos_ids: Sequence[int] | None) -> Tokenizer:
    from tokenizers import Tokenizer as FastTokenizer

    try:
        fast = FastTokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for a file it cannot read
        raise ValueError(f"{file} is no tokenizer.json: {error}") from error
    return _hugging_face(fast, num_tokens, _eos_beside(file, fast) if eos_ids is None else eos_ids)


def _eos_beside(file: Path, fast: Any) -> list[int]:
    """The ids that the configuration files beside a ``tokenizer.json`` call end of sequence."""
    ids: list[int] = []
    named = _json_beside(file, "tokenizer_config.json").get("eos_token")
    if isinstance(named, dict):
        named = named.get("content")
    if isinstance(named, str) and (found := fast.token_to_id(named)) is not None:
        ids.append(found)
    generation = _json_beside(file, "generation_config.json").get("eos_token_id")
    ids += generation if isinstance(generation, list) else [] if generation is None else [generation]
    return list(dict.fromkeys(ids))


def _json_beside(file: Path, name: str) -> dict[str, Any]:
    path = file.with_name(name)
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _auto_tokenizer(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no file or folder; to look it up as a model name, install transformers"
        ) from error
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer {name!r}: it is no file or folder here, nor a model that loads: {error}"
        ) from error


def _hugging_face(tokenizer: Any, num_tokens: int | None, eos_ids: Iterable[int] | None) -> Tokenizer:
    token_bytes = TokenBytes.from_tokenizer(tokenizer, eos_ids=eos_ids, num_tokens=num_tokens)
    backend = getattr(tokenizer, "backend_tokenizer", None) or tokenizer
    if backend.truncation is not None or backend.padding is not None:
        # A saved tokenizer may cut and pad, which no response must suffer; the caller's object stays as it is.
        backend = type(backend).from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()

    def encode(texts: list[str]) -> Iterable[list[int]]:
        # One list at a time, as all of them together leave the caches before they are read. encode_batch_fast executes a
        # fifth less and yet takes longer on two threads (docs/LOG.md).
        return (encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False))

    return Tokenizer(token_bytes, encode)


def _without_encoder(token_bytes: TokenBytes, why_not: str) -> Tokenizer:
    def encode(texts: list[str]) -> Iterable[list[int]]:
        raise ValueError(why_not)

    return Tokenizer(token_bytes, encode, why_not)


def _tiktoken(path: Path, num_tokens: int | None, eos_ids: Sequence[int] | None, pattern: str | None) -> Tokenizer:
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}")
    table = TokenBytes.from_tiktoken_file(path, num_tokens=num_tokens)
    if eos_ids:
        pieces = [table[token] for token in range(len(table))]
        table = TokenBytes(pieces, special_ids=table.special.nonzero()[:, 0].tolist(), eos_ids=eos_ids)
    if pattern is None:
        return _without_encoder(
            table,
            f"{path.name} is a tiktoken file, which does not say how text is split; give token_ids, a tokenizer.json, "
            "or the pattern (--tiktoken-pattern)",
        )
    try:
        import tiktoken
    except ImportError as error:
        raise ImportError(f"to encode text with {path.name}, install tiktoken") from error
    ranks = {table[token]: token for token in range(len(table)) if not table.special[token]}
    encoding = tiktoken.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return Tokenizer(table, encoding.encode_ordinary_batch)
