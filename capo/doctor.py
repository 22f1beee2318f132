"""What ``capo doctor`` shows."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from rich.console import Console
from rich.table import Table

import capo
from capo import backends
from capo.engines import vllm_version, vllm_why_not
from capo.judges.make import ENGINES

EXTRAS = {
    "score": ("pyarrow", "tokenizers", "orjson"),
    "train": ("transformers", "safetensors", "matplotlib"),
    "judge": ("httpx2", "anyio", "matplotlib"),
    "verify": ("math-verify",),
}


def report(console: Console | None = None) -> None:
    """Print versions, the backends of each device with the reason where one cannot run, and the optional packages."""
    console = console or Console()
    console.print(f"capo {capo.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    console.print(f"CPU: {platform.machine()}, {torch.get_num_threads()} threads, instruction set: {_isa()}")
    console.print(f"CUDA kernels: {_architectures()}", markup=False)
    table = Table("device", "backend", "state")
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for name in backends.BACKENDS:
            reason = backends.why_not(name, device)
            default = " (default)" if name == backends.available(device)[0] else ""
            table.add_row(device, name, f"ready{default}" if reason is None else f"not available: {reason}")
    console.print(table)
    for extra, packages in EXTRAS.items():
        found = {name: _version(name) for name in packages}
        missing = [name for name, version in found.items() if version is None]
        state = ", ".join(f"{name} {version}" for name, version in found.items() if version is not None)
        hint = f"; missing: {', '.join(missing)} (pip install 'capo[{extra}]')" if missing else ""
        console.print(f"{extra}: {state}{hint}", markup=False)
    for engine in ("transformers", "vllm"):
        console.print(f"rollout {engine}: {_engine_state(engine)}", markup=False)
    for engine in ENGINES:
        console.print(f"judge {engine}: {_engine_state(engine)}", markup=False)


def _engine_state(engine: str) -> str:
    """Whether an engine of rollouts or judges can run, in which version, and why not."""
    packages, extra = ENGINES[engine]
    missing = [name for name in packages if _version(name) is None]
    if missing:
        return f"not available: no {', '.join(missing)} (pip install 'capo[{extra}]')"
    if engine != "vllm":
        return f"ready ({packages[0]} {_version(packages[0])})" if packages else "ready"
    reason, found = vllm_why_not(), vllm_version()
    return f"not available: {reason}" if reason or not found else f"ready ({' '.join(found)})"


def _isa() -> str:
    try:
        from capo import _native
    except ImportError:
        return "none (no native module)"
    return _native.isa() if hasattr(_native, "isa") else "unknown"


def _architectures() -> str:
    try:
        from capo import cuda
    except ImportError:
        return "none (no native module)"
    return f"built for {', '.join(cuda.architectures())}" if cuda.architectures() else "none (built without nvcc)"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
