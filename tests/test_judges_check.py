"""`capo judge`: figures worked out by hand, files it takes and refuses, and what it leaves behind."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from judge_server import FakeServer
from typer.testing import CliRunner

from capo import cli
from capo.errors import UsageError
from capo.judges import JudgeReply, JudgeRequest
from capo.judges.check import Labelled, check, known_wrong, load, quality
from capo.judges.scripted import ScriptedJudge

EXAMPLE = Path(__file__).parents[1] / "examples" / "judge" / "arithmetic.jsonl"


def labelled(*labels):
    """Responses with labels such as "rw?" for right, wrong, unknown."""
    known = {"r": False, "w": True, "?": None}
    return [
        Labelled(JudgeRequest(f"q{n}", None, tuple(f"s{i}" for i in range(len(word)))), tuple(known[c] for c in word))
        for n, word in enumerate(labels)
    ]


def votes(*columns):
    """A vote table from one word a critique: 1 flagged, 0 clear, - abstained."""
    return torch.tensor(
        [[{"1": 1, "0": 0, "-": -1}[c] for c in row] for row in zip(*columns, strict=True)], dtype=torch.int8
    )


def test_quality_by_hand():
    responses = labelled("rw?", "rrr", "w??", "rr", "rwr")
    found = quality(votes("011100111--001"), "majority", responses)
    # Known steps that are heard: r0 w1 | r1 r0 r0 | w1 | - | r0 w0 r1.
    assert (found.precision, found.recall, found.f1) == (2 / 4, 2 / 3, pytest.approx(4 / 7))
    # Errors: first found at 1 (right), 0 (right), 2 instead of 1 (wrong); without error: flagged; unheard is left out.
    assert (found.first_error, found.all_right, found.first_error_f1) == (2 / 3, 0.0, 0.0)
    assert (found.votes, found.rule, found.unheard) == (1, "majority", 1 / 5)


def test_rules_differ_where_votes_do():
    responses = labelled("rw")
    table = votes("01", "10", "01", "11")
    by_rule = {
        rule: quality(table, rule, responses) for rule in ("majority", "strict_majority", "intersection", "union")
    }
    assert by_rule["majority"].precision == by_rule["union"].precision == 0.5  # a tie flags
    assert by_rule["strict_majority"].precision == by_rule["strict_majority"].recall == 1.0
    assert by_rule["intersection"].precision is None and by_rule["intersection"].recall == 0.0


def test_nothing_to_divide_by_is_no_figure():
    found = quality(votes("00"), "majority", labelled("rr"))
    assert (found.precision, found.recall, found.f1, found.first_error, found.first_error_f1) == (None,) * 5
    assert found.all_right == 1.0


def test_a_faultless_judge_is_faultless_and_noise_has_its_rates():
    responses = load(EXAMPLE)
    report, replies = check(ScriptedJudge(known_wrong(responses)), responses, 3, batch=64)
    assert len(replies) == report.responses == len(responses) == 200
    for one in report.qualities:
        assert (one.precision, one.recall, one.first_error_f1, one.unheard) == (1.0, 1.0, 1.0, 0.0)
    assert [(one.votes, one.rule) for one in report.qualities[:2]] == [(1, "majority"), (2, "majority")]
    assert report.agreement.kappa == 1.0 and report.states == {"valid": 600} and not report.errors
    assert report.tokens > 1000 and report.seconds > 0

    noisy = ScriptedJudge(known_wrong(responses), false_alarm=0.1, missed=0.25, invalid=0.2, failed=0.1, seed=3)
    report, _ = check(noisy, responses, 1)
    steps = sum(len(one.wrong) for one in responses)
    wrong = sum(map(sum, (one.wrong for one in responses)))
    expected = 0.75 * wrong / (0.75 * wrong + 0.1 * (steps - wrong))
    assert abs(report.qualities[0].recall - 0.75) < 5 * math.sqrt(0.75 * 0.25 / (0.7 * wrong))
    assert abs(report.qualities[0].precision - expected) < 0.12
    assert abs(report.qualities[0].unheard - 0.3) < 0.12
    assert sum(report.states.values()) == 200 and sum(report.errors.values()) == 200 - report.states["valid"]


def test_duplicates_and_tokens_are_counted():
    class Same:
        def critique(self, requests, num_votes, first=0):
            one = JudgeReply.read("Judgment: Yes", 2, None, prompt_tokens=5, completion_tokens=2)
            return [[one] * num_votes for _ in requests]

    report, _ = check(Same(), labelled("rr", "rw"), 4)
    assert report.duplicates == 6
    assert report.tokens == 1000 / 2 * 2 * 4 * 7


def test_both_kinds_of_labels(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(
        '{"id": "gsm8k-1", "problem": "p", "steps": ["a", "b", "c"], "final_answer_correct": false, "label": 1}\n\n'
        '{"problem": "p", "steps": ["a"], "label": -1, "answer": "4"}\n'
        '{"question": "p", "reference": "r", "steps": ["a", "b"], "wrong": [1, 0]}\n',
    )
    one, two, three = load(file)
    assert (one.wrong, one.first, one.request) == ((False, True, None), 1, JudgeRequest("p", None, ("a", "b", "c")))
    assert (two.wrong, two.first, two.request.reference) == ((False,), None, "4")
    assert (three.wrong, three.first, three.request.reference) == ((True, True), 0, "r")


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "no labelled responses"), ("{", "1: not JSON"), ("[]", "not a JSON object"), ('{"steps": ["a"], "label": 0}', "problem"),
        ('{"problem": "p", "label": 0}', "needs steps"), ('{"problem": "p", "steps": [], "label": -1}', "needs steps"),
        ('{"problem": "p", "steps": [1], "label": -1}', "needs steps"), ('{"problem": "p", "steps": ["a"]}', "label"),
        ('{"problem": "p", "steps": ["a"], "label": 1}', "from 0 to 0, got 1"),
        ('{"problem": "p", "steps": ["a"], "label": true}', "got True"),
        ('{"problem": "p", "steps": ["a"], "label": -2}', "got -2"),
        ('{"problem": "p", "steps": ["a"], "wrong": [1]}', "step numbers"),
        ('{"problem": "p", "steps": ["a"], "wrong": 0}', "step numbers"),
        ('{"problem": "p", "steps": ["a"], "label": 0, "reference": 3}', "reference"),
        ("[" * 100_000, "1: not JSON"),
    ],
)  # fmt: skip
def test_other_files_are_refused_with_the_line(tmp_path, line, message):
    file = tmp_path / "data.jsonl"
    file.write_text(line)
    with pytest.raises(UsageError, match=message):
        load(file)
    with pytest.raises(UsageError, match="cannot read"):
        load(tmp_path / "missing.jsonl")


def test_the_example_is_what_its_script_makes(tmp_path):
    script = (EXAMPLE.parent / "make_arithmetic.py").read_text().replace("Path(__file__).parent", "Path('.')")
    (tmp_path / "make.py").write_text(script)
    subprocess.run([sys.executable, "make.py"], cwd=tmp_path, check=True)
    assert (tmp_path / "arithmetic.jsonl").read_text() == EXAMPLE.read_text()


def judge(*arguments):
    return CliRunner().invoke(cli.app, ["judge", *map(str, arguments)])


def test_the_command_shows_writes_and_draws(tmp_path):
    done = judge(EXAMPLE, "num_votes=2", "invalid=0.1", "--out", tmp_path / "out", "--limit", 50, "--batch", 20)
    assert done.exit_code == 0, done.output
    for words in ("first-error F1", "Fleiss' kappa", "strict_majority", "per 1,000 responses", "50/50"):
        assert words in done.output
    rows = list(csv.DictReader((tmp_path / "out" / "judge.csv").open()))
    assert [(row["votes"], row["rule"]) for row in rows][:3] == [
        ("1", "majority"),
        ("2", "majority"),
        ("2", "strict_majority"),
    ]
    assert all(0 <= float(row["precision"]) <= 1 for row in rows)
    replies = [json.loads(line) for line in (tmp_path / "out" / "replies.jsonl").open()]
    assert len(replies) == 50 and all(len(line["replies"]) == 2 for line in replies)
    assert {reply["state"] for line in replies for reply in line["replies"]} == {"valid", "invalid"}
    assert (tmp_path / "out" / "judge.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_checks_a_judge_behind_a_server(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [
        {"problem": f"p{n}", "steps": ["right", "wrong"] if n % 2 else ["right", "right"], "label": 1 if n % 2 else -1}
        for n in range(20)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with FakeServer() as server:
        done = judge(file, "kind=openai", f"openai.url={server.url}", "openai.model=m", "judge.num_votes=3")
        assert done.exit_code == 0, done.output
        assert "60 valid" in done.output and "100.0" in done.output
        assert len(server.requests) == 20
    with FakeServer(lambda body, headers: "401") as server:
        done = judge(file, "kind=openai", f"openai.url={server.url}", "openai.model=m")
        assert done.exit_code == 1 and "status 401" in done.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("num_vote=3",), "num_votes"),
        (("num_votes=0",), "at least 1"),
        (("kind=openai",), "needs judge.openai.url"),
        (("kind=transformers",), "needs judge.transformers.path"),
        (("kind=transformers", "transformers.path=/nowhere/at/all"), "judge.transformers.path=/nowhere/at/all"),
        (
            ("kind=openai", "openai.model=m", "openai.url=http://localhost/v1", "openai.api_key_env=NO_SUCH_KEY"),
            "NO_SUCH_KEY",
        ),
    ],
)
def test_settings_that_cannot_be_end_before_any_request(arguments, message):
    with pytest.raises(UsageError, match=message):
        CliRunner().invoke(cli.app, ["judge", str(EXAMPLE), *arguments], catch_exceptions=False)
