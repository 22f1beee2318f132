"""What the compilers say of the Triton kernels, and what that predicts for a GPU; needs none.

    python benchmarks/gpu_report.py [sm_80 sm_90 sm_100 gfx942] [--hot] [--json]

Every kernel is compiled as the package launches it: registers, spills, vector loads, instructions per logit in the loops
over a row. For sm_90 the second table has the least time that bytes and instructions allow on an H200. These are predictions,
not measurements; docs/gpu.md holds them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import subprocess
import tempfile
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import gpu_epilogue
import torch
import triton
from capo.kernels import backend, launch, product
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import capo

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

# An H200: streaming multiprocessors, clock under load, what a copy reaches, and what is assumed of its L2 cache.
MULTIPROCESSORS, CLOCK, DRAM, L2 = 132, 1.7e9, 4.3e12, 5.5e12
REGISTERS, WARPS = 65536, 64  # of a multiprocessor
# Floating-point operations a second in bfloat16: what cuBLAS reaches on large random matrices, what is assumed of Triton.
CUBLAS, OWN = 7.9e14, 6.7e14
EPILOGUE = 20  # instructions a logit that gpu_epilogue.py adds to its product, counted by hand in what nvdisasm prints


class _NoDevice:
    """Stands in for the driver of a GPU that is not there."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)  # Triton keeps what it compiled by device

    def get_current_stream(self, device=None):
        return 0


@contextlib.contextmanager
def compiling(target: GPUTarget, only: Container[str] | None = None):
    """Inside, launches compile for the target and run nothing. Gives a list that fills with (name, compiled kernel)."""
    found, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        if only is not None and self.fn.__name__ not in only:
            return None
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append((self.fn.__name__, kernel))
        return kernel

    driver.set_active(_NoDevice(target))
    generation = target.arch // 10 if isinstance(target.arch, int) else 9
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launch, "LANES", target.warp_size),
        mock.patch.object(product, "limits", lambda device: (generation, product.MEMORY, MULTIPROCESSORS)),
    ):
        yield found


def launch_policy_loss(dtype, rule, vocab=151_936, splits=1, grad=True, stride=None):
    """Launch what ``policy_loss`` does for off-policy tokens with a mask."""
    rows = 2
    logits = torch.empty(rows, stride or vocab, dtype=dtype)[:, :vocab]
    per_token = torch.zeros(rows)
    args = (
        torch.zeros(rows, dtype=torch.int64), per_token, per_token, torch.tensor([0, rows]),
        per_token if rule.kl_coef > 0 else None, torch.ones(rows, dtype=torch.bool),
        per_token if rule.importance_cap else None, *capo.ops._fields(rule),
    )  # fmt: skip
    with mock.patch.object(launch, "programs", lambda device: rows * splits):
        backend.policy_loss(logits, backend.new_gradient(logits) if grad else None, *args)


def launch_logprobs(dtype, vocab=151_936):
    logits = torch.empty(2, vocab, dtype=dtype)
    backend.logprobs(logits, torch.zeros(2, dtype=torch.int64), 1.0, None)


def launch_linear(dtype, rule, vocab=128_256, size=4096):
    """Launch what ``capo.linear`` does for a chunk of which only the device knows how many rows are live."""
    rows, count = 4, torch.tensor(3)
    hidden, weight, logits = (torch.empty(shape, dtype=dtype) for shape in ((rows, size), (vocab, size), (rows, vocab)))
    index, values = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
    weights = slopes = values.double()
    backend.rows_product(hidden, weight.t(), None, logits, count)
    backend.row_stats(logits, index, rule.temperature)
    terms = values, values, values, values, None, None, weights, torch.tensor([0, rows])
    backend.loss_terms(*terms, *capo.ops._fields(rule))
    backend.row_grads(logits, logits, index, index, slopes.new_zeros(rows, 5), slopes, slopes, rule.temperature)
    backend.rows_product(logits, weight, None, hidden, count, targets=index)
    for written in (False, True):
        backend.add_product(logits, hidden, torch.empty(vocab, size), count, written)


def launch_head_options(dtype, rows=4, vocab=128_256):
    """Launch what a bias and a softcap need besides, and rows with a temperature each."""
    logits, index, count = torch.empty(rows, vocab, dtype=dtype), torch.zeros(rows, dtype=torch.int64), torch.tensor(3)
    backend.cap_rows(logits, logits, 30.0, count)
    backend.cap_rows(logits, logits, 30.0, count, rows=index)
    backend.row_stats(logits, index, torch.ones(rows))
    backend.add_sum(logits, torch.zeros(vocab), count)


def launch_epilogue(dtype, rows=4, vocab=128_256, size=4096):
    hidden, weight = torch.empty(rows, size, dtype=dtype), torch.empty(vocab, size, dtype=dtype)
    gpu_epilogue.linear_logprobs(hidden, weight, torch.zeros(rows, dtype=torch.int64), torch.tensor(3))


def launch_credit(rule):
    steps = torch.arange(0, 8, 2), torch.arange(2, 9, 2), torch.tensor([0, 2, 4])
    votes, outcomes = torch.zeros(4, 8, dtype=torch.int8), torch.tensor([1.0, 0.0])
    backend.credit(outcomes, votes, *steps, torch.tensor([0, 4, 8]), torch.zeros(2, dtype=torch.int64), 8, *rule)


ALL = capo.LossRule(clip_dual=2.0, kl_coef=0.1, entropy_coef=0.01, importance_cap=2.0, reduce="token_mean")
CASES = {
    "loss": lambda: launch_policy_loss(torch.bfloat16, capo.LossRule()),
    "loss, all terms": lambda: launch_policy_loss(torch.bfloat16, ALL),
    "loss, float32": lambda: launch_policy_loss(torch.float32, ALL),
    "loss, few rows": lambda: launch_policy_loss(torch.bfloat16, capo.LossRule(), splits=8),
    "loss, sequence ratio": lambda: launch_policy_loss(torch.bfloat16, capo.LossRule(ratio="sequence")),
    "loss, odd vocabulary": lambda: launch_policy_loss(torch.bfloat16, capo.LossRule(), vocab=151_643),
    "logprobs": lambda: launch_logprobs(torch.bfloat16),
    "logprobs, float32": lambda: launch_logprobs(torch.float32),
    "linear": lambda: launch_linear(torch.bfloat16, capo.LossRule()),
    "linear, float32": lambda: launch_linear(torch.float32, capo.LossRule(ratio="sequence")),
    "linear, options": lambda: launch_head_options(torch.bfloat16),
    "experiment": lambda: launch_epilogue(torch.bfloat16),
    "credit": lambda: launch_credit(capo.ops._fields(capo.CreditRule())),
}
# Kernels that touch logits, for which every register counts.
HOT = (
    "loss_of_rows", "stats_of_rows", "sums_of_parts", "gradient_of_rows", "stats_of_head_rows", "gradient_of_head_rows",
    "rows_times_matrix", "add_rows_by_rows",
)  # fmt: skip
HOT_CASES = ("loss", "loss, float32", "loss, few rows", "logprobs", "linear")


@dataclass
class Loop:
    """A loop over the whole part of a row: instructions of a thread for each logit, those in float64 among them."""

    writes: bool
    instructions: float
    float64: int


@dataclass
class Kernel:
    case: str
    name: str
    registers: int
    spilled: int
    shared: int  # bytes of memory that a program shares
    warps: int
    wide_loads: int  # of 128 bits or more
    wide_stores: int
    evict_last: int  # loads that ask the cache to keep what they read
    atomics: int
    matrix_units: int  # instructions for them
    block_loads: int  # of blocks in hardware
    loops: list[Loop]

    @property
    def programs(self) -> int:
        """How many fit on one of NVIDIA's multiprocessors, by registers and warps."""
        per_program = -(-self.registers // 8) * 8 * 32 * self.warps
        return min(REGISTERS // per_program, WARPS // self.warps)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)}: {done.stderr}")
    return done.stdout + done.stderr


def loops_of(sass: str) -> list[Loop]:
    """The largest loop over logits that writes and the largest that does not, from what nvdisasm prints."""
    lines, labels, loops = sass.splitlines(), {}, {}
    for number, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = number
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if branch is None or branch[1] not in labels:
            continue
        body = [
            text.split("*/", 1)[1] for text in lines[labels[branch[1]] : number + 1] if re.search(r"/\*\w+\*/", text)
        ]
        exponentials = sum("MUFU.EX2" in text for text in body)
        writes = any("STG" in text for text in body)
        if exponentials > loops.get(writes, (0, None))[0] and any(
            re.search(r"LDG.*\.(128|256)", text) for text in body
        ):
            float64 = sum(bool(re.search(r"\bD(ADD|MUL|FMA|SETP|MNMX)\b|F64", text)) for text in body)
            loops[writes] = exponentials, Loop(writes, len(body) / exponentials, float64)
    return [loop for _, loop in loops.values()]


def describe(case: str, name: str, kernel, target: str) -> Kernel:
    """Read a compiled kernel."""
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        keys = "vgpr_count", "private_segment_fixed_size"
        registers, spilled = (int(re.search(rf"\.{key}: +(\d+)", text)[1]) for key in keys)
        loops = []
        patterns = (
            r"(?:buffer|global)_load_dwordx4",
            r"(?:buffer|global)_store_dwordx4",
            r"(?!)",
            r"_atomic_",
            r"v_mfma_",
            r"(?!)",
        )
    else:
        text = kernel.asm["ptx"]
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
            loops = loops_of(_tool("nvdisasm", "-c", str(cubin)))
        registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
        spilled = stack + local
        patterns = (
            r"ld\.global\S*\.v[48]\.b32",
            r"st\.global\S*\.v[48]\.b32",
            r"ld\.global\S*evict_last",
            r"\b(?:atom|red)\.",
            r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)",
            r"\bcp\.async\.bulk\.tensor",
        )
    counts = [len(re.findall(pattern, text)) for pattern in patterns]
    return Kernel(case, name, registers, spilled, kernel.metadata.shared, kernel.metadata.num_warps, *counts, loops)


def report(target: str, hot: bool = False) -> list[Kernel]:
    """Every kernel of every case, or the hot ones of a few."""
    kernels = []
    for case in HOT_CASES if hot else CASES:
        with compiling(TARGETS[target], HOT if hot else None) as found:
            CASES[case]()
        kernels += [describe(case, name, kernel, target) for name, kernel in found]
    return kernels


def table(kernels: list[Kernel], nvidia: bool = True) -> str:
    lines = [
        "| case | kernel | registers | spilled bytes | programs on an SM | instructions per logit: sums, gradient |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    seen = set()
    for k in kernels:
        key = (k.name, k.registers, k.spilled, str(k.loops))
        if key in seen:
            continue
        seen.add(key)
        sums = [f"{loop.instructions:.1f}" for loop in k.loops if not loop.writes][:1]
        gradient = [f"{loop.instructions:.1f}" for loop in k.loops if loop.writes][:1]
        work = ", ".join(sums + gradient)
        programs = k.programs if nvidia else ""
        lines.append(f"| {k.case} | `{k.name}` | {k.registers} | {k.spilled} | {programs} | {work} |")
    return "\n".join(lines)


def predictions(kernels: list[Kernel]) -> str:
    """Times of the shapes of the issue from bytes and instructions, with the floor beside them."""
    loss = next(k for k in kernels if k.case == "loss" and k.name == "loss_of_rows")
    stats = next(k for k in kernels if k.case == "logprobs" and k.name == "stats_of_rows")
    sums = next(loop.instructions for loop in loss.loops if not loop.writes)
    gradient = next(loop.instructions for loop in loss.loops if loop.writes)
    only = next(loop.instructions for loop in stats.loops if not loop.writes)
    rows, vocab = 8192, 151_936
    row = 2 * vocab  # bytes
    lanes = MULTIPROCESSORS * 4 * 32 * CLOCK
    lines = [
        "| 8192 x 151936 bf16 | memory ms | L2 ms | instructions ms | predicted ms | if L2 keeps nothing | floor ms |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")

    def add(name, live, reads, writes, work, floor):
        hits = rows * row * (live * min(reads, 1) + writes)
        all_of_it = rows * row * (live * reads + writes)
        issue = rows * live * vocab * work / lanes
        times = [hits / DRAM, all_of_it / L2, issue]
        lines.append(
            f"| {name} | "
            + " | ".join(f"{1e3 * t:.2f}" for t in (*times, max(times), max(all_of_it / DRAM, issue), floor))
            + " |"
        )

    for live in (1.0, 0.5, 0.25, 0.05):
        floor = rows * row * 2 * live / DRAM
        add(f"loss and gradient, live {live:g}", live, 2, 1, sums + gradient, floor)
    add("log-probabilities and entropy", 1.0, 1, 0, only, rows * row / DRAM)
    return "\n".join(lines)


def linear_predictions(rows=4096, size=4096, vocab=128_256) -> str:
    """Times of the loss from hidden states with both gradients, and of log-probabilities, of matrix products and bytes."""
    lines = [
        f"| {rows} x {size} x {vocab} bf16 | Tflop | tiles: logits, hidden, weight | products ms | rows ms | predicted ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    tall, wide = 128, 256  # a tile

    def tiles(m, n):
        return -(-m // tall) * -(-n // wide)

    def waves(number, depth):
        """Time of so many tiles, one on each multiprocessor at a time."""
        return -(-number // MULTIPROCESSORS) * 2 * tall * wide * depth / (OWN / MULTIPROCESSORS)

    def add(name, flop, work, products, rest):
        times = " | ".join(f"{1e3 * t:.2f}" for t in (products, rest, products + rest))
        lines.append(f"| {name} | {flop / 1e12:.2f} | {', '.join(map(str, work))} | {times} |")

    for live in (1.0, 0.5, 0.25, 0.05):
        count = round(live * rows)
        flop = 6 * count * size * vocab
        work = tiles(count, vocab), tiles(count, size), tiles(vocab, size)
        own = [waves(work[0], size), waves(work[1], vocab), waves(work[2], -(-count // 64) * 64)]
        own[2] = max(own[2], 2 * vocab * size / DRAM)  # it writes all of its result whatever the number of rows
        logits = 2 * count * vocab / DRAM
        add(f"live {live:g}, `num_live`", flop, (), flop / CUBLAS, 3 * logits)
        add(f"live {live:g}, counted on the device", flop, work, sum(own), 3 * logits)
    flop, work, logits = 2 * rows * size * vocab, tiles(rows, vocab), 2 * rows * vocab / DRAM
    sums = -(-work // MULTIPROCESSORS) * tall * wide * EPILOGUE / (4 * 32 * CLOCK)
    add("log-probabilities", flop, (), flop / CUBLAS, logits)
    add("log-probabilities, counted on the device", flop, (work,), waves(work, size), logits)
    add("log-probabilities in the epilogue", flop, (work,), waves(work, size), sums)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "targets", nargs="*", metavar="target", help="of " + ", ".join(TARGETS) + "; all if none is named"
    )
    parser.add_argument(
        "--hot", action="store_true", help="only kernels that touch logits, in the cases that differ most"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args()
    reports = {target: report(target, options.hot) for target in options.targets or TARGETS}
    if options.json:
        print(json.dumps({target: list(map(dataclasses.asdict, kernels)) for target, kernels in reports.items()}))
        return
    for target, kernels in reports.items():
        print(f"\n### {target}, Triton {triton.__version__}\n\n{table(kernels, target.startswith('sm'))}")
        if target == "sm_90":
            print(f"\n### Predictions for an H200\n\n{predictions(kernels)}\n\n{linear_predictions()}")


if __name__ == "__main__":
    main()
