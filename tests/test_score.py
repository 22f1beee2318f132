"""`capo score`: rollouts and critiques in, token advantages out."""

import base64
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pa = pytest.importorskip("pyarrow", reason="the extra 'score' is not installed")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("orjson", reason="the extra 'score' is not installed")
tokenizers = pytest.importorskip("tokenizers")

from typer.testing import CliRunner

import capo.critique
import capo.records
import capo.score
from capo import reference
from capo.cli import app
from capo.credit import _PRESETS, CreditRule
from capo.critique import agreement, vote_table
from capo.errors import UsageError
from capo.score import SCHEMA, InputError, score, score_file
from capo.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SOLUTIONS = ROOT.parent / "shared" / "data" / "gsm8k_solutions.jsonl"
if not SOLUTIONS.exists():  # a checkout beside others
    SOLUTIONS = ROOT.parents[1] / "shared" / "data" / "gsm8k_solutions.jsonl"


def byte_level(texts=(), size=0):
    """A byte-level BPE tokenizer trained on texts; without any, every byte is a token."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if texts:
        model = tokenizers.Tokenizer(models.BPE())
    else:
        model = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    if texts:
        model.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        )
    model.add_special_tokens(["<|end|>"])
    return model


BYTES = byte_level()
VOCABULARY = BYTES.get_vocab_size()
END = BYTES.token_to_id("<|end|>")


def ids(text):
    return BYTES.encode(text).ids


@pytest.fixture
def files(tmp_path):
    """Paths of a run, and functions that write its input and read its output."""
    BYTES.save(str(tmp_path / "tokenizer.json"))
    return Files(tmp_path)


class Files:
    def __init__(self, folder):
        self.folder = folder
        self.rollouts, self.critiques = folder / "rollouts.jsonl", folder / "critiques.jsonl"
        self.tokenizer, self.out = folder / "tokenizer.json", folder / "shaped.parquet"
        self.rejects = folder / "shaped.parquet.rejected.jsonl"

    def write(self, rollouts, critiques):
        for path, rows in ((self.rollouts, rollouts), (self.critiques, critiques)):
            path.write_bytes(
                b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)
            )

    def arguments(self, *more):
        return [
            "score", str(self.rollouts), "--critiques", str(self.critiques), "--tokenizer", str(self.tokenizer),
            "--out", str(self.out), "--delimiter", "|", *more,
        ]  # fmt: skip

    def run(self, *more):
        return CliRunner().invoke(app, self.arguments(*more))

    def rows(self):
        return {row["response_id"]: row for row in pq.read_table(self.out).to_pylist()}

    def rejected(self):
        return [json.loads(line) for line in self.rejects.read_text().splitlines()] if self.rejects.exists() else []

    def leftovers(self):
        return [path.name for path in self.folder.iterdir() if path.name.endswith(".tmp")]


def by_id(table):
    return {row["response_id"]: row for row in table.to_pylist()}


# The golden vector of the paper's rule: steps of 2 + 2 tokens, the second flagged, right; 3 + 3 tokens, wrong.
GOLDEN = {
    "prompt": "p",
    "responses": [{"id": "a", "text": "ab|c", "outcome": 1}, {"id": "b", "text": "abc|de", "outcome": 0}],
}
GOLDEN_CRITIQUES = [
    {"response_id": "a", "critiques": [{"flagged": [1]}]},
    {"response_id": "b", "critiques": ["Judgment: Yes"]},
]
GOLDEN_ADVANTAGES = {"a": [1.75, 1.75, 0.5, 0.5], "b": [-0.75] * 6}


def advantages(rows):
    return {name: row["advantages"] for name, row in rows.items()}


# ---- end to end


def test_golden_vector_from_file_to_file(files):
    files.write([GOLDEN], GOLDEN_CRITIQUES)
    result = files.run()
    assert result.exit_code == 0, result.output
    rows = files.rows()
    assert advantages(rows) == GOLDEN_ADVANTAGES
    assert rows["a"] == {
        "response_id": "a",
        "prompt_index": 0,
        "response_index": 0,
        "group": 0,
        "group_id": None,
        "outcome": 1.0,
        "token_ids": ids("ab|c"),
        "advantages": [1.75, 1.75, 0.5, 0.5],
        "step_starts": [0, 2],
        "step_ends": [2, 4],
        "step_weights": [0.0, 1.0],
        "votes": [[0], [1]],
        "valid_critiques": 1,
        "invalid_critiques": 0,
        "failed_critiques": 0,
    }
    assert (rows["b"]["step_starts"], rows["b"]["step_ends"]) == ([0, 3], [3, 6])
    assert not files.rejects.exists() and not files.leftovers()


def test_the_table_has_the_documented_schema_and_says_what_made_it(files):
    files.write([GOLDEN], GOLDEN_CRITIQUES)
    score_file(files.rollouts, files.critiques, files.tokenizer, files.out, delimiter="|")
    table = pq.read_table(files.out)
    assert table.schema.equals(SCHEMA)
    made_with = json.loads(table.schema.metadata[b"capo"])
    assert made_with["delimiter"] == "|" and made_with["rule"]["outcome_weight"] == 2.0
    documented = (ROOT / "docs" / "score.md").read_text()
    assert all(f"`{name}`" in documented for name in SCHEMA.names)


def test_score_in_memory_is_score_file(files):
    table, summary, rejected = score([GOLDEN], GOLDEN_CRITIQUES, BYTES, delimiter="|")
    assert advantages(by_id(table)) == GOLDEN_ADVANTAGES and rejected == []
    assert (summary.responses, summary.tokens, summary.steps, summary.groups) == (2, 10, 4, 1)
    files.write([GOLDEN], GOLDEN_CRITIQUES)
    score_file(files.rollouts, files.critiques, BYTES, files.out, delimiter="|")
    assert pq.read_table(files.out).to_pylist() == table.to_pylist()


def test_the_same_input_gives_the_same_bytes(files):
    files.write([GOLDEN], GOLDEN_CRITIQUES)
    written = []
    for _ in range(2):
        score_file(files.rollouts, files.critiques, files.tokenizer, files.out, delimiter="|")
        written.append(files.out.read_bytes())
    assert written[0] == written[1]


# ---- ids and text


def refuse_to_encode(texts):
    raise AssertionError(f"encoded {texts}")


def test_token_ids_give_what_their_text_gives_and_are_never_encoded():
    tokenizer = Tokenizer(load_tokenizer(BYTES).token_bytes, refuse_to_encode)
    rows = [
        {**GOLDEN, "responses": [{**each, "token_ids": ids(each["text"])} for each in GOLDEN["responses"]]},
    ]
    of_ids = score(rows, GOLDEN_CRITIQUES, tokenizer, delimiter="|").table
    assert of_ids.equals(score([GOLDEN], GOLDEN_CRITIQUES, BYTES, delimiter="|").table)


def test_where_ids_and_text_differ_the_ids_are_true_and_it_is_counted(files):
    row = {"prompt": "p", "responses": [{"id": "a", "text": "no|such|steps", "token_ids": ids("ab|c"), "outcome": 1},
                                        {"id": "b", "text": " é|c", "token_ids": [*ids("é|c"), END], "outcome": 1},
                                        {"id": "c", "text": "é|c", "token_ids": ids("é| c"), "outcome": 0}]}  # fmt: skip
    table, summary, _ = score([row], [], BYTES, delimiter="|")
    only, *_ = table.to_pylist()
    assert only["token_ids"] == ids("ab|c") and only["step_ends"] == [2, 4]
    assert summary.other_text == 2
    files.write([row], [])
    assert "ids spell another text │ 2 responses" in files.run().stdout
    assert score([GOLDEN], [], BYTES, delimiter="|").summary.other_text == 0


def test_ids_that_no_text_encodes_to_are_kept():
    merged = byte_level(["aaaa aaaa aaaa"] * 9, 300)
    token = merged.token_to_id("a")
    assert merged.encode("aaaa").ids != [token] * 4
    row = {"prompt": "p", "response": "aaaa", "token_ids": [token] * 4, "outcome": 1}
    assert score([row], [], merged).table.to_pylist()[0]["token_ids"] == [token] * 4


def test_text_is_encoded_in_one_call():
    calls = []

    def encode(texts):
        calls.append(list(texts))
        return [ids(text) for text in texts]

    tokenizer = Tokenizer(load_tokenizer(BYTES).token_bytes, encode)
    score([GOLDEN, {**GOLDEN, "responses": ["x|y", {"token_ids": ids("z"), "outcome": 0}]}], [], tokenizer)
    assert calls == [["ab|c", "abc|de", "x|y"]]


def test_a_byte_table_takes_ids_and_refuses_text():
    table = load_tokenizer(BYTES).token_bytes
    row = {"prompt": "p", "response": "a", "outcome": 1}
    with pytest.raises(InputError, match="no encoder; give token_ids"):
        score([row], [], table)
    assert len(score([{**row, "token_ids": [1]}], [], table).table) == 1


def test_an_end_token_joins_the_last_step_and_a_response_may_be_empty(tmp_path):
    BYTES.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    rows = [{"prompt": "p", "responses": [{"id": "a", "token_ids": [*ids("ab|c"), END], "outcome": 1},
                                          {"id": "b", "token_ids": [], "outcome": 0},
                                          {"id": "c", "text": "", "outcome": 0}]}]  # fmt: skip
    rows = by_id(score(rows, [], tmp_path, delimiter="|").table)
    assert rows["a"]["step_ends"] == [2, 5] and len(rows["a"]["advantages"]) == 5
    assert rows["b"]["advantages"] == rows["c"]["advantages"] == rows["b"]["step_starts"] == []


# ---- groups


def singles(row, **more):
    return [{"prompt": row["prompt"], **each, **more} for each in row["responses"]]


@pytest.mark.parametrize("more", [{}, {"group": 7}, {"prompt_id": "q"}], ids=["prompt", "group", "prompt_id"])
def test_rows_of_one_response_are_grouped(more):
    table = score(singles(GOLDEN, **more), GOLDEN_CRITIQUES, BYTES, delimiter="|").table
    assert advantages(by_id(table)) == GOLDEN_ADVANTAGES
    assert set(table["group"].to_pylist()) == {0}
    assert set(table["group_id"].to_pylist()) == {str(next(iter(more.values()))) if more else None}


def test_rows_with_responses_are_groups_of_their_own_though_prompts_are_equal():
    again = {**GOLDEN, "responses": [{**each, "id": each["id"] + "2"} for each in GOLDEN["responses"]]}
    assert score([GOLDEN, again], [], BYTES, delimiter="|").table["group"].to_pylist() == [0, 0, 1, 1]


def test_prompts_may_be_messages():
    chat = [{"role": "user", "content": "p"}]
    same = [{"content": "p", "role": "user"}]
    rows = singles({**GOLDEN, "prompt": chat})
    rows[1]["prompt"] = same
    table = score(rows, GOLDEN_CRITIQUES, BYTES, delimiter="|").table
    assert advantages(by_id(table)) == GOLDEN_ADVANTAGES


def random_records(seed, num_groups=40):
    """Rollout rows, critiques with flagged lists, and the steps of each response, from letters and bars."""
    rng = random.Random(seed)
    rows, critiques = [], []
    for group in range(num_groups):
        responses = []
        for number in range(rng.randint(1, 6)):
            steps = ["".join(rng.choices("abcdef", k=rng.randint(1, 9))) for _ in range(rng.randint(1, 7))]
            name = f"{group}.{number}"
            outcome = rng.choice([0, 1, 0, 1, None])
            responses.append({"id": name, "text": "|".join(steps), "outcome": outcome})
            votes = [
                {"flagged": [i for i in range(len(steps)) if rng.random() < 0.3]} if rng.random() < 0.8 else None
                for _ in range(rng.randint(0, 4))
            ]
            critiques.append({"response_id": name, "critiques": votes})
        rows.append({"prompt": f"p{group}", "responses": responses})
    rng.shuffle(critiques)
    return rows, critiques


def expected(row, critiques, rule):
    """Advantages of the responses of a row by capo.reference, from the texts alone."""
    given = {each["response_id"]: each["critiques"] for each in critiques}
    width = max(len(given[each["id"]]) for each in row["responses"])
    starts, ends, votes, cu_steps, cu_seqlens = [], [], [], [0], [0]
    for each in row["responses"]:
        place = cu_seqlens[-1]
        for number, step in enumerate(each["text"].split("|")):
            starts.append(place)
            place += len(step) + (number > 0)  # the bar belongs to the step after it
            ends.append(place)
            said = [-1 if c is None else int(number in c["flagged"]) for c in given[each["id"]]]
            votes.append(said + [-1] * (width - len(said)))
        cu_steps.append(len(starts))
        cu_seqlens.append(place)
    outcomes = torch.tensor([float("nan") if r["outcome"] is None else r["outcome"] for r in row["responses"]])
    tensors = (torch.tensor(values) for values in (starts, ends, cu_steps, cu_seqlens))
    groups = torch.zeros(len(row["responses"]), dtype=torch.int64)
    votes = torch.tensor(votes, dtype=torch.int8).reshape(len(starts), width)
    flat = reference.token_advantages(outcomes, votes, *tensors, groups, rule)
    return {r["id"]: flat[cu_seqlens[i] : cu_seqlens[i + 1]] for i, r in enumerate(row["responses"])}


@pytest.mark.parametrize("preset", _PRESETS)
def test_presets_equal_the_reference(preset):
    rule = CreditRule.preset(preset)
    rows, critiques = random_records(3)
    table = by_id(score(rows, critiques, BYTES, rule, delimiter="|").table)
    seen = 0
    for row in rows:
        for name, wanted in expected(row, critiques, rule).items():
            assert table[name]["advantages"] == pytest.approx(wanted.tolist(), rel=1e-5, abs=1e-6)
            seen += int((wanted != 0).sum())
    assert seen > 500


@pytest.mark.parametrize("vote", ["majority", "strict_majority", "intersection", "union", "average"])
def test_votes_are_counted_by_the_rule(vote):
    rows, critiques = random_records(4)
    rule = CreditRule(vote=vote)
    table = score(rows, critiques, BYTES, rule, delimiter="|").table
    votes = [row for response in table["votes"].to_pylist() for row in response]
    weights = [weight for response in table["step_weights"].to_pylist() for weight in response]
    wanted = [float(reference.step_weights(torch.tensor([row or [-1]], dtype=torch.int8), vote)) for row in votes]
    assert weights == pytest.approx(wanted) and len({tuple(row) for row in votes}) > 10


def test_small_chunks_and_scattered_groups_change_nothing_but_the_order(files, monkeypatch):
    rows, critiques = random_records(5)
    whole = score(rows, critiques, BYTES, delimiter="|")
    files.write(rows, critiques)
    monkeypatch.setattr(capo.score, "CHUNK_TOKENS", 50)
    summary = score_file(files.rollouts, files.critiques, BYTES, files.out, delimiter="|")
    assert pq.ParquetFile(files.out).num_row_groups > 10
    assert pq.read_table(files.out).to_pylist() == whole.table.to_pylist()
    assert {**vars(summary), "seconds": 0} == {**vars(whole.summary), "seconds": 0}

    scattered = [each for row in rows for each in singles(row)]
    random.Random(0).shuffle(scattered)
    files.write(scattered, critiques)
    again = score_file(files.rollouts, files.critiques, BYTES, files.out, delimiter="|")
    assert advantages(files.rows()) == advantages(by_id(whole.table))
    groups = pq.read_table(files.out)["group"].to_pylist()
    assert groups == sorted(groups) and len(set(groups)) == len(rows)
    assert (again.bad_rows, again.responses, again.kappa) == (0, summary.responses, pytest.approx(summary.kappa))


def test_rows_refused_before_a_second_reading_are_listed_once(files, monkeypatch):
    monkeypatch.setattr(capo.score, "CHUNK_TOKENS", 1)
    first, second = singles(GOLDEN)
    others = [{"prompt": name, "id": name, "text": "x", "outcome": 1} for name in "cdefg"]
    beyond = {"response_id": "c", "critiques": [{"flagged": [9]}]}
    files.write([b"{\n", first, *others, second], [*GOLDEN_CRITIQUES, beyond])
    assert files.run().exit_code == 1
    assert [(bad["line"], Path(bad["file"]).name) for bad in files.rejected()] == [
        (1, "rollouts.jsonl"),
        (3, "critiques.jsonl"),
    ]
    assert {name: advantages(files.rows())[name] for name in "ab"} == GOLDEN_ADVANTAGES


def mixed_records(seed):
    """Rollout rows and critiques of every kind, good and bad."""
    rows, critiques = random_records(seed, 60)
    rng = random.Random(seed)
    nonce = "5d2e81c09f3a"
    replies = ["Judgment: Yes", "Judgment: No", "<incorrect_steps>0</incorrect_steps>", "<incorrect_steps>0-9", "",
               "Judgment: No\n<incorrect_steps>0, step_1</incorrect_steps>", "<think>?</think>Judgement: **Yes**.",
               f"<incorrect_steps:{nonce}>0</incorrect_steps:{nonce}>", "é\nJudgment: Yes\nJudgment: No",
               "<incorrect_steps>x</incorrect_steps>", {"flagged": [0], "valid": False, "error": "why"}]  # fmt: skip
    for row in critiques:
        if rng.random() < 0.3:
            row["nonce"] = nonce
        if rng.random() < 0.6:
            texts = rng.choices(replies, k=rng.randint(0, 5))
            row["critiques"] = [
                {"text": each} if rng.random() < 0.5 and each in replies[:-1] else each for each in texts
            ]
    critiques += [
        {"response_id": "none", "critiques": []},
        {"critiques": []},
        {"response_id": "1.0", "critiques": [{}]},
    ]
    rng.shuffle(critiques)
    for row in rows:
        for each in row["responses"]:
            if rng.random() < 0.5:
                each["token_ids"] = ids(each.pop("text"))
            if rng.random() < 0.1:
                each["outcome"] = "bad"
            elif rng.random() < 0.2:
                del each["outcome"]
        if rng.random() < 0.3:
            row["answer"] = rng.choice(["18", 3])
    return [*rows, {"prompt": "alone", "text": "x|é|\U0001f642", "outcome": 0.5}, {"text": "x"}], critiques


def test_without_the_native_module_everything_is_the_same(monkeypatch):
    records = mixed_records(14)
    native = score(*records, BYTES, delimiter="|")
    for module in (capo.records, capo.critique):
        monkeypatch.setattr(module, "_native", None)
    plain = score(*records, BYTES, delimiter="|")
    assert plain.table.equals(native.table) and plain.rejected == native.rejected and plain.summary == native.summary


def test_the_output_is_bit_for_bit_what_it_was(files, monkeypatch):
    """Whoever changes what is written changes these digests, on purpose."""
    monkeypatch.setattr(capo.score, "CHUNK_TOKENS", 300)
    files.write(*mixed_records(13))
    for preset, digest in DIGESTS.items():
        rule = CreditRule.preset(preset)
        summary = score_file(files.rollouts, files.critiques, BYTES, files.out, rule, delimiter="|")
        rejected = sorted(
            (Path(bad["file"]).name, bad["line"], str(bad["response"]), bad["reason"][:40]) for bad in files.rejected()
        )
        counts = {name: value for name, value in vars(summary).items() if type(value) in (int, dict)}
        assert not counts.pop("undecided_reasons") and not counts.pop("other_text")
        assert summary.bad_rows > 20 and len(summary.parse_failures) == 8 and summary.uncritiqued and summary.undecided
        written = json.dumps([pq.read_table(files.out).to_pylist(), rejected, counts], sort_keys=True)
        assert hashlib.sha256(written.encode()).hexdigest()[:16] == digest, preset


DIGESTS = {"capo": "e0707013ad1a889a", "grpo_process": "864741dbb6ae7757", "fapo": "7a6769899d3997bf"}


# ---- outcomes


def test_outcomes_given_undecided_verified_and_unknown():
    answers = {"prompt": "p", "answer": "18", "responses": [
        {"id": "right", "token_ids": ids("so #### 18")},
        {"id": "wrong", "text": "so #### 17"},
        {"id": "none", "text": "so #### 18", "outcome": None},
        {"id": "given", "text": "so #### 18", "outcome": 0.25},
        {"id": "true", "text": "so", "outcome": True},
    ]}  # fmt: skip
    unknown = {"prompt": "q", "responses": [{"id": "open", "text": "so #### 18"}]}
    table, summary, _ = score([answers, unknown], [], BYTES)
    outcomes = {row["response_id"]: row["outcome"] for row in table.to_pylist()}
    assert outcomes == {"right": 1, "wrong": 0, "none": None, "given": 0.25, "true": 1, "open": None}
    assert (summary.right, summary.wrong, summary.undecided) == (3, 1, 2)
    rows = by_id(table)
    assert set(rows["none"]["advantages"]) == set(rows["open"]["advantages"]) == {0.0}
    assert summary.zero_signal_groups == 1


@pytest.mark.parametrize(
    "key", ["answer", "reference", "solution", "label", pytest.param("reward_model", id="reward_model.ground_truth")]
)
def test_answers_have_aliases(key):
    answer = {"style": "rule", "ground_truth": "18"} if key == "reward_model" else 18
    row = {"prompt": "p", key: answer, "responses": ["#### 18", "#### 19"]}
    assert score([row], [], BYTES).table["outcome"].to_pylist() == [1.0, 0.0]


def test_undecided_responses_leave_their_group():
    three = {**GOLDEN, "responses": [*GOLDEN["responses"], {"id": "u", "text": "abcdefgh", "outcome": None}]}
    rows = by_id(score([three], GOLDEN_CRITIQUES, BYTES, delimiter="|").table)
    assert advantages(rows) == {**GOLDEN_ADVANTAGES, "u": [0.0] * 8}


# ---- critiques


def test_every_form_of_a_critique():
    nonce, other = "5d2e81c09f3a", "0c7d77a1b2e4"
    critiques = [{"response_id": "a", "nonce": nonce, "critiques": [
        f"Judgment: No\n<incorrect_steps:{nonce}>0</incorrect_steps:{nonce}>",
        {"text": f"Judgment: No\n<incorrect_steps:{other}>step_1</incorrect_steps:{other}>", "nonce": other},
        {"text": "Judgment: Yes"},
        {"flagged": [0, 1, 0]},
        {"flagged": [], "valid": True},
        {"flagged": [0], "valid": False, "error": "too_long"},
        {"flagged": [], "valid": False},
        f"Judgment: No\n<incorrect_steps:{other}>0</incorrect_steps:{other}>",  # another prompt's nonce
        "I refuse",
        None,
        {"text": None},
    ]}]  # fmt: skip
    table, summary, _ = score([GOLDEN], critiques, BYTES, delimiter="|")
    row = by_id(table)["a"]
    assert row["votes"] == [[1, 0, 0, 1, 0, -1, -1, -1, -1, -1, -1], [0, 1, 0, 1, 0, -1, -1, -1, -1, -1, -1]]
    assert [row[f"{state}_critiques"] for state in ("valid", "invalid", "failed")] == [5, 4, 2]
    assert summary.parse_failures == {"too_long": 1, "marked_invalid": 1, "no_list": 1, "no_answer": 1}
    assert summary.critiques == {"valid": 5, "invalid": 4, "failed": 2} and summary.uncritiqued == 1


def test_plain_critiques_are_read_natively_as_in_python(monkeypatch):
    """Alone and after another one: what one reads, or the error that one gives, is that of the other."""
    half, digits = "\ud800", "\u0661" * 4
    nonces = [None, "0aZ9", "0" * 64, "0" * 65, "abc", "ab-d", "äbcd", digits, "", half * 4, 5, True]
    values = [None, "", "x", half, 0, 1, 2, -1, 2**70, True, False, 1.0, [], [0, 1], [2], [True], [2**70], ["0"], {}]
    items = [*values, *({"text": value} for value in values), *({"flagged": value} for value in values)]
    items += [{"text": "x", "nonce": nonce} for nonce in nonces]
    items += [{"valid": valid, "error": error} for valid in (True, False, None, 1) for error in values]
    items += [{"valid": valid, "flagged": [1]} for valid in (True, False, None, 1)]

    def outcome(given, nonce):
        try:
            return capo.records.critiques_of({"critiques": given, "nonce": nonce}, 2, None)
        except capo.records.BadRow as error:
            return str(error)

    cases = [(given, nonce) for nonce in nonces for item in items for given in ([item], ["y", item])]
    native = [outcome(*case) for case in cases]
    monkeypatch.setattr(capo.records, "_native", None)
    assert [outcome(*case) for case in cases] == native
    assert 100 < sum(isinstance(one, str) for one in native) < len(native) - 100


def test_responses_may_be_named_by_position():
    rows = [
        {"prompt": "x", "responses": ["q"]},
        {**GOLDEN, "responses": [{**r, "id": None} for r in GOLDEN["responses"]]},
    ]
    critiques = [
        {"prompt_index": 1, "response_index": 1, "critiques": ["Judgment: Yes"]},
        {"response_id": "1/0", "critiques": [{"flagged": [1]}]},
    ]
    rows = by_id(score(rows, critiques, BYTES, delimiter="|").table)
    assert (rows["1/0"]["advantages"], rows["1/1"]["advantages"]) == tuple(GOLDEN_ADVANTAGES.values())


def test_num_votes_pads_and_limits():
    critiques = [*GOLDEN_CRITIQUES[:1], {"response_id": "b", "critiques": [{"flagged": []}] * 3}]
    table, _, rejected = score([GOLDEN], critiques, BYTES, delimiter="|", num_votes=2)
    rows = by_id(table)
    assert rows["a"]["votes"] == [[0, -1], [1, -1]] and rows["b"]["votes"] == [[-1, -1]] * 2
    assert [bad.reason for bad in rejected] == ["3 critiques, but there are to be 2 votes"]
    ragged = by_id(score([GOLDEN], critiques, BYTES, delimiter="|").table)
    assert ragged["a"]["votes"] == [[0], [1]] and ragged["b"]["votes"] == [[0, 0, 0]] * 2


def test_a_rule_without_steps_needs_no_critiques_and_is_not_moved_by_them():
    rule = CreditRule(process_weight=0)
    rows, critiques = random_records(6)
    with_votes = score(rows, critiques, BYTES, rule, delimiter="|").table
    without = score(rows, None, BYTES, rule, delimiter="|").table
    assert with_votes["advantages"].equals(without["advantages"])
    with pytest.raises(InputError, match="there are no critiques"):
        score(rows, None, BYTES, delimiter="|")


def test_abstentions_reward_and_punish_nothing():
    silent = [{"response_id": "a", "critiques": [None, "what?"]}]
    table = score([GOLDEN], silent, BYTES, delimiter="|").table
    assert table["advantages"].equals(score([GOLDEN], [], BYTES, delimiter="|").table["advantages"])


def test_a_response_without_steps_needs_no_critiques():
    row = {
        "prompt": "p",
        "responses": [{"text": " ", "outcome": 1}, {"text": "", "outcome": 0}, {"text": "a", "outcome": 0}],
    }
    assert score([row], [], BYTES).summary.uncritiqued == 1


def test_outcomes_below_zero_are_wrong():
    row = {"prompt": "p", "responses": [{"text": "a", "outcome": value} for value in (-1, 0, 0.5)]}
    summary = score([row], [], BYTES).summary
    assert (summary.right, summary.wrong, summary.undecided) == (1, 2, 0)


# ---- rows that cannot be used

BAD = {"prompt": "p", "id": "bad", "text": "ab|c", "outcome": 1}
BAD_ROWS = {
    "broken": (b'{"prompt": "p", \n', "not valid JSON"),
    "late-bom": (b'\xef\xbb\xbf{"prompt": "p", "text": "a", "outcome": 1}\n', "not valid JSON"),
    "no-object": (["prompt"], "a row must be an object, got a list"),
    "not-utf-8": (b'{"prompt": "p", "text": "\xff"}\n', "UTF-8"),
    "deep": (b"[" * 100_000 + b"\n", "not valid JSON"),
    "half-a-character": (b'{"prompt": "p", "text": "\\ud800", "outcome": 1}\n', "not valid JSON"),
    "no-prompt": ({"text": "a", "outcome": 1}, r"missing key: prompt \(or group\)"),
    "null-prompt": ({**BAD, "prompt": None}, "missing key: prompt"),
    "prompt-type": ({**BAD, "prompt": 3}, "prompt must be a string or a list of messages, got an integer"),
    "group-type": ({**BAD, "group": [1]}, "group must be a string or an integer, got a list"),
    "group-bool": ({**BAD, "group": True}, "group must be a string or an integer, got a boolean"),
    "responses-type": ({"prompt": "p", "responses": "ab"}, "responses must be a list, got a string"),
    "responses-empty": ({"prompt": "p", "responses": []}, "responses is empty"),
    "response-type": ({"prompt": "p", "responses": [3]}, "a response must be an object or a string, got an integer"),
    "response-null": ({"prompt": "p", "responses": [None]}, "a response must be an object or a string, got null"),
    "no-text": ({"prompt": "p", "outcome": 1}, "missing key: a response needs token_ids or text"),
    "null-text": ({**BAD, "text": None}, "missing key: a response needs token_ids or text"),
    "text-type": ({**BAD, "text": 5}, "the text of a response must be a string, got an integer"),
    "id-type": ({**BAD, "id": 1.5}, "id must be a string or an integer, got a number"),
    "answer-type": ({**BAD, "answer": [1]}, "answer must be a string or a number, got a list"),
    "outcome-type": ({**BAD, "outcome": "1"}, "outcome must be a number or null, got a string"),
    "outcome-nan": (b'{"prompt": "p", "text": "a", "outcome": NaN}\n', "outcome must be finite, got nan"),
    "outcome-inf": (b'{"prompt": "p", "text": "a", "outcome": -Infinity}\n', "outcome must be finite, got -inf"),
    "outcome-huge": ({**BAD, "outcome": 1e39}, "outcome must be finite"),
    "ids-type": ({**BAD, "token_ids": "12"}, "token_ids must be a list, got a string"),
    "ids-float": ({**BAD, "token_ids": [1, 2.0]}, "token_ids must be integers, got a number at position 1"),
    "ids-bool": ({**BAD, "token_ids": [True]}, "token_ids must be integers, got a boolean at position 0"),
    "ids-null": ({**BAD, "token_ids": [1, None]}, "token_ids must be integers, got null at position 1"),
    "ids-negative": ({**BAD, "token_ids": [0, -1]}, "token id -1 at position 1 is outside"),
    "ids-beyond": ({**BAD, "token_ids": [VOCABULARY]}, f"{VOCABULARY} at position 0 is outside the vocabulary of"),
    "ids-2**63": ({**BAD, "token_ids": [2**63]}, "is outside the vocabulary"),
    "logprobs": ({**BAD, "token_ids": [1, 2], "logprobs": [0.0]}, "1 logprobs for 2 token_ids"),
    "logprobs-of-text": ({**BAD, "logprobs": [0.0] * 5}, "5 logprobs, but the text has 4 tokens"),
    "logprobs-type": ({**BAD, "logprobs": 1}, "logprobs must be a list, got an integer"),
    "duplicate": ({**BAD, "id": "a"}, "response id 'a' was there before"),
}


@pytest.mark.parametrize("bad, reason", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_and_kept_and_the_others_are_scored(files, bad, reason):
    files.write([GOLDEN, b"\n", bad], GOLDEN_CRITIQUES)
    result = files.run()
    assert result.exit_code == 1, result.output
    assert advantages(files.rows()) == GOLDEN_ADVANTAGES
    (rejected,) = files.rejected()
    assert rejected["line"] == 3 and rejected["file"] == str(files.rollouts)
    assert re.search(reason, rejected["reason"])
    assert f"{files.rollouts}:3" in result.stderr
    raw = files.rollouts.read_bytes().splitlines()[2]
    if "row_base64" in rejected:
        assert base64.b64decode(rejected["row_base64"]) == raw
    elif isinstance(rejected["row"], str):
        assert rejected["row"].encode() == raw
    elif b"NaN" not in raw and b"Infinity" not in raw:
        assert rejected["row"] == json.loads(raw)


def test_a_bad_response_is_left_out_of_its_group(files):
    three = {**GOLDEN, "responses": [{"id": "x", "text": "xyz", "outcome": float("nan")}, *GOLDEN["responses"]]}
    files.write([three], GOLDEN_CRITIQUES)
    assert files.run().exit_code == 1
    assert advantages(files.rows()) == GOLDEN_ADVANTAGES
    (rejected,) = files.rejected()
    assert (rejected["line"], rejected["response"]) == (1, 0)
    assert [each["id"] for each in rejected["row"]["responses"]] == ["x"]


BAD_CRITIQUES = {
    "broken": (b"{\n", "not valid JSON"),
    "no-object": ([], "a row must be an object, got a list"),
    "not-utf-8": (b'{"response_id": "\xff", "critiques": []}\n', "UTF-8"),
    "no-id": ({"critiques": []}, "missing key: response_id, or prompt_index and response_index"),
    "half-a-place": ({"prompt_index": 0, "critiques": []}, "missing key"),
    "id-type": ({"response_id": [], "critiques": []}, "response_id must be a string or an integer, got a list"),
    "place-bool": ({"prompt_index": True, "response_index": 0, "critiques": []}, "must be integers, got a boolean"),
    "place-type": ({"prompt_index": "0", "response_index": 0, "critiques": []}, "must be integers, got a string"),
    "no-critiques": ({"response_id": "c"}, "critiques must be a list, got null"),
    "critiques-type": ({"response_id": "c", "critiques": "Judgment: Yes"}, "critiques must be a list, got a string"),
    "unknown": ({"response_id": "z", "critiques": []}, "a response that is not there"),
    "unknown-place": ({"prompt_index": 5, "response_index": 0, "critiques": []}, "a response that is not there"),
    "twice": ({"response_id": "a", "critiques": []}, "critiques of this response are in line 1 already"),
    "twice-by-place": ({"prompt_index": 0, "response_index": 0, "critiques": []}, "has others already"),
    "item-type": (
        {"response_id": "c", "critiques": [3]},
        "critique 0: must be text, an object or null, got an integer",
    ),
    "text-type": ({"response_id": "c", "critiques": [{"text": 3}]}, "critique 0: text must be a string"),
    "nonce-type": ({"response_id": "c", "nonce": 3, "critiques": ["x"]}, "critique 0: nonce must be a string"),
    "nonce": ({"response_id": "c", "nonce": "<>", "critiques": ["x"]}, "critique 0: nonce must be 4 to 64"),
    "no-flagged": ({"response_id": "c", "critiques": [None, {}]}, "critique 1: needs text or a list of flagged steps"),
    "flagged-type": ({"response_id": "c", "critiques": [{"flagged": ["1"]}]}, "flagged must hold integers"),
    "flagged-bool": ({"response_id": "c", "critiques": [{"flagged": [True]}]}, "flagged must hold integers"),
    "valid-type": ({"response_id": "c", "critiques": [{"valid": "false"}]}, "valid must be true or false"),
    "beyond": (
        {"response_id": "c", "critiques": [{"flagged": [2]}]},
        "step 2 is flagged, but the response has 2 steps",
    ),
    "negative": ({"response_id": "c", "critiques": [{"flagged": [-1]}]}, "step -1 is flagged"),
}


@pytest.mark.parametrize("bad, reason", BAD_CRITIQUES.values(), ids=BAD_CRITIQUES)
def test_bad_critiques_are_named_and_cost_their_response_its_votes_only(files, bad, reason):
    extra = {"prompt": "other", "id": "c", "text": "ab|c", "outcome": 1}
    files.write([GOLDEN, extra], [*GOLDEN_CRITIQUES, bad])
    result = files.run()
    assert result.exit_code == 1, result.output
    rows = files.rows()
    assert rows.pop("c")["votes"] == [[], []]
    assert advantages(rows) == GOLDEN_ADVANTAGES
    (rejected,) = files.rejected()
    assert rejected["line"] == 3 and rejected["file"] == str(files.critiques)
    assert re.search(reason, rejected["reason"])


def test_two_rows_of_critiques_of_one_response_leave_it_the_first(files):
    """Both are known when the response comes, as the response before it has its critiques behind them."""
    by_place = {"prompt_index": 0, "response_index": 1, "critiques": [{"flagged": [0, 1]}]}
    files.write(
        [{**GOLDEN, "responses": GOLDEN["responses"][::-1]}], [GOLDEN_CRITIQUES[0], by_place, GOLDEN_CRITIQUES[1]]
    )
    assert files.run().exit_code == 1
    assert advantages(files.rows()) == GOLDEN_ADVANTAGES
    (rejected,) = files.rejected()
    assert (rejected["line"], rejected["reason"]) == (2, "a second row of critiques of response a")


@pytest.mark.parametrize("change", [{"num_votes": 0}, {"num_votes": -1}, {"delimiter": ""}])
def test_wrong_arguments_in_memory_are_named(change):
    ((name, _),) = change.items()
    with pytest.raises(InputError, match=name):
        score([GOLDEN], [], BYTES, **change)


def test_records_in_memory_may_be_no_json():
    bad = [{**BAD, "text": "\ud800"}, {**BAD, "id": "\ud800"}, {**BAD, "prompt": "\ud800"}, {**BAD, "prompt": [b"x"]}]
    table, _, rejected = score([*bad, BAD], [], BYTES)
    assert len(table) == 1 and len(rejected) == 4
    assert all("half a character" in each.reason for each in rejected[:3]) and "not JSON" in rejected[3].reason


def test_every_row_may_be_bad(files):
    files.write([b"{\n", b"}\n"], [])
    assert files.run().exit_code == 1
    assert pq.read_table(files.out).num_rows == 0 and len(files.rejected()) == 2


def test_empty_files_are_scored(files):
    files.write([], [])
    assert files.run().exit_code == 0
    assert pq.read_table(files.out).schema.equals(SCHEMA)


def test_byte_order_marks_line_ends_and_blank_lines_are_no_matter(files):
    files.write([b"\xef\xbb\xbf" + json.dumps(GOLDEN).encode() + b"\r\n", b"  \r\n"], GOLDEN_CRITIQUES)
    assert files.run().exit_code == 0
    assert advantages(files.rows()) == GOLDEN_ADVANTAGES


def test_ten_bad_rows_are_shown_and_all_are_listed(files):
    files.write([GOLDEN, *[b"{\n"] * 25], GOLDEN_CRITIQUES)
    result = files.run()
    assert result.stderr.count("not valid JSON") == 10 and "25 rows were refused" in result.stderr
    assert len(files.rejected()) == 25


def test_numbers_of_any_size_and_nan_in_one_row_are_no_json(files):
    files.write([GOLDEN, b'{"prompt": "p", "text": "a", "outcome": 1, "x": NaN, "y": ' + b"9" * 400 + b"}\n",
                 b'{"prompt": "p", "text": "\\ud800", "x": NaN}\n'], GOLDEN_CRITIQUES)  # fmt: skip
    assert files.run().exit_code == 1
    assert ["not valid JSON" in bad["reason"] for bad in files.rejected()] == [True, True]


def test_a_listing_of_refused_rows_does_not_outlive_them(files):
    files.write([GOLDEN, b"{\n"], GOLDEN_CRITIQUES)
    assert files.run().exit_code == 1 and files.rejects.exists()
    files.write([GOLDEN], GOLDEN_CRITIQUES)
    assert files.run().exit_code == 0 and not files.rejects.exists()


def test_parquet_rollouts(files):
    files.write([GOLDEN], GOLDEN_CRITIQUES)
    rows = [
        {"prompt": "p", "id": "a", "token_ids": ids("ab|c"), "outcome": 1.0, "reward_model": {"ground_truth": "1"}},
        {"prompt": "p", "id": "n", "token_ids": ids("ab|c"), "outcome": float("nan"), "reward_model": None},
        {"prompt": "p", "id": "b", "token_ids": ids("abc|de"), "outcome": 0.0, "reward_model": None},
    ]
    files.rollouts = files.folder / "rollouts.parquet"
    pq.write_table(pa.Table.from_pylist(rows), files.rollouts)
    assert files.run().exit_code == 1
    assert advantages(files.rows()) == GOLDEN_ADVANTAGES
    assert [(bad["line"], bad["reason"][:22]) for bad in files.rejected()] == [(2, "outcome must be finite")]


# ---- summary


def test_summary(files):
    rows, critiques = random_records(7)
    critiques[0]["critiques"] = ["I refuse", None]
    files.write(rows, critiques)
    out = files.folder / "summary.json"
    result = files.run("--summary", str(out))
    assert result.exit_code == 0, result.output
    summary = json.loads(out.read_text())
    table = pq.read_table(files.out).to_pylist()

    lists = [[step for step in row["votes"]] for row in table]
    width = max(len(step) for steps in lists for step in steps)
    flat = torch.tensor([step + [-1] * (width - len(step)) for steps in lists for step in steps], dtype=torch.int8)
    wanted = agreement(flat)
    assert summary["kappa"] == pytest.approx(wanted.kappa) and abs(wanted.kappa) < 0.2
    assert summary["vote_agreement"] == pytest.approx(wanted.agreement)
    assert summary["flag_rate"]["all"] == pytest.approx(wanted.flag_rate)
    for name, member in (("right", 1.0), ("wrong", 0.0), ("undecided", None)):
        votes = [v for row in table if row["outcome"] == member for step in row["votes"] for v in step if v >= 0]
        assert summary["flag_rate"][name] == pytest.approx(sum(votes) / len(votes))
        assert summary[name] == sum(row["outcome"] == member for row in table)
    dead = {row["group"] for row in table} - {row["group"] for row in table if any(row["advantages"])}
    assert summary["zero_signal_groups"] == len(dead) > 0
    assert summary["parse_failures"] == {"no_answer": 1}
    assert summary["steps"] == len(flat) and summary["tokens"] == sum(len(row["token_ids"]) for row in table)
    assert f"{summary['responses']:,} in {summary['groups']:,} groups" in result.stdout
    assert "no_answer 1" in result.stdout


def test_votes_of_many_chunks_are_summed_up(monkeypatch):
    rows, critiques = random_records(8)
    whole = score(rows, critiques, BYTES, delimiter="|").summary
    monkeypatch.setattr(capo.score, "CHUNK_TOKENS", 1)
    assert score(rows, critiques, BYTES, delimiter="|").summary == whole


# ---- exit codes, failures


USAGE_ERRORS = {
    "no-rollouts": ("rollouts", "{}/none.jsonl", "none.jsonl does not exist"),
    "rollouts-folder": ("rollouts", "{}", "is not a file"),
    "no-critiques": ("--critiques", "{}/none.jsonl", "none.jsonl does not exist"),
    "no-tokenizer": ("--tokenizer", "{}/none", "no tokenizer at"),
    "bad-tokenizer": ("--tokenizer", "{}/critiques.jsonl", "is no tokenizer.json"),
    "bad-parquet": ("rollouts", "{}/no.parquet", "is not a parquet file"),
    "out-folder": ("--out", "{}", "is a directory"),
    "out-nowhere": ("--out", "{}/none/out.parquet", "is not a directory"),
    "out-in-file": ("--out", "{}/tokenizer.json/out.parquet", "is not a directory"),
    "out-is-input": ("--out", "{}/rollouts.jsonl", "would overwrite"),
    "summary-is-out": ("--summary", "{}/shaped.parquet", "would overwrite"),
    "rule": ("--rule", "cappo", "--rule must be one of capo"),
    "vote": ("--vote", "most", "--vote must be one of"),
    "weight": ("--process-weight", "-1", "--process-weight must be finite and at least 0, got -1.0"),
    "outcome": ("--outcome-weight", "nan", "--outcome-weight must be finite and at least 0, got nan"),
    "vocabulary": ("--vocab-size", "3", f"--vocab-size is 3, but there are {VOCABULARY} tokens"),
    "delimiter": ("--delimiter", "", "the delimiter is empty"),
    "eos": ("--eos-id", "100000", "--eos-id has 100000"),
    "text": ("--tokenizer", "{}/bytes.tiktoken", "given as text and cannot be encoded: bytes.tiktoken is a tiktoken"),
}


@pytest.mark.parametrize("option, value, message", USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_wrong_arguments_are_named_and_nothing_is_written(files, option, value, message):
    files.write([GOLDEN], GOLDEN_CRITIQUES)
    (files.folder / "no.parquet").write_bytes(b"PAR0")
    write_tiktoken(files.folder / "bytes.tiktoken")
    files.out.write_text("before")
    before = {path.name: path.read_bytes() for path in files.folder.iterdir()}
    given = {"rollouts": str(files.rollouts), "--critiques": str(files.critiques),
             "--tokenizer": str(files.tokenizer), "--out": str(files.out), "--delimiter": "|"}  # fmt: skip
    given[option] = value.format(files.folder)
    rollouts = given.pop("rollouts")
    result = CliRunner().invoke(app, ["score", rollouts, *(part for pair in given.items() for part in pair)])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
    assert {path.name: path.read_bytes() for path in files.folder.iterdir()} == before


@pytest.mark.parametrize("more", [["--num-votes", "0"], ["--nonsense"], ["--outcome-weight", "x"]])
def test_the_command_line_parser_refuses(files, more):
    files.write([GOLDEN], GOLDEN_CRITIQUES)
    assert files.run(*more).exit_code == 2 and not files.out.exists()


def test_without_critiques_the_rule_must_not_need_them(files):
    files.write([GOLDEN], [])
    arguments = files.arguments()
    del arguments[2:4]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UsageError) and "process weight of 0" in str(result.exception)
    assert CliRunner().invoke(app, [*arguments, "--rule", "grpo"]).exit_code == 0
    assert files.rows()["b"]["advantages"] == pytest.approx([-(0.5**0.5)] * 6)


def test_options_reach_the_rule(files):
    files.write([GOLDEN], [])
    options = ["--rule", "dr_grpo", "--process-weight", "0.5", "--outcome-weight", "3", "--vote", "union"]
    assert files.run(*options, "--delimiter", r"\n", "--num-votes", "3").exit_code == 0
    made_with = json.loads(pq.read_schema(files.out).metadata[b"capo"])
    assert (made_with["delimiter"], made_with["num_votes"]) == ("\n", 3)
    rule = CreditRule.preset("dr_grpo", process_weight=0.5, outcome_weight=3.0, vote="union")
    assert CreditRule(**made_with["rule"]) == rule


def run_capo(arguments, **more):
    command = [sys.executable, "-m", "capo.cli", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, **more)


def test_exit_codes_of_the_process(files):
    files.write([GOLDEN], GOLDEN_CRITIQUES)
    good = run_capo(files.arguments(), stdin=subprocess.DEVNULL)
    assert (good.returncode, good.stderr) == (0, "")
    assert "2 in 1 groups" in good.stdout
    files.critiques.unlink()
    wrong = run_capo(files.arguments())
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1


def test_locale_and_optimisation_change_nothing(files):
    environment = {**os.environ, "LANG": "C", "LC_ALL": "C", "PYTHONOPTIMIZE": "1", "PYTHONHASHSEED": "7"}
    files.write([{**GOLDEN, "prompt": "ü"}, b"{\n"], GOLDEN_CRITIQUES)
    bad = run_capo(files.arguments(), env=environment)
    assert bad.returncode == 1 and "1 rows were refused" in bad.stderr and "Traceback" not in bad.stderr
    assert advantages(files.rows()) == GOLDEN_ADVANTAGES


def test_help_is_quick_and_teaches():
    code = "import sys; from capo.cli import app\ntry: app()\nfinally: print({'torch', 'pyarrow'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code, "score", "--help"], capture_output=True, text=True, check=True)
    assert result.stdout.rstrip().endswith("set()")
    assert "--critiques critiques.jsonl" in result.stdout and "Exit code" in result.stdout


def test_a_closed_pipe_is_no_traceback(files):
    files.write([GOLDEN], GOLDEN_CRITIQUES)
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, "-m", "capo.cli", *files.arguments()], stdout=write, check=False,
                            stderr=subprocess.PIPE, text=True, timeout=120)  # fmt: skip
    os.close(write)
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr
    assert advantages(files.rows()) == GOLDEN_ADVANTAGES


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("broken")], ids=["disk", "bug"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_failure_leaves_the_old_output_and_nothing_else(files, monkeypatch, error, after):
    rows, critiques = random_records(9)
    files.write([*rows, b"{\n"], critiques)
    files.out.write_text("before")
    files.rejects.write_text("before, too")
    monkeypatch.setattr(capo.score, "CHUNK_TOKENS", 50)
    write = pq.ParquetWriter.write_batch
    written = []

    def fail(self, batch, *rest):
        written.append(batch)
        if len(written) > after:
            raise error
        return write(self, batch, *rest)

    monkeypatch.setattr(pq.ParquetWriter, "write_batch", fail)
    with pytest.raises(type(error)):
        score_file(files.rollouts, files.critiques, BYTES, files.out, delimiter="|")
    assert len(written) == after + 1
    assert (files.out.read_text(), files.rejects.read_text()) == ("before", "before, too")
    assert not files.leftovers()


def test_the_old_output_stays_until_the_new_one_is_whole(files, monkeypatch):
    files.write([GOLDEN], GOLDEN_CRITIQUES)
    files.out.write_text("before")
    replaced = []
    replace = os.replace

    def watch(source, target):
        assert files.out.read_text() == "before"
        assert pq.read_table(source).num_rows == 2
        replaced.append(Path(target))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    score_file(files.rollouts, files.critiques, BYTES, files.out, delimiter="|")
    assert replaced == [files.out] and len(files.rows()) == 2


def test_files_are_on_the_disk_before_they_have_their_names(files, monkeypatch):
    files.write([GOLDEN, b"{\n"], GOLDEN_CRITIQUES)
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("synced"), sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append(Path(paths[1]).name), replace(*paths)))
    score_file(files.rollouts, files.critiques, BYTES, files.out, delimiter="|", summary=files.folder / "s.json")
    assert done == ["synced", "s.json", "synced", files.rejects.name, "synced", files.out.name]
    assert json.loads((files.folder / "s.json").read_text())["seconds"] > 0


def test_garbage_collection_is_on_again(files):
    import gc

    files.write([GOLDEN], GOLDEN_CRITIQUES)
    score_file(files.rollouts, files.critiques, BYTES, files.out, delimiter="|")
    assert gc.isenabled()


def test_progress_ends_at_the_end(files):
    files.write([GOLDEN] + [{"prompt": str(i), "id": str(i), "text": "a", "outcome": 1} for i in range(600)], [])
    seen = []
    score_file(files.rollouts, files.critiques, BYTES, files.out, progress=lambda *given: seen.append(given))
    shares = [share for share, _, _ in seen]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1 and len(shares) > 2


# ---- tokenizers


def write_tiktoken(path):
    """The single bytes, and one merge: two letters a."""
    pieces = [bytes([byte]) for byte in range(256)] + [b"aa"]
    path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % i for i, piece in enumerate(pieces)))
    return path


def test_tiktoken_files(files):
    path = write_tiktoken(files.folder / "some.model")
    row = {"prompt": "p", "id": "a", "token_ids": [256, *b"|bc", 300], "outcome": 1}
    (refused,) = score([row], [], load_tokenizer(path), delimiter="|").rejected
    assert "token id 300 at position 4 is outside the vocabulary of 257" in refused.reason
    tokenizer = load_tokenizer(path, num_tokens=301, eos_ids=[300])
    assert score([row], [], tokenizer, delimiter="|").table.to_pylist()[0]["step_ends"] == [1, 5]
    no_end = load_tokenizer(path, num_tokens=301)
    assert score([row], [], no_end, delimiter="|").table.to_pylist()[0]["step_ends"] == [1, 4]

    pytest.importorskip("tiktoken")
    files.tokenizer = path
    files.write([{"prompt": "p", "id": "a", "text": "aaa|<|x|>é", "outcome": 1}], [])
    assert files.run("--tiktoken-pattern", r"[^|]+|\|", "--vocab-size", "301", "--eos-id", "300").exit_code == 0
    assert files.rows()["a"]["token_ids"] == [256, *"a|<|x|>é".encode()]


def test_a_saved_tokenizer_neither_cuts_nor_pads_responses():
    cutting = byte_level()
    cutting.enable_truncation(2)
    cutting.enable_padding()
    rows = by_id(score([GOLDEN], [], cutting, delimiter="|").table)
    assert rows["a"]["token_ids"] == ids("ab|c") and rows["b"]["token_ids"] == ids("abc|de")
    assert cutting.truncation["max_length"] == 2


def test_ends_are_read_beside_the_tokenizer(tmp_path):
    BYTES.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).token_bytes.eos.sum() == 0
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, 0]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    assert load_tokenizer(tmp_path / "tokenizer.json").token_bytes.eos.nonzero()[:, 0].tolist() == [0, END]
    assert load_tokenizer(tmp_path, eos_ids=[3]).token_bytes.eos.nonzero()[:, 0].tolist() == [3]


def test_a_name_that_is_no_tokenizer_is_shown(monkeypatch):
    transformers = pytest.importorskip("transformers")

    def unknown(name, **options):
        assert options == {"trust_remote_code": False}
        raise OSError("cannot connect")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unknown)
    with pytest.raises(ValueError, match="no tokenizer 'some/model': it is no file or folder here.*cannot connect"):
        load_tokenizer("some/model")


def test_tokenizers_of_transformers():
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=BYTES, eos_token="<|end|>")
    row = {"prompt": "p", "token_ids": [*ids("ab|c"), END], "outcome": 1}
    assert score([row], [], fast, delimiter="|").table.to_pylist()[0]["step_ends"] == [2, 5]
    assert list(load_tokenizer(fast).encode(["ab"])) == [ids("ab")]


# ---- real solutions


@pytest.fixture(scope="module")
def solutions(tmp_path_factory):
    """GSM8K as rollouts and critiques, made by the example; and a tokenizer trained on it."""
    if not SOLUTIONS.exists():
        pytest.skip("gsm8k_solutions.jsonl is not there")
    folder = tmp_path_factory.mktemp("gsm8k")
    subprocess.run([sys.executable, str(ROOT / "examples" / "score" / "make_gsm8k.py"), str(SOLUTIONS), str(folder)],
                   check=True, timeout=120)  # fmt: skip
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    model = byte_level([each["text"] for row in rows for each in row["responses"]], 2000)
    model.save(str(folder / "tokenizer.json"))
    summary = score_file(
        folder / "rollouts.jsonl", folder / "critiques.jsonl", folder, folder / "out.parquet", delimiter="\n"
    )
    return folder, rows, model, summary


def test_real_solutions_are_scored_whole(solutions):
    folder, rows, model, summary = solutions
    table = pq.read_table(folder / "out.parquet")
    texts = [each["text"] for row in rows for each in row["responses"]]
    assert table.num_rows == summary.responses == len(texts) == 5276
    assert table["token_ids"].to_pylist() == [encoding.ids for encoding in model.encode_batch(texts)]
    assert (summary.bad_rows, summary.undecided, summary.groups) == (0, 0, 1319)
    lines = [len([line for line in text.split("\n") if line.strip()]) for text in texts]
    assert [len(starts) for starts in table["step_starts"].to_pylist()] == lines
    # What the judge was told to do: 3 % garbled, 1 % lost, and few errors on right steps.
    total = sum(summary.critiques.values())
    assert total == 4 * 5276
    assert summary.critiques["invalid"] / total == pytest.approx(0.03, abs=0.006)
    assert summary.critiques["failed"] / total == pytest.approx(0.01, abs=0.004)
    assert summary.flag_rate["right"] == pytest.approx(0.05, abs=0.01)
    assert summary.flag_rate["wrong"] > 0.2 and summary.kappa > 0.5


def test_real_groups_equal_the_reference(solutions):
    folder, rows, model, _ = solutions
    table = {row["response_id"]: row for row in pq.read_table(folder / "out.parquet").to_pylist()}
    checked = 0
    for row in rows[::97]:
        outcomes, votes, starts, ends, cu_steps, cu_seqlens = [], [], [], [], [0], [0]
        for each in row["responses"]:
            got = table[each["id"]]
            assert (
                b"".join(map(str.encode, model.decode_batch([[i] for i in got["token_ids"]]))) == each["text"].encode()
            )
            pieces = [
                model.decode(got["token_ids"][s:e]) for s, e in zip(got["step_starts"], got["step_ends"], strict=True)
            ]
            assert [piece.strip("\n") for piece in pieces] == each["text"].split("\n")
            outcomes.append(float(each["outcome"]))
            votes += got["votes"]
            starts += [cu_seqlens[-1] + start for start in got["step_starts"]]
            ends += [cu_seqlens[-1] + end for end in got["step_ends"]]
            cu_steps.append(len(starts))
            cu_seqlens.append(cu_seqlens[-1] + len(got["token_ids"]))
        tensors = [torch.tensor(values) for values in (votes, starts, ends, cu_steps, cu_seqlens)]
        tensors[0] = tensors[0].to(torch.int8)
        groups = torch.zeros(len(outcomes), dtype=torch.int64)
        wanted = reference.token_advantages(torch.tensor(outcomes), *tensors, groups, CreditRule())
        found = [value for each in row["responses"] for value in table[each["id"]]["advantages"]]
        assert found == pytest.approx(wanted.tolist(), rel=1e-5, abs=1e-6)
        checked += len(set(found)) > 2
    assert checked > 5


def test_the_checker_of_the_example_knows_arithmetic():
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_gsm8k", ROOT / "examples" / "score" / "make_gsm8k.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    right = ["16 - 3 = <<16-3=13>>13 eggs", "$<<13*2=26>>26", "<<1/3=0.33>>.33", "<<1,000*2=2000>>2,000", "<<2*(3+4)=14>>14",
             "no notes", "<<half of it=3>>3", "A: 18", "<<-3--4=1>>1"]  # fmt: skip
    wrong = ["<<16-3=12>>12 eggs", "<<16-3=13>>31", "A: 17", "<<2*3=6>>6 then <<6+1=8>>8", "A: $18.5"]
    assert [example.is_wrong(step, "18") for step in right] == [False] * len(right)
    assert [example.is_wrong(step, "18") for step in wrong] == [True] * len(wrong)
    assert (
        example.value("9**9**9") is None and example.value("__import__('os')") is None and example.value("1/0") is None
    )


def test_vote_tables_of_the_file_are_those_of_the_parser(solutions):
    folder = solutions[0]
    from capo.critique import CritiqueError, parse

    table = {row["response_id"]: row for row in pq.read_table(folder / "out.parquet").to_pylist()}
    for line in (folder / "critiques.jsonl").read_text().splitlines()[::211]:
        given = json.loads(line)
        row = table[given["response_id"]]
        count = len(row["step_starts"])
        read = []
        for critique in given["critiques"]:
            try:
                read.append(parse(critique["text"], count, critique["nonce"]) if critique else None)
            except CritiqueError:
                read.append(None)
        assert row["votes"] == vote_table([read], [count]).tolist()
