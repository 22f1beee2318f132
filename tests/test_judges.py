import dataclasses
import math
import random

import pytest

from capo.critique import Critique, CritiqueError, Reason, count_duplicates, parse, vote_table
from capo.judges import Judge, JudgeReply, JudgeRequest
from capo.judges.scripted import ScriptedJudge, write_critique, write_garbled

NONCE = "5eed0c0ffee5"


def wrong_is_marked(request):
    return ["wrong" in step for step in request.steps]


def request(number, steps=("right", "wrong", "right", "wrong")):
    return JudgeRequest(f"question {number}", "answer", tuple(steps))


def check(judge: Judge) -> Judge:
    return judge


def near(count, total, rate):
    """Within five standard deviations of a binomial count: with the seeds fixed, a claim about the rates, not luck."""
    return abs(count - total * rate) <= 5 * math.sqrt(total * rate * (1 - rate))


def test_without_noise_every_vote_is_the_truth():
    replies = check(ScriptedJudge(wrong_is_marked)).critique([request(0), request(1, ["right"] * 3), request(2, [])], 5)
    assert [[reply.critique for reply in votes] for votes in replies] == [
        [Critique(False, (1, 3))] * 5,
        [Critique(True, ())] * 5,
        [Critique(True, ())] * 5,
    ]
    assert all(reply.state == "valid" and reply.error is None for votes in replies for reply in votes)


def test_the_replies_are_real_text_in_several_forms():
    replies = ScriptedJudge(wrong_is_marked).critique([request(n) for n in range(100)], 2)
    texts = [reply.text for votes in replies for reply in votes]
    assert count_duplicates(texts) == 0
    for form in ("Judgment:", "Judgement:", ">1,", "step_1,", "<step_1>,", "**No**", "Explanation", "<think>"):
        assert 0 < sum(form in text for text in texts) < len(texts), form


def test_noise_depends_on_content_seed_and_vote_and_on_nothing_else():
    noise = {"false_alarm": 0.3, "missed": 0.3, "invalid": 0.2, "failed": 0.2}
    judge = ScriptedJudge(wrong_is_marked, seed=1, **noise)
    requests = [request(n) for n in range(20)]
    replies = judge.critique(requests, 4)
    assert judge.critique(requests, 4) == replies
    assert judge.critique(requests[::-1], 4) == replies[::-1]
    assert [judge.critique([one], 4)[0] for one in requests] == replies
    assert [votes[:2] for votes in replies] == judge.critique(requests, 2)
    assert judge.critique([requests[0], requests[0]], 4) == [replies[0]] * 2
    assert ScriptedJudge(wrong_is_marked, seed=2, **noise).critique(requests, 4) != replies
    for change in ({"question": "other"}, {"reference": None}, {"steps": ("right", "wrong", "right", "wrong ")}):
        changed = [dataclasses.replace(one, **change) for one in requests]
        assert judge.critique(changed, 4) != replies


@pytest.mark.parametrize(
    "false_alarm, missed, invalid, failed",
    [(0.0, 0.0, 0.0, 0.0), (0.1, 0.0, 0.0, 0.0), (0.0, 0.3, 0.0, 0.0), (0.2, 0.4, 0.1, 0.05), (1.0, 1.0, 0.3, 0.7)],
)
def test_noise_has_the_rates_asked_for(false_alarm, missed, invalid, failed):
    judge = ScriptedJudge(wrong_is_marked, false_alarm, missed, invalid, failed, seed=3)
    replies = [reply for votes in judge.critique([request(n) for n in range(800)], 2) for reply in votes]
    states = [reply.state for reply in replies]
    assert near(states.count("invalid"), len(replies), invalid)
    assert near(states.count("failed"), len(replies), failed)
    valid = [reply.critique.flagged for reply in replies if reply.critique is not None]
    for step, rate in enumerate([false_alarm, 1 - missed, false_alarm, 1 - missed]):
        assert near(sum(step in flagged for flagged in valid), len(valid), rate)
    both = sum(0 in flagged and 2 in flagged for flagged in valid)
    assert near(both, len(valid), false_alarm**2), "noise of two steps must be independent"


def test_noise_of_two_votes_is_independent():
    judge = ScriptedJudge(wrong_is_marked, false_alarm=0.3, seed=4)
    pairs = judge.critique([request(n, ["right"]) for n in range(2000)], 2)
    assert near(sum(all(reply.critique.flagged for reply in votes) for votes in pairs), 2000, 0.09)


def test_garbled_replies_are_invalid_in_many_ways():
    rng, reasons = random.Random(0), set()
    for trial in range(400):
        num_steps = trial % 4
        with pytest.raises(CritiqueError) as caught:
            parse(write_garbled(list(range(num_steps)), num_steps, NONCE, rng), num_steps, NONCE)
        reasons.add(caught.value.reason)
    assert reasons == set(Reason) - {Reason.TOO_LONG, Reason.CONFLICTING, Reason.BAD_JSON, Reason.WRONG_NONCE}


def test_plain_tags_work_without_a_nonce():
    rng = random.Random(0)
    for _ in range(50):
        assert parse(write_critique([0, 1, 2], 3, None, rng), 3).flagged == (0, 1, 2)
        with pytest.raises(CritiqueError):
            parse(write_garbled([1], 3, None, rng), 3)


def test_the_three_states():
    valid = JudgeReply.read("Judgment: Yes", 2, None, prompt_tokens=7, completion_tokens=3, seconds=0.5)
    assert (valid.state, valid.critique, valid.error) == ("valid", Critique(True, ()), None)
    assert (valid.prompt_tokens, valid.completion_tokens, valid.seconds) == (7, 3, 0.5)
    invalid = JudgeReply.read("whatever", 2, None)
    assert (invalid.state, invalid.critique, invalid.error) == ("invalid", None, "no_answer")
    assert invalid.text == "whatever"
    empty = JudgeReply.read("", 2, None)
    assert (empty.state, empty.error) == ("invalid", "empty_reply")
    assert JudgeReply(None, None, "timed out").state == "failed"
    trusted = JudgeReply.read("Judgment: Yes\n<incorrect_steps>1</incorrect_steps>", 2, None, trust="verdict")
    assert trusted.critique == Critique(True, ())


def test_from_requests_to_votes():
    judge = ScriptedJudge(wrong_is_marked, invalid=0.3, failed=0.3, seed=5)
    requests = [request(n) for n in range(30)]
    replies = judge.critique(requests, 4)
    votes = vote_table([[reply.critique for reply in row] for row in replies], [4] * 30, 4)
    for n, row in enumerate(replies):
        for k, reply in enumerate(row):
            expected = [0, 1, 0, 1] if reply.state == "valid" else [-1] * 4
            assert votes[4 * n : 4 * n + 4, k].tolist() == expected


@pytest.mark.parametrize(
    "rates", [{"missed": -0.1}, {"false_alarm": 1.1}, {"invalid": math.nan}, {"invalid": 0.6, "failed": 0.5}]
)
def test_impossible_rates_are_refused(rates):
    with pytest.raises(ValueError, match=next(iter(rates))):
        ScriptedJudge(wrong_is_marked, **rates)


def test_a_checker_must_label_every_step():
    with pytest.raises(ValueError, match="1 labels for 4 steps"):
        ScriptedJudge(lambda request: [True]).critique([request(0)], 1)


def test_odd_text_in_requests_is_no_obstacle():
    odd = JudgeRequest("\ud800\0", None, ("<step_0>", "\udfff", ""))
    assert ScriptedJudge(lambda request: [True] * 3).critique([odd], 1)[0][0].critique.flagged == (0, 1, 2)
