"""Replies on disk, so that a run that is repeated or resumed does not ask again.

One file an entry, written beside its place and moved there: a reader sees all of it or nothing, whoever else writes. An
entry holds its own key and a hash of its contents; what does not match is a miss, is counted and is written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections import Counter
from pathlib import Path
from typing import Any

FORMAT = 1
MAX_ENTRY = 64 << 20  # bytes


class ReplyCache:
    """A folder of replies, for any number of processes.

    Files can be read by their owner alone. There is no limit on their number; deleting any of them, or the folder, is
    always safe.

    Args:
        folder: is made if it is not there.
        counts: ``cache/hits``, ``cache/misses``, ``cache/broken`` (also misses) and ``cache/unwritable`` are counted here.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, counts: Counter[str] | None = None) -> None:
        self.folder = Path(folder)
        self.counts: Counter[str] = Counter() if counts is None else counts
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def get(self, key: dict[str, Any]) -> Any | None:
        """What was put under the key, or None.

        Args:
            key: all that the value depends on, as JSON.
        """
        digest = _digest(key)
        value = None
        try:
            with self._path(digest).open("rb") as file:
                raw = file.read(MAX_ENTRY + 1)
            value = _read(raw, digest)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RecursionError):
            self.counts["cache/broken"] += 1
        self.counts["cache/misses" if value is None else "cache/hits"] += 1
        return value

    def put(self, key: dict[str, Any], value: Any) -> None:
        """Keep a value, which is JSON and not None. A disk that is full or read-only is counted and costs no more."""
        digest = _digest(key)
        content = _json({"format": FORMAT, "key": digest, "value": value})
        path = self._path(digest)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
            os.replace(temporary, path)
        except OSError:
            self.counts["cache/unwritable"] += 1
            temporary.unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.json"


def _read(raw: bytes, digest: str) -> Any:
    checksum, _, content = raw.partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != checksum:
        raise ValueError("truncated or damaged")
    entry = json.loads(content)
    if entry["format"] != FORMAT or entry["key"] != digest:
        raise ValueError("of another key or format")
    return entry["value"]


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(_json(key)).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False).encode()
