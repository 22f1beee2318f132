"""Compare methods over seeds: same warm-started models, prompts and sampling seeds; only the credit rule differs.

    python examples/arithmetic/compare.py --seeds 3

writes ``comparison.csv``, ``comparison.md`` and ``comparison.png`` into the output folder. Runs are processes of one
thread each, two at a time by default; finished runs are not repeated, interrupted ones are resumed.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from capo.checkpoint import saved_updates
from capo.evaluate import write_comparison
from capo.metrics import read_metrics

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["capo", "grpo"], help="capo.CreditRule presets")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds; each has its own task and model")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--output", type=Path, default=Path("runs/comparison"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all runs")
    args = parser.parse_args()

    def run(method: str, seed: int, updates: int, folder: Path) -> float:
        """One run of `capo train`; returns its wall seconds."""
        began = time.perf_counter()
        command = [sys.executable, "-m", "capo.cli", "train", str(HERE / "capo.yaml"), f"method={method}"]
        command += [f"output={folder}", f"updates={updates}", "threads=1", "eval_every=5", "save_every=20"]
        command += [f"seeds.{name}={seed}" for name in ("data", "warm_start", "rl")]
        command += [f"warm_start.cache={args.output / 'warm-starts'}", *args.overrides]
        resume = ["--resume"] * bool(saved_updates(folder / "checkpoints"))
        done = subprocess.run([*command, *resume], check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\nfailed:\n{done.stderr}")
        print(f"{folder.name}: {done.stdout.splitlines()[0]}, {time.perf_counter() - began:.0f} s", flush=True)
        return time.perf_counter() - began

    began = time.perf_counter()
    seeds = range(args.seeds)
    with ThreadPoolExecutor(args.jobs) as pool:
        # The warm starts first, so that the runs of one seed find theirs in the cache.
        list(pool.map(lambda seed: run(args.methods[0], seed, 0, args.output / f"start-{seed}"), seeds))
        jobs = [
            (method, seed, args.updates, args.output / f"{method}-{seed}") for seed in seeds for method in args.methods
        ]
        list(pool.map(lambda job: run(*job), jobs))

    curves = {}
    for method, seed, _, folder in jobs:
        rows = read_metrics(folder / "metrics.jsonl")
        curves[method, seed] = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    table = write_comparison(curves, args.output, f"{args.seeds} seeds, same warm-started models")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"\n{table}\n{len(jobs)} runs in {time.perf_counter() - began:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of "
        f"CPU time; files in {args.output}"
    )


if __name__ == "__main__":
    main()
