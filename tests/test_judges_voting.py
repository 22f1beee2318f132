"""Votes that are left out change nothing: decided steps by exhaustion, advantages bit for bit."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import capo
from capo import critique
from capo.config import TaskConfig
from capo.critique import Critique
from capo.data import DELIMITER, ArithmeticTask
from capo.judges import JudgeReply, JudgeRequest
from capo.judges.scripted import ScriptedJudge
from capo.judges.voting import collect, needs_votes, response_votes_missing, votes_missing
from capo.reference import step_weights
from capo.steps import step_texts

RULES = ["majority", "strict_majority", "intersection", "union", "average"]
PRESETS = ["capo", "grpo", "dr_grpo", "rloo", "opo", "grpo_process", "vppo", "fapo", "papo"]


def weight(votes, rule):
    """By the reference. A vote is 1, 0 or -1."""
    return float(step_weights(torch.tensor([votes], dtype=torch.int8), rule)[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_votes", [1, 2, 3, 4, 5, 6])
def test_decided_means_the_same_weight_whatever_the_open_votes_say(rule, num_votes):
    """All histories and all completions, abstentions among them; and no fewer votes could decide."""
    weights = {votes: weight(votes, rule) for votes in itertools.product([1, 0, -1], repeat=num_votes)}
    for asked in range(num_votes + 1):
        left = num_votes - asked
        for history in itertools.product([1, 0, -1], repeat=asked):
            finals = {weights[history + rest] for rest in itertools.product([1, 0, -1], repeat=left)}
            valid, flagged = asked - history.count(-1), history.count(1)
            missing = votes_missing(valid, flagged, left, rule)
            assert (missing == 0) == (len(finals) == 1 if rule != "average" else left == 0)
            if missing == 0:
                assert weight(history, rule) in finals or not history, "the votes so far give the weight"
            # The least: some continuation of that length decides, none that is shorter does.
            for length in range(left + 1 if rule != "average" else 0):
                decides = any(
                    len(
                        {weights[history + more + rest] for rest in itertools.product([1, 0, -1], repeat=left - length)}
                    )
                    == 1
                    for more in itertools.product([1, 0, -1], repeat=length)
                )
                assert decides == (length >= missing)


def final(votes, rule, matters):
    """What a credit rule sees of a response. votes [steps][K]"""
    flags = [weight(row, rule) >= 0.5 for row in votes]
    if matters == "first":
        return flags.index(True) if any(flags) else None
    return any(flags) if matters == "any" else tuple(weight(row, rule) for row in votes)


@pytest.mark.parametrize("matters", ["every", "first", "any"])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_decided_of_a_response_stays(rule, matters):
    rng = random.Random(f"{rule}{matters}")
    stopped = without = 0
    for _ in range(300):
        num_steps, num_votes = rng.randrange(4), rng.randrange(1, 8)
        quorum = rng.choice([1, rng.randrange(1, num_votes + 1)])
        noise = rng.choice([0.05, 0.3, 0.5])
        true = [rng.random() < 0.4 for _ in range(num_steps)]

        def draw(true=true, noise=noise):
            if rng.random() < 0.15:
                return None
            return Critique(None, tuple(i for i, wrong in enumerate(true) if wrong != (rng.random() < noise)))

        critiques = [draw() for _ in range(num_votes)]
        asked = 0
        while more := response_votes_missing(critiques[:asked], num_steps, num_votes - asked, rule, matters, quorum):
            asked += more
        stopped += asked < num_votes
        table = critique.vote_table([critiques], [num_steps], num_votes, quorum).tolist()
        partial = critique.vote_table([critiques[:asked]], [num_steps], num_votes, quorum).tolist()
        assert final(table, rule, matters) == final(partial, rule, matters)
        if num_steps and sum(each is not None for each in critiques) < quorum:
            without += 1
            assert {vote for row in partial for vote in row} == {-1}
    assert stopped > 20 and without > 5


def test_a_response_is_asked_about_until_it_has_its_quorum_or_can_have_none():
    clear, lost = Critique(True, ()), None
    missing = lambda critiques, quorum: response_votes_missing(
        critiques, 2, 8 - len(critiques), "majority", quorum=quorum
    )
    assert missing([clear] * 5, 5) == 0, "decided, with a quorum"
    assert missing([clear] * 5, 7) == 2, "decided, without"
    assert missing([lost] * 2 + [clear], 7) == 0, "six valid ones at most"
    assert missing([lost] + [clear], 7) == 6
    assert response_votes_missing([], 0, 8, "majority", quorum=8) == 0, "nothing to decide"


class Counting:
    """A judge whose i-th vote on a request does not depend on how it is asked for."""

    def __init__(self, judge):
        self.judge, self.asked, self.calls = judge, 0, []

    def critique(self, requests, num_votes, first=0):
        self.asked += num_votes * len(requests)
        self.calls.append((first, num_votes, len(requests)))
        return self.judge.critique(requests, num_votes, first)


def truth(request):
    return ["wrong" in step for step in request.steps]


def batch(rng, num_groups=4, group_size=4, most_steps=5):
    """Requests with outcomes, groups and the pieces of a Credit."""
    requests, outcomes, groups, lengths, starts, ends, cu_steps = [], [], [], [0], [], [], [0]
    for group in range(num_groups):
        # Some groups with all outcomes equal, some with twins.
        kind = rng.choice(["mixed", "right", "wrong", "undecided"])
        for _ in range(rng.randrange(1, group_size + 1)):
            steps = tuple(rng.choice(["right", "wrong"]) for _ in range(rng.randrange(most_steps)))
            requests.append(JudgeRequest(f"question {group}", None, steps))
            right = {"mixed": float(rng.random() < 0.5), "right": 1.0, "wrong": 0.0}.get(kind, float("nan"))
            outcomes.append(float("nan") if rng.random() < 0.1 else right)
            groups.append(group)
            position = lengths[-1] + rng.randrange(2)  # some tokens before the first step
            for _ in steps:
                starts.append(position)
                position += rng.randrange(1, 4)
                ends.append(position)
            cu_steps.append(len(starts))
            lengths.append(position + rng.randrange(2))
    tensors = [torch.tensor(x, dtype=torch.int64) for x in (starts, ends, cu_steps)]
    return requests, outcomes, groups, torch.tensor(lengths), capo.Steps(*tensors)


def advantages(replies, requests, outcomes, groups, cu_seqlens, steps, rule, num_votes, quorum=1):
    counts = [len(request.steps) for request in requests]
    votes = critique.vote_table([[reply.critique for reply in row] for row in replies], counts, num_votes, quorum)
    return capo.Credit(torch.tensor(outcomes), votes, steps, cu_seqlens, torch.tensor(groups), rule).advantages()


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), preset=st.sampled_from(PRESETS), vote=st.sampled_from(RULES), k=st.integers(1, 8))
def test_advantages_are_those_of_all_votes_bit_for_bit(seed, preset, vote, k):
    rng = random.Random(seed)
    requests, outcomes, groups, cu_seqlens, steps = batch(rng)
    normalize = {"capo": ["group_tokens", "group_mean", "responses", "responses_mean", "leave_one_out"]}.get(preset)
    changes = {"normalize": rng.choice(normalize)} if normalize else {}
    rule = capo.CreditRule.preset(preset, vote=vote, **changes)
    if rng.random() < 0.1:
        rule = capo.CreditRule.preset(preset, vote=vote, process_weight=0.0, **changes)
    judge = Counting(ScriptedJudge(truth, false_alarm=0.2, missed=0.2, invalid=0.15, failed=0.1, seed=seed))
    full = judge.critique(requests, k)
    judge.asked = 0
    quorum = rng.choice([1, rng.randint(1, k)])
    votes = collect(judge, requests, k, rule, outcomes, groups, quorum=quorum)
    assert votes.asked == judge.asked <= votes.full == k * len(requests)
    rest = (requests, outcomes, groups, cu_seqlens, steps, rule, k, quorum)
    assert torch.equal(advantages(full, *rest), advantages(votes.replies, *rest))
    for mine, all_of_them in zip(votes.replies, full, strict=True):
        assert [reply.text for reply in mine] == [reply.text for reply in all_of_them[: len(mine)]]


@pytest.mark.parametrize(
    "preset, expected",
    [
        # outcomes: 1 1 0 | 0 0 | 1 0 | nan 1 | 1 1(no steps)
        ("capo", "111 11 11 01 10"), ("grpo_process", "111 11 11 01 10"), ("grpo", "000 00 00 00 00"),
        ("vppo", "001 11 01 00 00"), ("fapo", "110 00 10 00 10"), ("papo", "110 00 00 00 10"),
    ],
)  # fmt: skip
def test_who_needs_votes(preset, expected):
    nan = float("nan")
    outcomes, groups = [1, 1, 0, 0, 0, 1, 0, nan, 1, 1, 1], [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    needed = needs_votes(capo.CreditRule.preset(preset), outcomes, [3] * 10 + [0], groups)
    assert needed == [char == "1" for char in expected if char != " "]


def test_rounds_ask_for_no_more_than_could_decide():
    judge = Counting(ScriptedJudge(truth))
    requests = [JudgeRequest("a", None, ("right", "wrong")), JudgeRequest("b", None, ("wrong",))]
    votes = collect(judge, requests, 8, capo.CreditRule(vote="majority"))
    # Four of eight flags are enough; four of eight clear votes could still be a tie.
    assert judge.calls == [(0, 4, 2), (4, 1, 1)]
    assert [len(row) for row in votes.replies] == [5, 4] and (votes.asked, votes.full) == (9, 16)
    judge = Counting(ScriptedJudge(truth))
    assert collect(judge, requests, 8, capo.CreditRule(vote="majority"), adaptive=False).asked == 16
    assert judge.calls == [(0, 8, 2)]
    assert collect(judge, requests, 0, capo.CreditRule(process_weight=0.0)).replies == [[], []]
    assert collect(judge, [], 8, capo.CreditRule()).replies == []


def test_equal_responses_are_judged_once_and_paid_for_once():
    judge = Counting(ScriptedJudge(truth))
    one = JudgeRequest("a", None, ("right", "wrong"))
    votes = collect(judge, [one, JudgeRequest("a", None, ("right",)), one], 3, capo.CreditRule(), adaptive=False)
    assert votes.asked == 6
    first, _, again = votes.replies
    assert [reply.text for reply in first] == [reply.text for reply in again]
    assert sum(reply.completion_tokens for reply in first) > 0
    assert sum(reply.prompt_tokens + reply.completion_tokens for reply in again) == 0
    assert collect(judge, [one, one], 3, capo.CreditRule(), adaptive=False, share=False).asked == 6


def test_a_failed_vote_is_used_up():
    class Broken:
        def critique(self, requests, num_votes, first=0):
            return [[JudgeReply.failure("connection")] * num_votes for _ in requests]

    votes = collect(Broken(), [JudgeRequest("a", None, ("x",))], 8, capo.CreditRule())
    assert [len(row) for row in votes.replies] == [8], "asked until nothing is left, and not for ever"


def test_savings_at_eight_votes_and_ten_percent_errors():
    """The figures of docs/judges.md come from benchmarks/votes.py; these are their bounds."""
    rng = random.Random(0)
    for steps, least in ((1, 0.35), (6, 0.12)):
        requests = [
            JudgeRequest(str(n), None, tuple(rng.choice(["right", "wrong"]) for _ in range(steps))) for n in range(600)
        ]
        judge = ScriptedJudge(truth, false_alarm=0.1, missed=0.1, seed=1)
        votes = collect(judge, requests, 8, capo.CreditRule(vote="majority"))
        assert 1 - votes.asked / votes.full > least
        counts = [steps] * 600
        tables = [
            critique.vote_table([[reply.critique for reply in row] for row in rows], counts, 8)
            for rows in (votes.replies, judge.critique(requests, 8))
        ]
        assert torch.equal(step_weights(tables[0], "majority"), step_weights(tables[1], "majority"))


def spoken_groups(seed, groups=24, size=8):
    """Groups of responses to arithmetic problems, as those would give them whom the example's policy has learnt from."""
    task = ArithmeticTask(TaskConfig(), seed)
    draw = task._draw
    task._draw = lambda count, *rest, **more: tuple(
        part.repeat_interleave(size, 0) for part in draw(count // size, *rest, **more)
    )
    rows = task.demos(groups * size, torch.Generator().manual_seed(seed))
    prompts, responses = rows[:, : task.prompt_length].tolist(), rows[:, task.prompt_length :]
    cu_seqlens = torch.arange(len(rows) + 1) * responses.shape[1]
    steps = capo.segment(responses.flatten(), cu_seqlens, task.token_bytes, DELIMITER)
    texts = step_texts(responses.flatten(), steps, task.token_bytes)
    requests = [JudgeRequest(task.decode(p), None, tuple(t)) for p, t in zip(prompts, texts, strict=True)]
    outcomes = [float(not any(task.check(request))) for request in requests]
    judge = ScriptedJudge(task.check, false_alarm=0.1, missed=0.1, seed=seed)
    return judge, requests, outcomes, [i // size for i in range(len(rows))], cu_seqlens, steps


@pytest.mark.parametrize("seed", range(5))
def test_forty_percent_are_left_out_on_the_arithmetic_task_and_nothing_changes(seed):
    """K = 8, a judge that errs on one step in ten; benchmarks/votes.py --arithmetic counts in real trainings."""
    judge, requests, outcomes, groups, cu_seqlens, steps = spoken_groups(seed)
    full = judge.critique(requests, 8)
    counts = [len(request.steps) for request in requests]
    whole = critique.vote_table([[reply.critique for reply in row] for row in full], counts, 8)
    for rule in RULES:
        credit_rule = capo.CreditRule(vote=rule)
        votes = collect(judge, requests, 8, credit_rule, outcomes, groups)
        some = critique.vote_table([[reply.critique for reply in row] for row in votes.replies], counts, 8)
        assert torch.equal(step_weights(some, rule), step_weights(whole, rule))
        rest = (requests, outcomes, groups, cu_seqlens, steps, credit_rule, 8)
        assert torch.equal(advantages(votes.replies, *rest), advantages(full, *rest))
        if rule == "majority":
            assert 1 - votes.asked / votes.full >= 0.4
            # Every exact way asks for five votes where no step is flagged: the rest is equal responses.
            alone = collect(judge, requests, 8, credit_rule, outcomes, groups, share=False)
            assert 0.1 < 1 - alone.asked / alone.full <= 0.375
