"""How many critiques are left out without changing a decision: `capo.judges.voting` against all K votes.

    python benchmarks/votes.py [--votes 8] [--error 0.1] [--responses 2000] [--run METRICS.jsonl]

A judge errs independently on each step of each vote; half of the responses are right, the others have one wrong step. Every weight
is compared with that of K votes. With --run, the shares that a training left out, from its log: there equal responses are
judged once, too.
"""

import argparse
import random
import statistics
from pathlib import Path

import torch

from capo.credit import CreditRule
from capo.critique import vote_table
from capo.judges import JudgeRequest
from capo.judges.scripted import ScriptedJudge
from capo.judges.voting import collect
from capo.metrics import read_metrics
from capo.reference import step_weights


def truth(request):
    return ["wrong" in step for step in request.steps]


def left_out(num_steps, rule, num_votes, error, count):
    """Share of the critiques that were not needed; raises AssertionError if a weight differs."""
    rng = random.Random(num_steps)
    requests = []
    for number in range(count):
        steps = ["right"] * num_steps
        if number % 2:
            steps[rng.randrange(num_steps)] = "wrong"
        requests.append(JudgeRequest(str(number), None, tuple(steps)))
    judge = ScriptedJudge(truth, false_alarm=error, missed=error, seed=1)
    votes = collect(judge, requests, num_votes, CreditRule(vote=rule))
    weights = []
    for replies in (votes.replies, judge.critique(requests, num_votes)):
        table = vote_table([[reply.critique for reply in row] for row in replies], [num_steps] * count, num_votes)
        weights.append(step_weights(table, rule))
    if not torch.equal(*weights):
        raise AssertionError("a decision differs from that of all votes")
    return 1 - votes.asked / votes.full


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--votes", type=int, default=8)
    parser.add_argument("--error", type=float, default=0.1)
    parser.add_argument("--responses", type=int, default=2000)
    parser.add_argument("--run", type=Path, help="metrics.jsonl of a training")
    options = parser.parse_args()
    sizes = (1, 3, 7)
    print(f"critiques left out, K = {options.votes}, error {options.error:.0%} a step, all decisions as with K votes:")
    print(f"{'steps per response':<20}" + "".join(f"{size:>8}" for size in sizes))
    for rule in ("majority", "strict_majority", "intersection", "union"):
        shares = [left_out(size, rule, options.votes, options.error, options.responses) for size in sizes]
        print(f"{rule:<20}" + "".join(f"{share:>7.1%} " for share in shares))
    if options.run:
        shares = [
            row["capo/critiques/left_out"] for row in read_metrics(options.run) if "capo/critiques/left_out" in row
        ]
        median = statistics.median(shares)
        print(
            f"{options.run}: {median:.1%} in the median of {len(shares)} updates ({min(shares):.1%} to {max(shares):.1%})"
        )


if __name__ == "__main__":
    main()
