"""Turn model solutions of GSM8K into input for ``capo score``, with a scripted judge in place of a model.

    python make_gsm8k.py gsm8k_solutions.jsonl work/
    capo score work/rollouts.jsonl --critiques work/critiques.jsonl --tokenizer TOKENIZER --delimiter "\\n" --out work/shaped.parquet

A solution's lines are its steps. The judge knows which are wrong: those with a calculator note that does not add up
(``<<16-3=12>>``) or with a result other than its note's, and the last one if its answer is not the reference answer. It
errs at the rates given and writes its critiques as models do, so that they go through the real parser.
"""

from __future__ import annotations

import argparse
import ast
import json
import operator
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from capo.judges import JudgeRequest
from capo.judges.scripted import ScriptedJudge

_NOTE = re.compile(r"<<([^<>=]{1,80})=([^<>=]{1,40})>>\s*(-?[\d,]*\.?\d+)?")
_ANSWER = re.compile(r"A: *\$?(-?[\d,]*\.?\d+)")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value(text: str) -> Fraction | None:
    """The exact value of an arithmetic expression; None if it is none, or divides by zero."""
    try:
        return _value(ast.parse(text.replace(",", "").strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
    raise ValueError("not arithmetic")


def same(first: Fraction, second: Fraction) -> bool:
    """Whether two values agree to the cent; notes are rounded."""
    return abs(first - second) <= Fraction(1, 100) + abs(first) / 1000


def is_wrong(step: str, answer: str) -> bool:
    """Whether a step has a mistake that arithmetic shows."""
    for expression, noted, written in _NOTE.findall(step):
        expected, result = value(expression), value(noted)
        if expected is not None and result is not None and not same(expected, result):
            return True
        shown = value(written) if written else None
        if result is not None and shown is not None and not same(result, shown):
            return True
    final = _ANSWER.fullmatch(step.strip())
    claimed, right = (value(final[1]), value(answer)) if final else (None, None)
    return claimed is not None and right is not None and claimed != right


def check(request: JudgeRequest) -> list[bool]:
    """The truth about each step of a request."""
    return [is_wrong(step, request.reference or "") for step in request.steps]


def convert(lines: Iterator[str], judge: ScriptedJudge, votes: int) -> Iterator[tuple[dict, list[dict]]]:
    """A rollout row, and the critique rows of its responses, for every line of the data."""
    for number, line in enumerate(lines):
        row = json.loads(line)
        responses = [
            {"id": f"{number}-{each['model']}", "text": each["text"], "outcome": int(each["is_correct"])}
            for each in row["responses"]
        ]
        requests = [
            JudgeRequest(row["prompt"], row["answer"], tuple(filter(str.strip, each["text"].split("\n"))))
            for each in responses
        ]
        critiques = [
            {
                "response_id": response["id"],
                "critiques": [None if r.text is None else {"text": r.text, "nonce": r.nonce} for r in replies],
            }
            for response, replies in zip(responses, judge.critique(requests, votes), strict=True)
        ]
        yield {"prompt": row["prompt"], "answer": row["answer"], "responses": responses}, critiques


def main() -> None:
    parser = argparse.ArgumentParser(description="GSM8K solutions as input for `capo score`.")
    parser.add_argument("solutions", type=Path, help="gsm8k_solutions.jsonl")
    parser.add_argument("folder", type=Path, help="where rollouts.jsonl and critiques.jsonl go")
    parser.add_argument("--votes", type=int, default=4, help="critiques per response (%(default)s)")
    parser.add_argument("--false-alarm", type=float, default=0.05, help="rate of right steps flagged (%(default)s)")
    parser.add_argument("--missed", type=float, default=0.1, help="rate of wrong steps not flagged (%(default)s)")
    parser.add_argument("--invalid", type=float, default=0.03, help="rate of garbled critiques (%(default)s)")
    parser.add_argument("--failed", type=float, default=0.01, help="rate of missing critiques (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    judge = ScriptedJudge(check, args.false_alarm, args.missed, args.invalid, args.failed, args.seed)
    args.folder.mkdir(parents=True, exist_ok=True)
    with (
        open(args.solutions, encoding="utf-8") as lines,
        open(args.folder / "rollouts.jsonl", "w", encoding="utf-8") as rollouts,
        open(args.folder / "critiques.jsonl", "w", encoding="utf-8") as critiques,
    ):
        for row, judged in convert(lines, judge, args.votes):
            rollouts.write(json.dumps(row, ensure_ascii=False) + "\n")
            critiques.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in judged)


if __name__ == "__main__":
    main()
