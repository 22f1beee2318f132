"""What nvcc says of the CUDA kernels, and what that predicts for a GPU; needs nvcc and no GPU.

    python benchmarks/cuda_report.py [sm_80 sm_90a sm_100] [--json]

Registers, spills and shared memory are ptxas's words; instructions per logit are counted in the loops over a row where
nvdisasm is found (on PATH, or as Triton brings it along). For sm_90a the second table has the least time that bytes and
instructions allow on an H200: a prediction, not a measurement. docs/gpu.md holds the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("sm_80", "sm_90a", "sm_100")
FILES = ("rows", "policy_loss", "credit")
FLAGS = ("-std=c++20", "-O3", "-fmad=false")  # as CMakeLists.txt has them
# Threads of a block; all others have 256.
THREADS = {("loss_of_rows_in_two_passes", "float32"): 512, ("metrics", None): 1024}
THREADS |= {("loss_of_rows_in_two_passes", dtype): 1024 for dtype in ("bfloat16", "float16")}
PARTS = ("sums", "sums at odd addresses", "gradient")
TYPES = ("float32", "bfloat16", "float16")

# An H200, as in gpu_report.py; shared memory of a multiprocessor, what a block of it costs besides.
MULTIPROCESSORS, CLOCK, DRAM, L2 = 132, 1.7e9, 4.3e12, 5.5e12
REGISTERS, WARPS, SHARED, RESERVED = 65536, 64, 228 * 1024, 1024
TILE, TILE_STATS, FACTORS = 1024, 24, 32
PRIME = 151_937  # a vocabulary of which no two rows that follow each other begin at multiples of 16 bytes


@dataclass
class Kernel:
    """One kernel for one type of logits (None: it does not see any)."""

    name: str
    dtype: str | None
    registers: int
    spilled: int  # bytes stored and loaded
    stack: int
    instructions: dict[str, float]  # of a thread for each logit: "sums", "sums at odd addresses", "gradient"

    def blocks(self, memory: int = 0) -> int:
        """How many fit on a multiprocessor, by registers, warps and shared memory."""
        threads = THREADS.get((self.name, self.dtype), 256)
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * threads)
        return min(by_registers, WARPS * 32 // threads, SHARED // (memory + RESERVED))


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(os.environ.get("CUDACXX") or "nvcc") or shutil.which(f"{home}/bin/nvcc")


def nvdisasm() -> str | None:
    spec = importlib.util.find_spec("triton")
    tools = "" if spec is None or spec.origin is None else str(Path(spec.origin).parent / "backends/nvidia/bin")
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path=tools)


def name_of(mangled: str) -> tuple[str, str | None]:
    """Name of a kernel and its type of logits."""
    place, name = 3, ""  # behind _ZN
    while length := re.match(r"\d+", mangled[place:]):
        place += len(length[0])
        name = mangled[place : place + int(length[0])]
        place += int(length[0])
    dtype = re.search(r"DtypeE(\d)", mangled)
    return name, None if dtype is None else TYPES[int(dtype[1])]


def paths_of(lines: list[str]) -> dict[tuple[bool, int], int]:
    """The fewest instructions in one turn of a loop, of paths that differ in whether they read 16 bytes at a time, and in
    how many words the lanes pass on; without those that call a function."""
    blocks: list[list[str]] = [[]]
    starts: dict[str, int] = {}
    for line in lines:
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            blocks.append([])
            starts[label[1]] = len(blocks) - 1
        if re.search(r"/\*\w{4,}\*/", line):
            blocks[-1].append(line)
        if re.search(r"\b(BRA|EXIT)\b", line):
            blocks.append([])
    fewest: list[dict[tuple[bool, int], int]] = [{} for _ in blocks]  # on the way to each block
    fewest[0] = {(False, 0): 0}
    for number, block in enumerate(blocks[:-1]):
        if any(re.search(r"\bCALL\b(?!.*`\(\.L_x_)", line) for line in block):  # a call of a label is a jump
            continue
        last = block[-1] if block else ""
        jump = re.search(r"\bBRA(?!\.DIV)\b.*`\((\.L_x_\d+)\)", last)
        target = starts.get(jump[1], 0) if jump else 0
        always = number + 2 < len(blocks) and re.search(r"\*/ +BRA +`", last)
        after = {*([] if always else [number + 1]), *([target] if target > number else [])}
        vectors = sum(bool(re.search(r"\bLD[GS]\S*\.128\b", line)) for line in block) >= 4
        words = sum("SHFL.IDX" in line for line in block)
        for (some, passed), count in fewest[number].items():
            key = (some or vectors, passed + words)
            for place in after:
                fewest[place][key] = min(fewest[place].get(key, count + len(block)), count + len(block))
    return fewest[-1]


def loops_of(sass: str) -> dict[str, float]:
    """Instructions per logit of the innermost loop over logits that writes and of the one that does not: in rows that begin
    at a multiple of 16 bytes, and, for the sums, at the worst address."""
    lines, labels, loops = sass.splitlines(), {}, {}
    for number, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = number
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if branch is None or branch[1] not in labels:
            continue
        body = lines[labels[branch[1]] : number + 1]
        exponentials = sum("MUFU.EX2" in text for text in body)
        what = "gradient" if sum("STG" in text and ".128" in text for text in body) >= 4 else "sums"
        if exponentials < 16 or len(body) > loops.get(what, (len(body), {}))[0]:
            continue
        counts = {words: count for (vectors, words), count in paths_of(body).items() if vectors}
        if 0 not in counts:  # a jump back into the loop from where its lanes come together
            continue
        found = {what: counts[0] / exponentials}
        if len(counts) > 1:
            found[f"{what} at odd addresses"] = max(counts.values()) / exponentials
        loops[what] = len(body), found
    return {what: each for _, found in loops.values() for what, each in found.items()}


def compiled(file: str, target: str) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        source = str(ROOT / "csrc/cuda" / f"{file}.cu")
        command = [nvcc(), *FLAGS, f"-I{ROOT / 'csrc'}", f"-arch={target}", "-Xptxas=-v", "-cubin", "-o", cubin, source]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source}: {done.stderr[-4000:]}")
        tool = nvdisasm()
        sass = subprocess.run([tool, "-c", cubin], check=True, capture_output=True, text=True).stdout if tool else ""
    bodies = {m[1]: m[2] for m in re.finditer(r"\.text\.(\S+):\n(.*?)(?=\n//-{5,}|\Z)", sass, re.DOTALL)}
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    return [
        Kernel(
            *name_of(mangled), int(registers), int(stores) + int(loads), int(stack), loops_of(bodies.get(mangled, ""))
        )
        for mangled, stack, stores, loads, registers in re.findall(pattern, done.stderr, re.DOTALL)
    ]


def report(target: str) -> list[Kernel]:
    with ThreadPoolExecutor(2) as pool:
        return [kernel for kernels in pool.map(lambda file: compiled(file, target), FILES) for kernel in kernels]


def table(kernels: list[Kernel]) -> str:
    lines = [
        "| kernel | logits | registers | spilled bytes | blocks on an SM | instructions per logit: sums, odd, gradient |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for k in sorted(kernels, key=lambda k: (k.name, k.dtype or "")):
        work = ", ".join(f"{k.instructions[what]:.1f}" for what in PARTS if what in k.instructions)
        dtype = k.dtype or ""
        lines.append(f"| `{k.name}` | {dtype} | {k.registers} | {k.spilled} | {k.blocks()} | {work} |")
    return "\n".join(lines)


def predictions(kernels: list[Kernel]) -> str:
    """Times of the shapes of docs/gpu.md from bytes and instructions."""
    by_name = {(k.name, k.dtype): k for k in kernels}
    rows, vocab, cluster = 8192, 151_936, 8
    tiles = -(-vocab // TILE)
    memory = FACTORS + tiles * TILE_STATS + -(-tiles // cluster) * TILE * 2
    lanes = MULTIPROCESSORS * 4 * 32 * CLOCK
    lines = [
        "| 8192 x 151936 bf16 | memory ms | L2 ms | instructions ms | predicted ms | blocks on an SM |",
        "| --- | --- | --- | --- | --- | --- |",
    ]

    def add(what, kernel, live, reads, writes, parts, memory=0, columns=vocab):
        """``live``: share of the rows that is read ``reads`` times; ``writes``: rows written, for each of all."""
        work = sum(kernel.instructions.get(part, 0.0) for part in parts)
        all_bytes = 2 * rows * columns
        bytes_of_memory = all_bytes * (live * min(reads, 1) + writes)
        times = bytes_of_memory / DRAM, all_bytes * (live * reads + writes) / L2, rows * live * columns * work / lanes
        numbers = " | ".join(f"{1e3 * t:.2f}" for t in (*times, max(times)))
        lines.append(f"| {what} | {numbers} | {kernel.blocks(memory)} |")

    on_chip, two_passes = (by_name[f"loss_of_rows_{form}", "bfloat16"] for form in ("on_chip", "in_two_passes"))
    for live in (1.0, 0.5, 0.25, 0.05):
        add(f"loss and gradient on chip, live {live:g}", on_chip, live, 1, 1, ("sums", "gradient"), memory)
    for live in (0.5, 0.25, 0.05):
        add(f"the same of live rows only, live {live:g}", on_chip, live, 1, live, ("sums", "gradient"), memory)
    at_odd_addresses = ("sums at odd addresses", "gradient")
    add(f"loss and gradient on chip, live 1, {PRIME} columns", on_chip, 1.0, 1, 1, at_odd_addresses, memory, PRIME)
    add("loss and gradient in two passes, live 1", two_passes, 1.0, 2, 1, ("sums", "gradient"))
    reading = by_name["tiles_of_rows", "bfloat16"]
    add("log-probabilities and entropy", reading, 1.0, 1, 0, ("sums",))
    add(f"log-probabilities and entropy, {PRIME} columns", reading, 1.0, 1, 0, at_odd_addresses[:1], columns=PRIME)
    tokens, steps, votes = 4096 * 8192, 4096 * 32, 8
    # Two blocks a group of 16 look at all ids, and at bounds and votes three times: to check them, for the sums, for the
    # squares; then once more to write.
    looked_at = 4096 / 16 * 2 * 4096 * 8 + 2 * 3 * steps * (16 + votes) + steps * (16 + votes)
    write, look = 4 * tokens / DRAM, looked_at / L2
    credit = (
        f"Credit of 4,096 responses of 8,192 tokens and 32 steps, groups of 16, 8 votes: {4 * tokens / 1e6:.0f} MB written in "
        f"{1e6 * write:.0f} us, {looked_at / 1e6:.0f} MB looked up in {1e6 * look:.0f} us through L2, which overlap but for the "
        f"first blocks: {1e6 * write:.0f} to {1e6 * (write + look):.0f} us."
    )
    return "\n".join([*lines, "", credit])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="target", help=f"of {', '.join(TARGETS)}; all if none is named")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args()
    if nvcc() is None:
        parser.error("no nvcc: install the CUDA toolkit, or set CUDACXX or CUDA_HOME")
    reports = {target: report(target) for target in options.targets or TARGETS}
    if options.json:
        print(json.dumps({target: list(map(dataclasses.asdict, kernels)) for target, kernels in reports.items()}))
        return
    for target, kernels in reports.items():
        print(f"\n### {target}, CUDA C++\n\n{table(kernels)}")
        if target == "sm_90a":
            print(f"\n### Predictions for an H200, CUDA C++\n\n{predictions(kernels)}")


if __name__ == "__main__":
    main()
