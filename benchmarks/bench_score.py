"""How fast `capo score` turns files into a parquet file, and what it costs beside the tokenizer.

    python benchmarks/bench_score.py gsm8k_solutions.jsonl [--tokenizer PATH] [--copies 20] [--repeats 5]

Prints medians, in tokens per second of wall time (in brackets: of processor time), from token ids with critiques as replies to parse, with critiques already read, and
with none (an outcome-only rule); then from text, as a multiple of the time of ``encode_batch`` on the same texts, the two
timed in turn. Without --tokenizer a byte-level BPE of 2,000 tokens is trained on the solutions.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

import orjson
import tokenizers
import torch

from capo.credit import CreditRule
from capo.critique import CritiqueError, parse
from capo.judges.scripted import ScriptedJudge
from capo.score import score_file

_EXAMPLE = Path(__file__).parents[1] / "examples" / "score" / "make_gsm8k.py"


def trained(texts: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE of 2,000 tokens."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    )
    return model


def read(critique: dict | None, num_steps: int) -> dict | None:
    """A critique as an object with the flagged steps."""
    if critique is None:
        return None
    try:
        return {"flagged": parse(critique["text"], num_steps, critique["nonce"]).flagged}
    except CritiqueError as error:
        return {"valid": False, "error": error.reason.value}


def write_files(solutions: Path, folder: Path, tokenizer: tokenizers.Tokenizer | None, copies: int) -> list[str]:
    """The files of all cases, and the tokenizer; gives the texts of the text case."""
    spec = importlib.util.spec_from_file_location("make_gsm8k", _EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    judge = ScriptedJudge(example.check, false_alarm=0.05, missed=0.1, invalid=0.03, failed=0.01)
    with open(solutions, encoding="utf-8") as lines:
        converted = list(example.convert(lines, judge, 4))
    texts = [response["text"] for row, _ in converted for response in row["responses"]]
    tokenizer = tokenizer or trained(texts)
    tokenizer.save(str(folder / "tokenizer.json"))
    token_ids = iter([encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)])
    for row, _ in converted:
        for response in row["responses"]:
            response["token_ids"] = next(token_ids)
    names = ("ids.jsonl", "text.jsonl", "replies.jsonl", "votes.jsonl")
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in names}
        write_copies(converted, files, copies)
    return texts * copies


def write_copies(converted: list[tuple[dict, list[dict]]], files: dict[str, BinaryIO], copies: int) -> None:
    """All rows again and again, with ids of their own."""
    for copy in range(copies):
        for row, critiques in converted:
            responses = [{**response, "id": f"{copy}-{response['id']}"} for response in row["responses"]]
            for name, hidden in (("ids.jsonl", "text"), ("text.jsonl", "token_ids")):
                kept = [{key: value for key, value in each.items() if key != hidden} for each in responses]
                files[name].write(orjson.dumps({**row, "responses": kept}) + b"\n")
            for response, given in zip(responses, critiques, strict=True):
                num_steps = len([line for line in response["text"].split("\n") if line.strip()])
                for name, list_ in (
                    ("replies.jsonl", given["critiques"]),
                    ("votes.jsonl", [read(each, num_steps) for each in given["critiques"]]),
                ):
                    files[name].write(orjson.dumps({"response_id": response["id"], "critiques": list_}) + b"\n")


def seconds(function) -> tuple[float, float]:
    """Wall time, and processor time of all threads: the second says more on a busy machine."""
    started = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of capo score.")
    parser.add_argument("solutions", type=Path, help="gsm8k_solutions.jsonl")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json")
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    given = tokenizers.Tokenizer.from_file(str(args.tokenizer)) if args.tokenizer else None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = write_files(args.solutions, folder, given, args.copies)
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

        def run(rollouts: str, critiques: str | None):
            rule = CreditRule() if critiques else CreditRule.preset("grpo")
            path = None if critiques is None else folder / critiques
            return score_file(folder / rollouts, path, tokenizer, folder / "out.parquet", rule, delimiter="\n")

        cases = {
            "ids, critiques as replies": ("ids.jsonl", "replies.jsonl"),
            "ids, critiques as votes": ("ids.jsonl", "votes.jsonl"),
            "ids, no critiques": ("ids.jsonl", None),
            "text, critiques as replies": ("text.jsonl", "replies.jsonl"),
            "text, critiques as votes": ("text.jsonl", "votes.jsonl"),
            "text, no critiques": ("text.jsonl", None),
        }
        summary = run("ids.jsonl", "replies.jsonl")
        print(
            f"{summary.responses:,} responses, {summary.tokens:,} tokens, {sum(summary.critiques.values()):,} critiques"
        )
        print(f"{torch.get_num_threads()} threads, vocabulary of {tokenizer.get_vocab_size():,}")
        times = {name: [] for name in ["encode_batch", *cases]}
        for _ in range(args.repeats):  # in turn, so that a busy moment falls on all alike
            times["encode_batch"].append(seconds(lambda: tokenizer.encode_batch(texts, add_special_tokens=False)))
            for name, case in cases.items():
                times[name].append(seconds(lambda case=case: run(*case)))
        base = [statistics.median(column) for column in zip(*times["encode_batch"], strict=True)]
        for name, measured in times.items():
            walls, processor = zip(*measured, strict=True)
            wall, cpu = statistics.median(walls), statistics.median(processor)
            ratio = f", {wall / base[0]:.2f} ({cpu / base[1]:.2f}) of encode_batch" if name.startswith("text") else ""
            print(
                f"{name:28} {wall:6.2f} s ({min(walls):.2f} .. {max(walls):.2f}), processor {cpu:6.2f} s: "
                f"{summary.tokens / wall / 1e6:5.2f} ({summary.tokens / cpu / 1e6:.2f}) M tokens/s{ratio}"
            )


if __name__ == "__main__":
    main()
