"""Peak memory of the linear ops and their peers, each in a process of its own, next to the bound that capo promises.

    python benchmarks/linear_memory.py [--hidden 256] [--variants capo eager TRL]

Hidden states are narrow by default, as what fills memory is [rows, vocabulary]. A variant that is compiled is called twice and
the second call counts; the others are called for two responses first, which loads libraries, and then once for all.
What counts is the rise of the resident set during the call, less the gradients that it returns. The bound is the memory of
chunks (1 GiB by default) plus, for the loss, the gradient of the weight in float32. Linux only. A variant that does not fit into what
is free gets an error instead of the machine; its row says so. Rows are written one by one.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import inspect
import subprocess
import sys
from pathlib import Path

import torch
from linear_variants import OPS, LinearCase, first_responses
from memory import hold_back, rise
from run import HERE, backend_version, cpu_model, revision, slug

import capo

OP_NAMES = tuple(OPS)
COLUMNS = (
    "op", "variant", "backend", "shape", "dtype", "extra_memory_mb", "bound_mb", "within_bound", "logits_mb", "note",
    "git", "torch", "cpu", "threads", "date",
)  # fmt: skip


def bound(op: str, case: LinearCase) -> int:
    """Bytes."""
    function = getattr(capo, op)
    chunk = inspect.signature(function).parameters["chunk_bytes"].default
    return chunk + (4 * case.vocab * case.hidden if op == "linear_policy_loss" else 0)


def peak(op: str, name: str, case: LinearCase) -> int:
    """Bytes of one variant, in this process."""
    variant = next(v for v in OPS[op].variants if v.name == name)
    x = case.make()
    compiled = variant.backend in ("inductor", "cut-cross-entropy", "liger-kernel")
    if not compiled:
        variant.make(first_responses(x, 2)).call()
    timed = variant.make(x)
    return [rise(timed) for _ in range(1 + compiled)][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8_192)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--ops", nargs="+", default=OP_NAMES, choices=OP_NAMES)
    parser.add_argument("--variants", nargs="+", help="all by default")
    parser.add_argument("--out", type=Path, default=HERE / "results" / slug())
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the process of one variant
    args = parser.parse_args()
    case = LinearCase(rows=args.rows, hidden=args.hidden, vocab=args.vocab)
    if args.here:
        hold_back()
        print(peak(args.ops[0], args.variants[0], case))
        return

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "linear_memory.csv"
    for op in args.ops:
        for variant in OPS[op].variants:
            if variant.is_floor or "live" in variant.name or variant.name not in (args.variants or [variant.name]):
                continue
            row = measured(op, variant, case)
            put(path, row)
            shown = f"{row['extra_memory_mb']} MB" if row["extra_memory_mb"] else row["note"]
            print(f"{op}, {case.shape}, {variant.name}: {shown}; bound {row['bound_mb']} MB", flush=True)


def put(path: Path, row: dict[str, object]) -> None:
    """Write a row in place of that of the same op, variant and shape; all others stay."""
    table = []
    if path.exists():
        with path.open(newline="") as file:
            table = list(csv.DictReader(file))
    table = [old for old in table if any(old[key] != row[key] for key in ("op", "variant", "shape"))]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*table, row])


def measured(op: str, variant, case: LinearCase) -> dict[str, object]:
    sizes = [f"--{name}={getattr(case, name)}" for name in ("rows", "hidden", "vocab")]
    command = [sys.executable, __file__, *sizes, "--ops", op, "--variants", variant.name, "--here"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    row = dict.fromkeys(COLUMNS)
    row |= {
        "op": op,
        "variant": variant.name,
        "backend": backend_version(variant.backend),
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "bound_mb": round(bound(op, case) / 1e6),
        "logits_mb": round(case.rows * case.vocab * case.dtype.itemsize / 1e6),
        "note": variant.note,
        "git": revision(),
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        return row | {"note": f"no memory: {why:.200}"}
    used = int(done.stdout.split()[-1])
    return row | {"extra_memory_mb": round(used / 1e6), "within_bound": used <= bound(op, case)}


if __name__ == "__main__":
    main()
