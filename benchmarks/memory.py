"""Peak memory of one variant, in a process of its own: what a call needs beyond its inputs and what it returns.

    python benchmarks/memory.py OP CASE_NUMBER VARIANT [--quick]

prints bytes. Linux only: the high-water mark of the resident set is set back before the call. A variant that needs more
memory than there is gets an error, instead of the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import re
import resource
from pathlib import Path

import torch
from table import OPS
from variants import Timed


def resident(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", status)[1])


def rise(timed: Timed, in_place: bool = False) -> int:
    """By how much a call raises the resident set, less the tensors that it returns if they are new."""
    timed.reset()
    gc.collect()
    with contextlib.suppress(ImportError):  # without the native module nothing is kept
        importlib.import_module("capo.native").forget_memory()
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before would seem to be there already
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    result = timed.call()
    peak = resident("VmHWM")
    returned = [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor)]
    own = 0 if in_place else sum(t.nbytes for t in returned)
    return max(0, peak - before - own)


def extra_memory(op: str, number: int, name: str, quick: bool) -> int:
    case, _ = OPS[op].cases(quick)[number]
    variant = next(v for v in OPS[op].variants if v.name == name)
    timed = variant.make(case.make())
    for _ in range(2):  # the first call loads libraries and compiles; what it leaves behind is not the second's
        peak = rise(timed, "in place" in name)
    return peak


def hold_back() -> None:
    """Leave a tenth of the memory that is free to others: beyond, allocations fail."""
    available = 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    resource.setrlimit(resource.RLIMIT_DATA, (int(0.9 * available),) * 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=OPS)
    parser.add_argument("case", type=int)
    parser.add_argument("variant")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hold_back()
    print(extra_memory(args.op, args.case, args.variant, args.quick))
