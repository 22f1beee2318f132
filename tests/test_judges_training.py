"""Judges in `capo train`: chosen by configuration, stopped when they are out, watched for hacks; keys stay out of files."""

import io
from random import Random

import pytest
import torch
from judge_server import FakeServer
from rich.console import Console
from tiny_model import save

import capo
from capo import doctor
from capo.config import TaskConfig, TrainConfig, load_config
from capo.critique import vote_table
from capo.data import ArithmeticTask
from capo.errors import UsageError
from capo.judges import JudgeReply, JudgeRequest
from capo.judges.canaries import make_canaries
from capo.judges.make import make_judge
from capo.judges.openai import OpenAIJudge
from capo.judges.scripted import ScriptedJudge
from capo.judges.transformers import TransformersJudge
from capo.judges.voting import Votes
from capo.metrics import alarms, judge_metrics, read_metrics, response_metrics
from capo.train import TrainingError, train, verify

SMALL = [
    "updates=3", "prompts=4", "group_size=2", "minibatches=2", "warm_start.steps=0", "task.steps=2", "task.held_out=8",
    "model.layers=1", "model.hidden=8", "model.heads=2", "model.mlp=8", "save_every=100", "judge.num_votes=3", "threads=1",
]  # fmt: skip
CANARY = "sk-canary-5eed5eed5eed5eed"


def openai(server, *more):
    return ["judge.kind=openai", f"judge.openai.url={server.url}", "judge.openai.model=m", *more]


def run(tmp_path, *overrides, resume=False):
    console = Console(file=io.StringIO())
    return train(load_config(None, [*SMALL, f"output={tmp_path / 'run'}", *overrides]), resume=resume, console=console)


def test_every_kind_is_made_from_its_section(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", CANARY)
    check = lambda request: []
    assert isinstance(make_judge(load_config().judge, check, 0), ScriptedJudge)
    folder = save(tmp_path / "model")
    local = load_config(None, ["judge.kind=transformers", f"judge.transformers.path={folder}", "judge.max_tokens=7"])
    judge = make_judge(local.judge, check, 0)
    assert isinstance(judge, TransformersJudge) and judge._max_new_tokens == 7
    far = load_config(
        None,
        [
            "judge.kind=openai", "judge.openai.url=https://example.com/v1/", "judge.openai.model=m",
            "judge.openai.api_key_env=JUDGE_KEY", 'judge.openai.extra={"top_k": 3}', "judge.openai.retries=2",
            "judge.temperature=0.5", "judge.structured=true", "judge.openai.concurrency=3",
        ],
    )  # fmt: skip
    judge = make_judge(far.judge, check, 5)
    assert isinstance(judge, OpenAIJudge) and repr(judge) == "OpenAIJudge('https://example.com/v1', 'm')"
    assert judge._parameters == {"model": "m", "temperature": 0.5, "top_p": 1.0, "max_tokens": 1024, "top_k": 3}
    assert (judge.seed, judge._structured, judge._limits.retries, judge._limits.concurrency) == (5, True, 2, 3)
    assert CANARY not in far.to_yaml() + repr(far) and "api_key_env: JUDGE_KEY" in far.to_yaml()
    file = tmp_path / "again.yaml"
    file.write_text(far.to_yaml())
    assert load_config(file) == far


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["judge.kind=openai"], "needs judge.openai.url"),
        (["judge.kind=openai", "judge.openai.url=http://localhost/v1"], "needs judge.openai.model"),
        (["judge.kind=opnai"], "scripted"),
        (["judge.openai.ulr=x"], "did you mean judge.openai.url"),
        ([f"judge.openai.api_key={CANARY}"], "looks like a secret"),
        ([f"judge.openai.api_key_env={CANARY}"], "name of an environment variable"),
        ([f"judge.openai.url=https://me:{CANARY}@example.com/v1"], "no user"),
        ([f"judge.openai.url=https://example.com/v1?api_key={CANARY}"], "query"),
        ([f'judge.openai.extra={{"api_key": "{CANARY}"}}'], "looks like a secret"),
        (["judge.openai.extra=[1]"], "JSON object"),
        (["judge.openai.extra={"], "JSON object"),
        (["judge.openai.url=http://10.0.0.1:8000/v1"], "allow_http"),
        (["judge.openai.url=http://169.254.169.254/v1", "judge.openai.allow_http=true"], "link-local"),
        (["judge.openai.max_failure_rate=1.5"], "max_failure_rate"),
        (["judge.openai.deadline=.inf"], "deadline"),
        (["judge.temperature=-1"], "temperature"),
        (["judge.quorum=0"], "quorum"),
        (["judge.canaries=4", "judge.num_votes=0", "method=grpo"], "canaries=4 need votes"),
        (["judge.min_canaries=0.5"], "canaries is 0"),
        (["judge.min_canaries=1.1"], "min_canaries"),
        (["judge.quorum=4", "judge.num_votes=3"], "quorum=4 can never be reached with num_votes=3"),
        (["judge.openai.api_key_env=A", "judge.openai.api_key_file=b"], "one of them"),
        (["judge.transformers.device=tpu"], "device"),
    ],
)
def test_wrong_settings_are_named_and_secrets_not_shown(overrides, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_config(None, overrides)
    assert CANARY not in str(caught.value)


def test_a_run_with_a_judge_behind_a_server(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", CANARY)
    with FakeServer() as server:
        result = run(tmp_path, *openai(server, "judge.openai.api_key_env=JUDGE_KEY"))
        assert server.requests and all(h["authorization"] == f"Bearer {CANARY}" for _, h in server.requests)
    rows = read_metrics(result.run_dir / "metrics.jsonl")[1:]
    assert len(rows) == 3 and all(row["capo/critiques/valid"] > 0 for row in rows)
    assert all(row["capo/critiques/failed"] == row["capo/critiques/invalid"] == 0 for row in rows)
    written = [path for path in result.run_dir.rglob("*") if path.is_file()]
    assert written and not any(CANARY.encode() in path.read_bytes() for path in written)


def test_a_run_stops_when_the_judge_is_out_and_goes_on_when_it_is_back(tmp_path):
    """No update is made on a gap: what was learnt before is saved, and resuming ends where a run without outage ends."""
    quick = ("judge.openai.retries=0", "judge.openai.max_wait=0.1")
    calls = []

    def behave(body, headers):
        calls.append(body)
        return "500" if out and len(calls) > out else "healthy"

    with FakeServer(behave) as server:
        out = 0
        whole = run(tmp_path / "whole", *openai(server, *quick))
        out, calls[:] = len(calls) // 2, []
        with pytest.raises(TrainingError, match=r"replies.*have failed.*http_500.*--resume"):
            run(tmp_path, *openai(server, *quick))
        saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
        rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert 0 < rows[-1]["step"] < 3 and len(saved) >= 1
        out = 0
        resumed = run(tmp_path, *openai(server, *quick), resume=True)
    ends = [read_metrics(result.run_dir / "metrics.jsonl") for result in (whole, resumed)]
    assert [row["step"] for row in ends[1]] == [0, 1, 2, 3]
    for name in ("loss", "grad_norm", "reward", "capo/flag_rate/wrong", "capo/critiques/valid"):
        assert [row.get(name) for row in ends[0]] == [row.get(name) for row in ends[1]]


@pytest.mark.parametrize("prompts, undecided", [(4, 8), (10, 5)])
def test_a_run_stops_when_too_much_is_undecided_and_goes_on_when_it_is_not(tmp_path, monkeypatch, prompts, undecided):
    """All of few outcomes, or more than a fifth of many."""
    updates = []

    def unsure(verifier, *rest):
        updates.append(verifier)
        outcomes = verify(verifier, *rest)
        if len(updates) == broken:
            verifier._counts["undecided/timeout"] += undecided
            outcomes[:undecided] = float("nan")
        return outcomes

    monkeypatch.setattr("capo.train.verify", unsure)
    broken, size = 0, f"prompts={prompts}"
    whole = run(tmp_path / "whole", size)
    broken, updates[:] = 2, []
    total = 2 * prompts
    with pytest.raises(
        TrainingError, match=rf"{undecided} of the {total} .*max_undecided=0.2.*timeout {undecided}.*--resume"
    ):
        run(tmp_path, size)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 1
    broken = 0
    resumed = run(tmp_path, size, resume=True)
    ends = [read_metrics(result.run_dir / "metrics.jsonl") for result in (whole, resumed)]
    for name in ("step", "loss", "grad_norm", "reward"):
        assert [row.get(name) for row in ends[0]] == [row.get(name) for row in ends[1]]
    broken, updates[:] = 2, []
    assert run(tmp_path / "never", size, "max_undecided=1").update == 3


def test_a_run_with_a_quorum_does_without_the_votes_below_it(tmp_path):
    garbled = ("judge.invalid=0.5", "warm_start.steps=60", "warm_start.learning_rate=1e-2")

    def rows(name, *more):
        result = run(tmp_path / name, *garbled, *more)
        return read_metrics(result.run_dir / "metrics.jsonl")[1:]

    strict, every = rows("strict", "judge.quorum=3"), rows("every", "judge.quorum=3", "judge.adaptive=false")
    loose = rows("loose")
    for name in ("loss", "grad_norm", "reward", "capo/max_advantage"):
        assert [row.get(name) for row in strict] == [row.get(name) for row in every]
    assert sum(row["capo/critiques/no_quorum"] for row in every) > sum(row["capo/critiques/no_quorum"] for row in loose)
    assert [row.get("loss") for row in strict] != [row.get("loss") for row in loose]


def canary_rows(tmp_path, *more):
    result = run(tmp_path, "judge.canaries=40", *more)
    return read_metrics(result.run_dir / "metrics.jsonl")[1:]


def test_canaries_tell_a_judge_that_errs_from_one_that_does_not(tmp_path):
    def shares(*more):
        rows = canary_rows(tmp_path / str(len(list(tmp_path.iterdir()))), *more)
        return [[row.get(f"capo/canaries/{name}") for row in rows] for name in ("right", "wrong", "unheard")]

    sure = ("judge.false_alarm=0", "judge.missed=0")
    assert shares(*sure, "judge.min_canaries=1") == [[1.0] * 3, [1.0] * 3, [0.0] * 3]
    assert shares("judge.false_alarm=0", "judge.missed=1", "judge.num_votes=1")[:2] == [[1.0] * 3, [0.0] * 3]
    right, wrong, _ = shares("judge.false_alarm=1", "judge.missed=0", "judge.num_votes=1")
    assert right == [0.0] * 3 and all(0 < share < 1 for share in wrong), "the first step is flagged, right or wrong"
    assert shares(*sure, "judge.invalid=1", "judge.min_canaries=1") == [[None] * 3, [None] * 3, [1.0] * 3]
    assert all(0 < share < 1 for share in shares(*sure, "judge.invalid=0.3", "judge.quorum=3")[2])


def test_canaries_change_nothing_else(tmp_path):
    plain = read_metrics(run(tmp_path / "plain").run_dir / "metrics.jsonl")[1:]
    rows = canary_rows(tmp_path / "canaries")
    assert all(row.get(name) == value for one, row in zip(plain, rows, strict=True) for name, value in one.items()
               if "time" not in name)  # fmt: skip
    assert len({row["capo/canaries/right"] for row in rows}) > 1, "each update has its own"


def test_a_judge_that_takes_planted_errors_for_right_stops_the_run(tmp_path):
    with pytest.raises(TrainingError, match=r"0% of the canaries with a wrong step .*min_canaries=0.5.*--resume"):
        canary_rows(tmp_path, "judge.false_alarm=0", "judge.missed=1", "judge.min_canaries=0.5")
    with pytest.raises(TrainingError, match="canaries without a wrong step"):
        canary_rows(tmp_path / "deaf", "judge.false_alarm=1", "judge.missed=0", "judge.min_canaries=0.5")


def test_planted_errors_are_one_digit_and_the_first_wrong_step():
    task = ArithmeticTask(TaskConfig(steps=3), 0)
    problems = task.problems(200, torch.Generator().manual_seed(0))
    solved = [JudgeRequest(p.question, p.solution, tuple(p.solution.split("\n\n"))) for p in problems]
    places = set()
    for number, (one, canary) in enumerate(zip(solved, make_canaries(solved, task.check, Random(0)), strict=True)):
        differ = [i for i, pair in enumerate(zip(one.steps, canary.request.steps, strict=True)) if len(set(pair)) > 1]
        assert len(differ) == number % 2 and canary.first == (differ[0] if differ else None)
        places.update(differ)
    assert places == {0, 1, 2, 3}


def credit(outcomes, flags, counts, lengths):
    """One-vote credit with one token a step. flags: by response, a string of 1, 0, -"""
    rows = [JudgeReply(None, None, "x") if "-" in word else _reply(word) for word in flags]
    replies = [[reply] for reply in rows]
    votes = vote_table([[reply.critique for reply in row] for row in replies], counts, 1)
    ends = torch.arange(1, sum(counts) + 1)
    cu = torch.tensor([0, *counts]).cumsum(0)
    steps = capo.Steps(ends - 1, ends, cu)
    made = capo.Credit(torch.tensor(outcomes), votes, steps, cu, torch.zeros(len(counts), dtype=torch.int64))
    return made, Votes(replies, asked=len(counts), full=2 * len(counts))


def _reply(word):
    flagged = ",".join(str(i) for i, c in enumerate(word) if c == "1")
    text = f"Judgment: {'No' if flagged else 'Yes'}\n<incorrect_steps>{flagged}</incorrect_steps>"
    return JudgeReply.read(text, len(word), None, prompt_tokens=10, completion_tokens=5)


def test_judge_metrics_by_hand():
    made, votes = credit([1.0, 1.0, 0.0, 0.0, 0.0], ["11", "10", "000", "100", "--"], [2, 2, 3, 3, 2], None)
    metrics = judge_metrics(made, votes)
    assert metrics["capo/flag_rate/right"] == 3 / 4 and metrics["capo/flag_rate/wrong"] == 1 / 6
    assert [metrics[f"capo/critiques/{state}"] for state in ("valid", "invalid", "failed")] == [4, 0, 1]
    assert metrics["capo/critiques/left_out"] == 0.5
    assert metrics["capo/judge_tokens_per_token"] == 4 * 15 / 12
    # All steps of a right one flagged; none of a wrong one. Who was not heard contradicts nobody.
    assert (metrics["capo/conflict/right"], metrics["capo/conflict/wrong"]) == (1, 1)
    assert metrics["capo/critiques/no_quorum"] == 1
    strict = judge_metrics(made, votes, quorum=2)
    assert strict["capo/critiques/no_quorum"] == 5 and strict["capo/conflict/right"] == 0
    assert judge_metrics(made, Votes([[] for _ in range(5)], 0, 0)) == {}
    requests = [JudgeRequest("q", None, ("a",)), JudgeRequest("q", None, ("<step_3>", "b"))]
    requests += [JudgeRequest("q", None, ("Judgment: Yes",)), JudgeRequest("q", None, ("c",))] + requests[:1]
    shown = response_metrics(made, requests)
    assert shown["capo/marked_responses"] == 2 / 5 and shown["capo/steps_per_response"] == 12 / 5
    assert shown["capo/tokens_per_step"] == 1.0 and shown["capo/single_step_responses"] == 0.0


FINE = {
    "capo/critiques/valid": 95, "capo/critiques/invalid": 4, "capo/critiques/failed": 1, "capo/critiques/duplicates": 3,
    "capo/flag_rate/right": 0.1, "capo/flag_rate/wrong": 0.3, "capo/vote_kappa": 0.4, "capo/marked_responses": 0.0,
    "capo/single_step_responses": 0.1, "capo/canaries/right": 0.9, "capo/canaries/wrong": 0.8,
}  # fmt: skip


@pytest.mark.parametrize(
    "name, value",
    [
        ("capo/critiques/invalid", 40), ("capo/critiques/failed", 20), ("capo/critiques/duplicates", 90),
        ("capo/flag_rate/right", 0.7), ("capo/flag_rate/wrong", 0.0), ("capo/vote_kappa", -0.1),
        ("capo/canaries/right", 0.4), ("capo/canaries/wrong", 0.1),
        ("capo/marked_responses", 0.2), ("capo/single_step_responses", 1.0),
    ],
)  # fmt: skip
def test_alarms(name, value):
    assert alarms(FINE) == alarms({}) == alarms(dict.fromkeys(FINE)) == {}
    assert list(alarms({**FINE, name: value})) == [name]
    assert name in alarms({**FINE, name: value})[name]


def test_an_alarm_is_told_once(tmp_path):
    text = io.StringIO()
    config = load_config(None, [*SMALL, f"output={tmp_path}", "judge.invalid=0.9"])
    train(config, console=Console(file=text))
    assert text.getvalue().count("more than a fifth does not parse") == 1


def test_doctor_shows_which_judges_can_run(monkeypatch):
    def shown():
        console = Console(file=io.StringIO(), width=200)
        doctor.report(console)
        return console.file.getvalue()

    assert all(f"judge {kind}: ready" in shown() for kind in ("scripted", "openai", "transformers"))
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "httpx2" else version(name))
    assert "judge openai: not available: no httpx2 (pip install 'capo[judge]')" in shown()


def test_a_missing_package_names_its_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "httpx2", None)
    for name in ("capo.judges.openai", "capo.judges.client"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    config = TrainConfig.model_validate(
        {"judge": {"kind": "openai", "openai": {"url": "http://localhost/v1", "model": "m"}}}
    )
    with pytest.raises(UsageError, match=r"needs httpx2: pip install 'capo\[judge\]'"):
        make_judge(config.judge, lambda request: [], 0)
