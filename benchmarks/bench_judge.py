"""The OpenAI judge against a local server: what it costs over a bare HTTP client, and what faults do to it.

    python benchmarks/bench_judge.py [--requests 10000] [--rounds 5] [--share 0.3] [--out FILE.csv]

First part: a healthy server in a process of its own; rounds of the bare client and the judge alternate, at the same
concurrency, with the same bodies; wall and processor time of this process. The bare client sends what was rendered before, reads
the whole body and parses its JSON; the connections of both are open before. Once the server answers at once, so that the client's processor time is what limits both, and
once after 0.1 s, still sooner than any model does; the bound is for both. Second part: a server that errs on the given share of the attempts in all of its
ways; every reply is compared with the truth. Exits with 1 if one of the bounds in `BOUNDS` is broken. The defaults take
about two minutes on two cores.
"""

import argparse
import asyncio
import csv
import gc
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing, contextmanager
from pathlib import Path

import httpx2

from capo.critique import render
from capo.judges import JudgeRequest
from capo.judges.client import Limits
from capo.judges.openai import OpenAIJudge

BOUNDS = {
    "wall time of the judge over the bare client's, server that answers at once": 1.10,
    "the same, server that takes its time": 1.10,
    "MiB more after the last request than after a tenth": 8,
}
TESTS = Path(__file__).resolve().parents[1] / "tests"


@contextmanager
def server(share, delay):
    command = [sys.executable, str(TESTS / "judge_server.py"), str(share), str(delay)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
        process.stdin.close()


def make_requests(count, seed=0):
    """Requests with known wrong steps, about as long as solutions of school mathematics."""
    rng = random.Random(seed)
    prose = "and so the total is the sum of both parts, which we compute by adding them one after the other"
    requests = []
    for number in range(count):
        steps = [f"In step {i}, {prose}: {rng.choice(['right', 'wrong'])}" for i in range(rng.randint(3, 8))]
        requests.append(JudgeRequest(f"Question {number}: {prose}?", f"{prose}: {number}", tuple(steps)))
    return requests


def truth(request):
    return tuple(i for i, step in enumerate(request.steps) if "wrong" in step)


async def bare(url, bodies, concurrency):
    """Wall and processor time of a client without any care, once its connections are open."""
    limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx2.AsyncClient(limits=limits, timeout=60, trust_env=False) as client:

        async def post_all(bodies):
            jobs = iter(bodies)

            async def work():
                for body in jobs:
                    (await client.post(f"{url}/chat/completions", json=body)).json()["choices"][0]["message"]["content"]

            await asyncio.gather(*(work() for _ in range(concurrency)))

        await post_all(bodies[:concurrency])
        with timed() as times:
            await post_all(bodies)
    return times


def body_of(request, judge, num_votes):
    fingerprint = request.fingerprint(0)
    prompt = render(request.question, request.reference, request.steps, fingerprint[:12])
    message = {"role": "user", "content": prompt}
    return {"model": judge.model, "temperature": 1.0, "messages": [message], "seed": 1, "n": num_votes}


@contextmanager
def timed():
    """Gives a list that holds the wall and the processor time of the block after it."""
    gc.collect()
    times = []
    wall, used = time.perf_counter(), time.process_time()
    yield times
    times += time.perf_counter() - wall, time.process_time() - used


def overhead(requests, num_votes, rounds, concurrency, delay):
    """Rates of both clients, [(bare wall, bare cpu, judge wall, judge cpu)] of each round."""
    rows = []
    with server(0, delay) as url, closing(OpenAIJudge(url, "m", limits=Limits(concurrency=concurrency))) as judge:
        bodies = [body_of(request, judge, num_votes) for request in requests]
        judge.critique(requests[:concurrency], num_votes)
        for _ in range(rounds):
            bare_times = asyncio.run(bare(url, bodies, concurrency))
            with timed() as judge_times:
                judge.critique(requests, num_votes)
            rows.append((*bare_times, *judge_times))
    return rows


def torture(requests, num_votes, share, concurrency):
    """Replies of all requests, under faults; raises AssertionError if one is lost, swapped or wrongly flagged."""
    limits = Limits(concurrency=concurrency, attempt_timeout=2, backoff=0.02, max_wait=1, deadline=60)
    states, memory = Counter(), []
    with server(share, 0) as url, closing(OpenAIJudge(url, "m", limits=limits, max_failure_rate=1)) as judge:
        began = time.perf_counter()
        for first in range(0, len(requests), 1000):
            part = requests[first : first + 1000]
            replies = judge.critique(part, num_votes)
            if len(replies) != len(part) or any(len(votes) != num_votes for votes in replies):
                raise AssertionError("replies are missing")
            for request, votes in zip(part, replies, strict=True):
                for reply in votes:
                    states[reply.state] += 1
                    if reply.state == "valid" and reply.critique.flagged != truth(request):
                        raise AssertionError(f"{request} got {reply}")
            del replies, votes, reply
            memory.append(resident())
        seconds = time.perf_counter() - began
        counts = judge.counts
    return states, counts, memory, seconds


def resident():
    """Memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--votes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--delay", type=float, default=0.1, help="seconds before the healthy server answers")
    parser.add_argument("--share", type=float, default=0.3, help="of attempts that meet a fault")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    some = make_requests(min(options.requests, 2000))
    wall_ratios = []
    for delay in (0.0, options.delay):
        rows = overhead(some, options.votes, options.rounds, options.concurrency, delay)
        bare_wall, bare_cpu, judge_wall, judge_cpu = (statistics.median(column) for column in zip(*rows, strict=True))
        ratios = [statistics.median(row[i + 2] / row[i] for row in rows) for i in (0, 1)]
        wall_ratios.append(ratios[0])
        print(f"healthy server that answers after {delay:g} s, {len(some)} requests of {options.votes} votes, "
              f"{options.concurrency} at a time:")  # fmt: skip
        for name, wall, used in (("bare client", bare_wall, bare_cpu), ("judge", judge_wall, judge_cpu)):
            print(f"  {name:<12}{len(some) / wall:7.0f} requests/s, {1e6 * used / len(some):6.0f} us of processor each")
        print(f"  judge / bare: wall {ratios[0]:.3f}, processor {ratios[1]:.3f} (medians of {options.rounds} rounds)")

    requests = make_requests(options.requests, seed=1)
    states, counts, memory, seconds = torture(requests, options.votes, options.share, options.concurrency)
    print(f"faults on {options.share:.0%} of attempts, {len(requests)} requests: {seconds:.0f} s, {dict(states)}")
    print(f"  {json.dumps(dict(sorted(counts.items())))}")
    print(f"  memory after each 1,000 requests, MiB: {', '.join(f'{used:.0f}' for used in memory)}")
    growth = memory[-1] - memory[0]
    if options.out:
        with options.out.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["requests", "bare_per_s", "judge_per_s", "wall_ratio", "cpu_ratio", *states, "memory_mib"])
            rates = [f"{len(some) / bare_wall:.0f}", f"{len(some) / judge_wall:.0f}", *(f"{r:.3f}" for r in ratios)]
            table.writerow([len(requests), *rates, *states.values(), f"{growth:.1f}"])
    measured = dict(zip(BOUNDS, (*wall_ratios, growth), strict=True))
    for what, figure in measured.items():
        print(f"{what}: {figure:.2f}, {'at most' if figure <= BOUNDS[what] else 'NOT at most'} {BOUNDS[what]:.2f}")
    raise SystemExit(0 if all(measured[what] <= bound for what, bound in BOUNDS.items()) else 1)


if __name__ == "__main__":
    main()
