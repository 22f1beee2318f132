"""Write arithmetic.jsonl: worked chains of the built-in task with known mistakes, labelled step by step by its exact checker.

python examples/judge/make_arithmetic.py [--count 200] [--seed 0]
"""

import argparse
import json
import random
from pathlib import Path

import torch

from capo.config import TaskConfig
from capo.data import DELIMITER, ArithmeticTask
from capo.judges import JudgeRequest


def work_out(solution: list[str], places: list[int], rng: random.Random) -> list[str]:
    """The steps of a solution with mistakes at some places, each carried on from as a student would."""
    steps, value = [], None
    for place, step in enumerate(solution):
        if step.startswith("#"):
            before, result = "#", value
        else:
            operator, operand = step[1], step[2]
            value = step[0] if value is None else value
            before = f"{value}{operator}{operand}="
            a, b = int(value), int(operand)
            result = str({"+": a + b, "-": a - b, "*": a * b}[operator] % 10)
        if place in places:
            result = rng.choice([digit for digit in "0123456789" if digit != result])
        value = result
        steps.append(f"{before}{result}")
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    task = ArithmeticTask(TaskConfig(), options.seed)
    problems = task.problems(options.count, torch.Generator().manual_seed(options.seed), held_out=True)
    with (Path(__file__).parent / "arithmetic.jsonl").open("w") as file:
        for problem in problems:
            solution = problem.solution.split(DELIMITER)
            # Half of the chains are right; the others go wrong once or twice. What builds on a mistake is not one.
            steps = work_out(solution, rng.sample(range(len(solution)), rng.choice([0, 0, 1, 2])), rng)
            wrong = [i for i, bad in enumerate(task.check(JudgeRequest(problem.question, None, tuple(steps)))) if bad]
            row = {
                "problem": problem.question,
                "reference": problem.solution,
                "steps": steps,
                "label": wrong[0] if wrong else -1,
                "wrong": wrong,
            }
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
