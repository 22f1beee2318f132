"""A run's folder and its process: who may write there, whether a run fits what is there, and how it is told to stop."""

from __future__ import annotations

import contextlib
import fcntl
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capo import checkpoint
from capo.config import TrainConfig, differing_keys, load_config
from capo.errors import UsageError

# What may change between a run and its continuation without making it another run.
MAY_CHANGE = {"output", "updates", "eval_every", "save_every", "keep_checkpoints", "max_undecided", "warm_start.cache"}


def check(config: TrainConfig, resume: bool) -> None:
    """Refuse a run that its folder does not fit: a new one where one is; to resume none, another or a longer one.

    Raises:
        UsageError: says which, and what to do.
    """
    folder = config.run_dir
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; choose another output")
    saved = checkpoint.saved_updates(folder / "checkpoints")
    if not resume:
        if saved:
            raise UsageError(f"{folder} holds a run already; go on with --resume, or choose another output")
        return
    if not saved:
        raise UsageError(f"{folder} holds no checkpoint to resume from")
    changed = [key for key in differing_keys(load_config(folder / "config.yaml"), config) if key not in MAY_CHANGE]
    if changed:
        raise UsageError(
            f"{folder} was begun with other settings of {', '.join(changed)}; a resumed run keeps them. "
            f"They are in {folder / 'config.yaml'}"
        )
    if config.updates < saved[-1]:
        raise UsageError(
            f"updates={config.updates}, but {folder} has done {saved[-1]} updates; give at least as many to go on"
        )


def make_folder(setting: str, folder: Path) -> None:
    """Make a folder if it is not there, and see that files can be written in it.

    Raises:
        UsageError: they cannot; it names the setting.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{setting}={folder}: cannot write there: {error.strerror}; choose another folder") from None


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run folder; the system gives it back when the process ends, however it ends.

    Raises:
        UsageError: the folder cannot be made or written to.
        BlockingIOError: another process holds it.
    """
    make_folder("output", folder)
    with open(folder / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second interrupts at once. Main thread only, else inert."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
