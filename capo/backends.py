"""Which kernels run.

A backend is a namespace with one function per op, the same names and signatures in each:

    native   capo.native      C++ for CPU tensors; capo.cuda: CUDA C++ for GPU tensors
    triton   capo.kernels     Triton for GPU tensors; for CPU tensors under its interpreter (TRITON_INTERPRET=1), for tests
    torch    capo.reference   plain PyTorch, everywhere

``use_backend("torch")`` chooses inside a block, the environment variable ``CAPO_BACKEND`` for the process; ``auto`` takes
the first that can run and has the op. A backend that was asked for and cannot run is an error that says why, never a silent
fallback.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

BACKENDS = {"native": "capo.native", "triton": "capo.kernels.backend", "torch": "capo.reference"}

_choice: contextvars.ContextVar[str | None] = contextvars.ContextVar("capo_backend", default=None)


@functools.cache
def why_not(backend: str, device_type: str) -> str | None:
    """Why a backend cannot run on a kind of device; None if it can.

    Raises:
        ValueError: CAPO_ISA names an instruction set that this machine lacks. (``auto`` must not step aside for that.)
    """
    if backend == "native":
        try:
            native = importlib.import_module("capo._native")
        except ImportError as error:
            return f"the native module is not there ({error}); reinstall with a C++ compiler"
        native.isa()
        if device_type == "cuda":
            return importlib.import_module("capo.cuda").why_not()
        return None if device_type == "cpu" else f"the native module has no kernels for {device_type}"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device_type == "cuda":
            return "TRITON_INTERPRET=1 would run the kernels on the CPU" if interpreted else None
        if device_type == "cpu":
            return (
                None if interpreted else "Triton kernels run on a GPU; on the CPU only if TRITON_INTERPRET=1, for tests"
            )
        return f"there are no Triton kernels for {device_type}"
    return None


@functools.cache
def available(device_type: str) -> tuple[str, ...]:
    """Names of the backends that run on this kind of device, the preferred one first."""
    names = [name for name in BACKENDS if why_not(name, device_type) is None]
    return tuple(
        sorted(names, key=lambda name: name == "triton" and device_type == "cpu")
    )  # interpreted: for tests only


def _wanted() -> str:
    return _choice.get() or os.environ.get("CAPO_BACKEND", "auto")


def chosen(device_type: str) -> str:
    """Name of the backend that runs on this kind of device under the present choice."""
    choice = _wanted()
    if choice == "auto":
        return available(device_type)[0]
    _check_name(choice)
    reason = why_not(choice, device_type)
    if reason is not None:
        raise RuntimeError(
            f"backend {choice!r} cannot run on {device_type}: {reason}; available: {', '.join(available(device_type))}"
        )
    return choice


def kernel(name: str, device: torch.device) -> Callable:
    """The function ``name`` of the backend that runs on this device; under ``auto`` of the first that has it.

    Raises:
        RuntimeError: the backend asked for cannot run on the device, or has no such function.
    """
    backend = backend_with(name, device)
    if backend is None:
        raise RuntimeError(f"backend {_wanted()!r} has no {name!r} yet; leave the choice to 'auto', or use 'torch'")
    return getattr(backend, name)


def backend_with(name: str, device: torch.device) -> ModuleType | None:
    """The backend that runs on this device, under ``auto`` the first that has the function ``name``; None if it has not."""
    candidates = available(device.type) if _wanted() == "auto" else (chosen(device.type),)
    paths = ("capo.cuda" if (x, device.type) == ("native", "cuda") else BACKENDS[x] for x in candidates)
    return next((backend for backend in map(importlib.import_module, paths) if hasattr(backend, name)), None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops of one backend inside this block.

    Args:
        name: ``native``, ``triton``, ``torch`` or ``auto``.

    Raises:
        ValueError: no backend of that name. (RuntimeError at the first op, if it cannot run on the op's device.)
    """
    if name != "auto":
        _check_name(name)
    token = _choice.set(name)
    try:
        yield
    finally:
        _choice.reset(token)


def checks_values(device_type: str) -> bool:
    """Whether the values of tensors are checked before anything runs: on a GPU that means to wait for it, so only if asked
    for by CAPO_CHECK=1."""
    return device_type == "cpu" or os.environ.get("CAPO_CHECK") == "1"


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"no backend {name!r}; there are auto, {', '.join(BACKENDS)}")
