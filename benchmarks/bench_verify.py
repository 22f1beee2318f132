"""How fast and how safe `capo.verify` is.

    python benchmarks/bench_verify.py [gsm8k_solutions.jsonl] [--repeats 5] [--timeout 5] [--only torture] [--first]

With the solutions: agreement with their labels, and answers per second on one and on two processes. Then: what the
start of Math-Verify costs, pairs of expressions per second, and 64 hostile answers at once: how long past the limit
they take, where some end by themselves and where all hang. `--only torture` does nothing but that; `--first` has it run
before all else on a busy Linux machine (needs root). Exits with 1 if one of the bounds in `BOUNDS` is broken.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from capo.verify import Outcome, Verifier

BOUNDS = {"answers per second, two processes": 3000, "undecided share": 0.002, "seconds past the limit": 1.0}
HOSTILE = (
    "9**9**9**9",
    "5^{5^{5^{5^5}}}",
    "((9!)!)!",
    "10^{10^{10}}",
    "2^{10^{9}}",
    "1" * 200_000,
    "(" * 3000 + "x" + ")" * 3000,
    r"\frac{1}{" * 400 + "x" + "}" * 400,
    "(" * 900 + "x" + ")" * 900,
    r"\frac{1}{" * 180 + "x" + "}" * 180,
    "__import__('os').system('true')",
)
HANGING = ("9**9**9**9", "5^{5^{5^{5^5}}}", "((9!)!)!", "7**7**7**7")

_verifier: Verifier


def _begin() -> None:
    global _verifier
    _verifier = Verifier(engine="plain")


def _verify(part: tuple[list[str], list[str]]) -> int:
    return len(_verifier.verify(*part))


def labels(path: Path, repeats: int) -> bool:
    """Agreement and speed on real solutions; whether they are within the bounds."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [(each["text"], row["answer"], each["is_correct"]) for row in rows for each in row["responses"]]
    texts, answers = [text for text, _, _ in pairs], [answer for _, answer, _ in pairs]
    with Verifier() as verifier:
        outcomes = verifier.verify(texts, answers)
        counts = verifier.counts
    decided = [(each is Outcome.RIGHT, right) for each, (_, _, right) in zip(outcomes, pairs, strict=True)
               if each is not Outcome.UNDECIDED]  # fmt: skip
    agreed = sum(given == label for given, label in decided)
    share = 1 - len(decided) / len(pairs)
    print(
        f"{len(pairs):,} answers: {agreed:,} of {len(decided):,} decided as labelled, {share:.2%} undecided {dict(counts)}"
    )
    alone = Verifier(engine="plain")
    wall, processor = [], []
    for _ in range(repeats):
        began = time.perf_counter(), time.process_time()
        alone.verify(texts, answers)
        wall.append(time.perf_counter() - began[0])
        processor.append(time.process_time() - began[1])
    print(f"one process: {len(pairs) / statistics.median(wall):,.0f} answers/s of wall time "
          f"({len(pairs) / statistics.median(processor):,.0f} of processor time)")  # fmt: skip
    parts = [(texts[i : i + 660], answers[i : i + 660]) for i in range(0, len(texts), 660)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), _begin) as two:
        list(two.map(_verify, parts[:2]))
        wall = []
        for _ in range(repeats):
            began_at = time.perf_counter()
            list(two.map(_verify, parts))
            wall.append(time.perf_counter() - began_at)
    rate = len(pairs) / statistics.median(wall)
    print(f"two processes: {rate:,.0f} answers/s of wall time, texts sent to them included")
    return (
        agreed == len(decided)
        and share <= BOUNDS["undecided share"]
        and rate >= BOUNDS["answers per second, two processes"]
    )


def expressions(number: int) -> None:
    """What a pair costs that Math-Verify compares."""
    before = children()
    with Verifier(engine="math-verify") as verifier:
        began = time.perf_counter()
        verifier.start()
        print(f"start of Math-Verify, self-test included: {time.perf_counter() - began:.1f} s")
    start, before = children() - before, children()
    verifier = Verifier(engine="math-verify")
    verifier.start()
    draw = random.Random(0)
    forms = (r"{a}x+{b}", r"\frac{{{a}\pi}}{{{b}}}", r"{a}\sqrt{{{b}}}", r"({a},{b})", r"x^{{{a}}}-{b}y")
    known, given = [], []
    for i in range(number):
        form, a, b = forms[i % len(forms)], draw.randint(2, 99), draw.randint(2, 99)
        known.append(form.format(a=a, b=b))
        given.append(form.format(a=a, b=b + (i % 2)).replace("+", " + "))
    began = time.perf_counter()
    verifier.verify([rf"\boxed{{{each}}}" for each in given], known)
    took = time.perf_counter() - began
    counts = verifier.counts
    verifier.close()
    spent = children() - before - start
    print(f"{number} pairs of expressions: {counts['compared'] / took:,.0f} compared/s of wall time, "
          f"{spent / counts['compared'] * 1000:.1f} ms of processor time each (start: {start:.1f} s); {dict(counts)}")  # fmt: skip


def children() -> float:
    """Processor time of processes that have ended, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def torture(verifier: Verifier, timeout: float, kinds: tuple[str, ...], what: str) -> bool:
    """64 hostile answers at once; whether they took at most a second more than the limit."""
    items = [kinds[i % len(kinds)] + (f"+{i}" if i >= len(kinds) else "") for i in range(64)]
    time.sleep(3)  # what the pool does when idle is done
    before = verifier.counts
    began = time.perf_counter()
    outcomes = verifier.verify([rf"\boxed{{{item}}}" for item in items], ["x+1"] * 64)
    past = time.perf_counter() - began - timeout
    well = verifier.verify([r"\boxed{1+x}", r"\boxed{2+x}"], ["x+1"] * 2) == [Outcome.RIGHT, Outcome.WRONG]
    print(f"64 hostile answers, {what}: {past:+.2f} s past the limit of {timeout:g} s, {dict(verifier.counts - before)}; "
          f"the pool {'is well' if well else 'IS NOT WELL'} after it; load {os.getloadavg()[0]:.1f}")  # fmt: skip
    return past <= BOUNDS["seconds past the limit"] and well and Outcome.RIGHT not in outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and safety of capo.verify.")
    parser.add_argument("solutions", type=Path, nargs="?", help="gsm8k_solutions.jsonl")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--first", action="store_true", help="the torture has the processors before other sessions")
    parser.add_argument("--only", choices=["torture"])
    parser.add_argument("--timeout", type=float, default=5.0, help="limit of a comparison in seconds (%(default)s)")
    args = parser.parse_args()
    good = labels(args.solutions, args.repeats) if args.solutions else True
    if args.only is None:
        expressions(500)
    with Verifier(engine="math-verify", timeout=args.timeout) as verifier:
        verifier.start()
        if args.first:  # Linux shares processors between sessions, whatever the niceness of what is in them
            for pid in ("self", verifier._pool.pid):
                Path(f"/proc/{pid}/autogroup").write_text("-15")
        good &= torture(verifier, args.timeout, HOSTILE, "all kinds")
        good &= torture(verifier, args.timeout, HANGING, "all hang")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
