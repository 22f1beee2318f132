"""Processor time of the loss from hidden states beside its three products, and what new memory for a gradient adds.

    python benchmarks/linear_parts.py [--rounds 5] [--rows 1024] [--hidden 1024] [--vocab 151936]

All is timed in turn in each round. Processor time of all threads says more than wall time where other work keeps the machine
busy; run.py is for an idle one. Linux only.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import time
from collections.abc import Callable

import torch
from linear_variants import LINEAR_VARIANTS, LinearCase

LIVE = (1.0, 0.5, 0.25, 0.05)
POPULATE = 23  # MADV_POPULATE_WRITE, which the module mmap does not have


def losses(case: LinearCase) -> dict[str, Callable]:
    variants = {v.name: v.make for v in LINEAR_VARIANTS if v.name in ("three GEMMs", "capo")}
    shape = {name: getattr(case, name) for name in ("rows", "hidden", "vocab")}
    return {
        f"{name}, live {live}": make(LinearCase(live=live, **shape).make()).call
        for live in LIVE
        for name, make in variants.items()
    }


def mapped(case: LinearCase, *advice: int) -> torch.Tensor:
    """New memory for the gradient of the weight."""
    memory = mmap.mmap(-1, 2 * case.vocab * case.hidden, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for each in advice:
        memory.madvise(each)
    return torch.frombuffer(memory, dtype=torch.bfloat16).view(case.vocab, case.hidden)


def products(case: LinearCase) -> dict[str, Callable]:
    """The product for the gradient of the weight into memory of several kinds, and getting that alone."""
    left, right = torch.randn(case.rows, case.vocab).bfloat16(), torch.randn(case.rows, case.hidden).bfloat16()
    shape, large = (case.vocab, case.hidden), mmap.MADV_HUGEPAGE
    there = {"small": mapped(case, POPULATE), "large": mapped(case, large, POPULATE)}

    def product(out: torch.Tensor) -> torch.Tensor:
        return torch.mm(left.t(), right, out=out)

    return {
        "product into small pages that are there": lambda: product(there["small"]),
        "product into large pages that are there": lambda: product(there["large"]),
        "product into new small pages": lambda: product(torch.empty(shape, dtype=torch.bfloat16)),
        "product into new large pages": lambda: product(mapped(case, large)),
        "zeros": lambda: torch.zeros(shape, dtype=torch.bfloat16),
        "new small pages": lambda: mapped(case, POPULATE),
        "new large pages": lambda: mapped(case, large, POPULATE),
    }


def measure(calls: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of processor time."""
    spent = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            result = call()
            end = time.process_time()
            del result
            if number:
                spent[name].append(1e3 * (end - start))
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rounds", 5), ("rows", 1_024), ("hidden", 1_024), ("vocab", 151_936)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    case = LinearCase(rows=options.rows, hidden=options.hidden, vocab=options.vocab)
    spent = {name: statistics.median(times) for name, times in measure(losses(case), options.rounds).items()}
    for live in LIVE:
        floor, capo = (spent[f"{name}, live {live}"] for name in ("three GEMMs", "capo"))
        print(
            f"live {live}: three GEMMs {floor:.0f} ms, capo {capo:.0f}: {capo / floor:.3f} of them, "
            f"{capo / spent['capo, live 1.0']:.4f} of all live"
        )
    for name, times in measure(products(case), options.rounds).items():
        print(f"{name}: {min(times):.0f} to {max(times):.0f} ms, median {statistics.median(times):.0f}")


if __name__ == "__main__":
    main()
