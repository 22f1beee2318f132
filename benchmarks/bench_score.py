"""How fast `capo score` turns files into a parquet file, and what it costs beside the tokenizer.

    python benchmarks/bench_score.py gsm8k_solutions.jsonl [--tokenizer PATH] [--copies 20] [--repeats 5]

Prints medians, in tokens per second of wall time (in brackets: of processor time), from token ids with critiques as
replies to parse, with critiques already read, and with none (an outcome-only rule); then from text, as a multiple of the
time of ``encode_batch`` on the same texts, the two timed in turn. The same figures go to results/<machine>/score.csv.
Without --tokenizer a byte-level BPE of 2,000 tokens is trained on the solutions.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import importlib.util
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

import orjson
import tokenizers
import torch
from run import HERE, cpu_model, native_isa, revision, slug

import capo
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


CASES = {
    "ids, critiques as replies": ("ids.jsonl", "replies.jsonl"),
    "ids, critiques as votes": ("ids.jsonl", "votes.jsonl"),
    "ids, no critiques": ("ids.jsonl", None),
    "text, critiques as replies": ("text.jsonl", "replies.jsonl"),
    "text, critiques as votes": ("text.jsonl", "votes.jsonl"),
    "text, no critiques": ("text.jsonl", None),
}
FLOOR = "encode_batch"


def measure(folder: Path, texts: list[str], repeats: int) -> tuple[dict[str, object], dict[str, list]]:
    """What was scored; and wall and processor time of each round, by case."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def run(rollouts: str, critiques: str | None):
        rule = CreditRule() if critiques else CreditRule.preset("grpo")
        path = None if critiques is None else folder / critiques
        return score_file(folder / rollouts, path, tokenizer, folder / "out.parquet", rule, delimiter="\n")

    summary = run("ids.jsonl", "replies.jsonl")
    about = {
        "responses": summary.responses,
        "tokens": summary.tokens,
        "critiques": sum(summary.critiques.values()),
        "vocabulary": tokenizer.get_vocab_size(),
    }
    times: dict[str, list] = {name: [] for name in [FLOOR, *CASES]}
    for _ in range(repeats):  # in turn, so that a busy moment falls on all alike
        times[FLOOR].append(seconds(lambda: tokenizer.encode_batch(texts, add_special_tokens=False)))
        for name, case in CASES.items():
            times[name].append(seconds(lambda case=case: run(*case)))
    return about, times


def rows_of(about: dict[str, object], times: dict[str, list]) -> list[dict[str, object]]:
    """A row of the table for each case."""
    floor_wall, floor_cpu = map(statistics.median, zip(*times[FLOOR], strict=True))
    made_with = {
        "capo": capo.__version__,
        "git": revision(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "isa": native_isa(),
        "load": round(os.getloadavg()[0], 2),
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%MZ}",
    }
    rows = []
    for name, measured in times.items():
        walls, processor = zip(*measured, strict=True)
        wall, cpu = statistics.median(walls), statistics.median(processor)
        from_text = name != FLOOR and name.startswith("text")
        row = {
            "what": name,
            **about,
            "median_s": wall,
            "min_s": min(walls),
            "max_s": max(walls),
            "cpu_s": cpu,
            "rounds": len(walls),
            "tokens_per_s": about["tokens"] / wall,
            "tokens_per_cpu_s": about["tokens"] / cpu,
            "ratio_encode": wall / floor_wall if from_text else None,
            "cpu_ratio_encode": cpu / floor_cpu if from_text else None,
            **made_with,
        }
        rows.append({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})
    return rows


def show(row: dict[str, object]) -> None:
    ratio = f", {row['ratio_encode']} ({row['cpu_ratio_encode']}) of encode_batch" if row["ratio_encode"] else ""
    speed, of_processor = (float(row[key]) / 1e6 for key in ("tokens_per_s", "tokens_per_cpu_s"))
    print(
        f"{row['what']:28} {row['median_s']:>6} s ({row['min_s']} .. {row['max_s']}), processor {row['cpu_s']:>6} s: "
        f"{speed:5.2f} ({of_processor:.2f}) M tokens/s{ratio}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of capo score.")
    parser.add_argument("solutions", type=Path, help="gsm8k_solutions.jsonl")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json")
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of results")
    args = parser.parse_args()
    given = tokenizers.Tokenizer.from_file(str(args.tokenizer)) if args.tokenizer else None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = write_files(args.solutions, folder, given, args.copies)
        about, times = measure(folder, texts, args.repeats)
    print(", ".join(f"{count:,} {name}" for name, count in about.items()))
    table = rows_of(about, times)
    for row in table:
        show(row)
    path = args.out / slug() / "score.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    print(path)


if __name__ == "__main__":
    main()
