"""How many critiques are left out without changing a decision: `capo.judges.voting` against all K votes.

    python benchmarks/votes.py [--votes 8] [--error 0.1] [--responses 2000] [--run METRICS.jsonl]
    python benchmarks/votes.py --arithmetic [--seeds 5] [--updates 6] [--output runs/votes]

A judge errs independently on each step of each vote; half of the responses are right, the others have one wrong step. Every weight
is compared with that of K votes. With --run, the shares that a training left out, from its log: there equal responses are
judged once, too.

With --arithmetic, the example is trained with each seed from one warm start, and what its judge was asked about is counted
three ways: votes that cannot change a decision left out; besides, responses whose votes cannot change an advantage;
besides, equal responses judged once, which is what the training does. Advantages of all three are compared with those of K
votes on every response, bit for bit.
"""

import argparse
import io
import random
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console

from capo.config import load_config
from capo.credit import Credit, CreditRule
from capo.critique import vote_table
from capo.judges import JudgeRequest
from capo.judges.scripted import ScriptedJudge
from capo.judges.voting import collect
from capo.metrics import read_metrics
from capo.reference import step_weights
from capo.steps import Steps
from capo.train import train

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


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


@dataclass
class Tally:
    """Critiques of a training, in the three ways and in full; a collector in place of `capo.judges.voting.collect`."""

    asked: list[int] = field(default_factory=lambda: [0, 0, 0])
    full: int = 0

    def collect(self, judge, requests, num_votes, rule, outcomes, groups, *, adaptive):
        ways = [
            collect(judge, requests, num_votes, rule, share=False),
            collect(judge, requests, num_votes, rule, outcomes, groups, share=False),
            collect(judge, requests, num_votes, rule, outcomes, groups),
        ]
        whole = advantages(judge.critique(requests, num_votes), requests, num_votes, rule, outcomes, groups)
        for way, votes in enumerate(ways):
            if not torch.equal(whole, advantages(votes.replies, requests, num_votes, rule, outcomes, groups)):
                raise AssertionError("an advantage differs from that of all votes")
            self.asked[way] += votes.asked
        self.full += ways[-1].full
        return ways[-1]


def advantages(replies, requests, num_votes, rule, outcomes, groups):
    """Those of responses with a token a step."""
    counts = [len(request.steps) for request in requests]
    votes = vote_table([[reply.critique for reply in row] for row in replies], counts, num_votes)
    ends, bounds = torch.arange(1, sum(counts) + 1), torch.tensor([0, *counts]).cumsum(0)
    steps = Steps(ends - 1, ends, bounds)
    return Credit(torch.tensor(outcomes), votes, steps, bounds, torch.tensor(groups), rule).advantages()


def arithmetic(options):
    """Train the example with every seed; raises AssertionError if an advantage differs."""
    print(
        f"critiques left out, K = {options.votes}, majority, error {options.error:.0%} a step, {options.updates} updates of"
    )
    print("examples/arithmetic/capo.yaml, all advantages as with K votes on every response:")
    print(f"{'seed':<6}{'decided':>10}{'+ cannot matter':>18}{'+ equal responses':>20}")
    totals = []
    for seed in range(options.seeds):
        settings = {
            "updates": options.updates, "eval_every": options.updates, "seeds.rl": seed, "judge.num_votes": options.votes,
            "judge.false_alarm": options.error, "judge.missed": options.error,
            "warm_start.cache": options.output / "warm-starts", "output": options.output / str(seed),
        }  # fmt: skip
        config = load_config(
            EXAMPLES / "arithmetic" / "capo.yaml", [f"{name}={value}" for name, value in settings.items()]
        )
        tally = Tally()
        with patch("capo.train.collect", tally.collect):
            train(config, console=Console(file=io.StringIO()))
        shares = [1 - asked / tally.full for asked in tally.asked]
        totals.append(shares[-1])
        print(f"{seed:<6}{shares[0]:>10.1%}{shares[1]:>18.1%}{shares[2]:>20.1%}", flush=True)
    print(f"all: {statistics.mean(totals):.1%} in the mean, {min(totals):.1%} at the least")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--votes", type=int, default=8)
    parser.add_argument("--error", type=float, default=0.1)
    parser.add_argument("--responses", type=int, default=2000)
    parser.add_argument("--run", type=Path, help="metrics.jsonl of a training")
    parser.add_argument("--arithmetic", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--output", type=Path, default=Path("runs/votes"), help="folder of the trainings")
    options = parser.parse_args()
    if options.arithmetic:
        return arithmetic(options)
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
