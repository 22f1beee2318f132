"""Checkpoints: a folder of safetensors and JSON that appears whole or not at all. No pickle is written or read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
_MANIFEST = "checkpoint.json"
_MAX_JSON = 1 << 20  # bytes


class CheckpointError(Exception):
    """A checkpoint that cannot be used, and why."""


def save(folder: Path, model: Any, optimizer: torch.optim.Optimizer | None, state: dict[str, Any]) -> None:
    """Write a checkpoint; the folder is there with all its contents or not at all, also after a crash.

    A checkpoint never changes: one that is there already is left as it is.

    The folder is one of transformers too (``config.json``, ``model.safetensors``), plus the optimiser's moments and a
    manifest with size and hash of every file.

    Args:
        folder: where.
        model: a model of transformers.
        optimizer: AdamW over ``model.parameters()``; None leaves the moments out.
        state: what else to keep, as JSON.

    Raises:
        OSError: the disk is full, not writable, ...; other checkpoints are intact.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        model.config.save_pretrained(temporary)
        weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        if optimizer is not None:
            save_file(_moments(model, optimizer), temporary / "optimizer.safetensors")
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(temporary.iterdir())
        }
        manifest = {"format": FORMAT, "files": files, "state": state}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        os.replace(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # Another process may have been quicker; what it wrote is as good.
        if not (isinstance(error, OSError) and folder.is_dir()):
            raise
    _sync(folder.parent)


def load(folder: Path, model: Any, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Read a checkpoint into a model and an optimiser, and return its state.

    Every file is compared with the manifest first; model and optimiser are changed only if all of it fits.

    Raises:
        CheckpointError: a file is missing, damaged or of another model or version; it is named.
    """
    manifest = _read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{folder}: {name} is damaged: size or hash is not what the manifest says")
    weights = _read_tensors(folder / "model.safetensors")
    parameters = dict(model.named_parameters())
    _check_shapes(folder / "model.safetensors", weights, {name: p.shape for name, p in parameters.items()})
    moments: dict[str, Tensor] = {}
    if optimizer is not None:
        if "optimizer.safetensors" not in manifest["files"]:
            raise CheckpointError(f"{folder}: optimizer.safetensors is missing")
        moments = _read_tensors(folder / "optimizer.safetensors")
        if moments:  # none before the first optimiser step
            shapes = {f"{name}.{key}": p.shape for name, p in parameters.items() for key in ("exp_avg", "exp_avg_sq")}
            shapes |= {f"{name}.step": torch.Size([]) for name in parameters}
            _check_shapes(folder / "optimizer.safetensors", moments, shapes)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    if optimizer is not None:
        optimizer.state.clear()
        for name, parameter in parameters.items() if moments else ():
            optimizer.state[parameter] = {
                "step": moments[f"{name}.step"],
                "exp_avg": moments[f"{name}.exp_avg"].to(parameter.device),
                "exp_avg_sq": moments[f"{name}.exp_avg_sq"].to(parameter.device),
            }
    return manifest["state"]


def checkpoint_path(folder: Path, update: int) -> Path:
    """The folder of the checkpoint after some update."""
    return folder / f"update-{update:08d}"


def saved_updates(folder: Path) -> list[int]:
    """The updates for which there are checkpoints, ascending."""
    if not folder.is_dir():
        return []
    matches = (re.fullmatch(r"update-([0-9]{8})", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the latest checkpoints, and what interrupted saves have left."""
    for update in saved_updates(folder)[:-keep]:
        # Renamed first: an interrupted deletion must not leave half a checkpoint under a valid name.
        doomed = folder / f".update-{update:08d}.old.tmp"
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(checkpoint_path(folder, update), doomed)
    for left in folder.glob(".update-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text, all or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _moments(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path} is too large to be a manifest")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no checkpoint: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise CheckpointError(f"{folder}: checkpoint format {found!r}, this version reads {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not isinstance(manifest.get("state"), dict) or "model.safetensors" not in files:
        raise CheckpointError(f"{path}: files or state are missing")
    for name, expected in files.items():
        plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name)
        if not plain or not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            raise CheckpointError(f"{path}: {name!r:.80} is no file of a checkpoint")
    return manifest


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as safetensors: {error}") from None


def _check_shapes(path: Path, tensors: dict[str, Tensor], shapes: dict[str, torch.Size]) -> None:
    for name in sorted(tensors.keys() ^ shapes.keys()):
        raise CheckpointError(f"{path}: {name} is {'missing' if name in shapes else 'not part of this model'}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise CheckpointError(f"{path}: {name} is {list(tensors[name].shape)}, the model has {list(shape)}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
