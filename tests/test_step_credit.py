"""What all adapters share: votes as one integer a token, and advantages that are a trainer's own but for the judge."""

import asyncio
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate

import capo
from capo import reference
from capo.judges import JudgeReply
from capo.judges.scripted import ScriptedJudge
from capo.shaping import MAX_VOTES, Rows, StepCredit, configured_credit, question_text, refuse, setting

# "!" is in wrong steps
TOKEN_BYTES = capo.TokenBytes([b"a", b".\n\n", b"!", b""], eos_ids=3)
WORD, END, BAD, EOS = range(4)
RESPONSES = [[WORD, END, WORD, BAD], [WORD, WORD, END, WORD, WORD, WORD]]
GOLDEN = [[1.75, 1.75, 0.5, 0.5], [-0.75] * 6]
JUDGE = ScriptedJudge(lambda request: ["!" in step for step in request.steps])
DEAF = ScriptedJudge(lambda request: [False] * len(request.steps), failed=1.0)
SILENT = capo.CreditRule(process_weight=0.0)


def credit_of(judge=JUDGE, **changes):
    return StepCredit(judge, TOKEN_BYTES, **changes)


def own(responses, value=0.25):
    return [torch.full((len(row),), value) for row in responses]


def test_the_golden_vector():
    credit = credit_of()
    votes = credit.votes(RESPONSES, ["?", "?"])
    host = own(RESPONSES)
    shaped = credit.shape(host, [1, 0], votes, 2)
    assert [row.tolist() for row in shaped] == GOLDEN
    assert all(row.unique().tolist() == [0.25] for row in host)
    assert credit.take_metrics() == {
        "capo/critiques/invalid": 0,
        "capo/critiques/failed": 0,
        "capo/undecided": 0,
        "capo/flag_rate/right": 0.5,
        "capo/flag_rate/wrong": 0,
        "capo/host_advantages": 0,
    }
    assert "capo/host_advantages" not in credit.take_metrics()


def test_the_same_padded_on_either_side_and_shifted():
    credit = credit_of()
    votes = credit.votes(RESPONSES, ["?", "?"])
    for left in (0, 1, 3):
        padded = torch.zeros(2, 9, dtype=torch.int32)
        mask = torch.zeros(2, 9, dtype=torch.int64)
        wanted = torch.zeros(2, 9)
        for row, (codes, advantages) in enumerate(zip(votes, GOLDEN, strict=True)):
            padded[row, left : left + len(codes)], mask[row, left : left + len(codes)] = codes, 1
            wanted[row, left : left + len(codes)] = torch.tensor(advantages)
        assert torch.equal(credit.shape(torch.ones(2, 9), [1, 0], padded, 2, mask), wanted)
        # one integer a token: it may travel as another number of the token does
        assert torch.equal(credit.shape(torch.ones(2, 9), [1, 0], padded.float(), 2, mask.bool()), wanted)


def test_masked_tokens_end_steps_and_get_nothing():
    responses = [[WORD, WORD, WORD, WORD, BAD], RESPONSES[1]]  # the tool in the middle parts two steps
    masks = [[1, 1, 0, 1, 1], [1] * 6]
    credit = credit_of()
    votes = credit.votes(responses, ["?", "?"], masks=masks)
    assert votes[0][2] == 0
    shaped = credit.shape(own(responses), [1, 0], votes, 2, [torch.tensor(mask) for mask in masks])
    assert shaped[0].tolist() == [1.75, 1.75, 0.0, 0.5, 0.5] and shaped[1].tolist() == GOLDEN[1]


def test_a_mask_that_narrows_after_judging_ends_steps_too():
    codes = credit_of().votes([[WORD] * 5], ["?"])[0]
    rows = Rows.of([codes], [torch.tensor([0, 1, 1, 0, 1])], None)
    steps, _ = rows.read_votes(codes)
    assert list(zip(steps.starts.tolist(), steps.ends.tolist(), strict=True)) == [(0, 2), (2, 3)]


@pytest.mark.parametrize("base", ["rule", "host"])
def test_without_a_valid_critique_or_a_penalty_the_trainers_own_bit_for_bit(base):
    host = [torch.tensor([0.1, float("nan"), -0.0, 1e-40]), torch.randn(6)]
    deaf = credit_of(DEAF, base=base)
    assert deaf.shape(host, [1, 0], deaf.votes(RESPONSES, ["?", "?"]), 2) is host
    assert deaf.take_metrics()["capo/critiques/failed"] == 10
    silent = StepCredit(None, None, rule=SILENT, base=base)
    assert silent.shape(host, [1, 0], silent.votes(RESPONSES, ["?", "?"]), 2) is host


def test_groups_keep_the_trainers_own_one_by_one():
    class Selective:
        def critique(self, requests, num_votes):
            answers = JUDGE.critique(requests, num_votes)
            failure = [JudgeReply.failure("deadline")] * num_votes
            return [failure if "silence" in r.question else a for r, a in zip(requests, answers, strict=True)]

    credit = credit_of(Selective())
    responses, questions = RESPONSES + RESPONSES, ["?", "?", "silence", "silence"]
    votes = credit.votes(responses, questions)
    host = [torch.randn(len(row)) for row in responses]
    shaped = credit.shape(host, [1, 0, 1, 0], votes, ["x", "x", "y", "y"])
    assert [row.tolist() for row in shaped[:2]] == GOLDEN and shaped[2] is host[2] and shaped[3] is host[3]
    mask = torch.tensor([[1] * len(row) + [0] * (6 - len(row)) for row in responses])
    padded = torch.nn.utils.rnn.pad_sequence(votes, batch_first=True)
    own_padded = torch.randn(4, 1).expand(4, 6)  # zero strides, as some trainers expand them
    result = credit.shape(own_padded, [1, 0, 1, 0], padded, 2, mask)
    assert torch.equal(result[2:], own_padded[2:]) and result[0].tolist() == [*GOLDEN[0], 0, 0]


def test_base_host_adds_what_critiques_change():
    responses = [*RESPONSES, [WORD, WORD]]
    host = [torch.full((4,), 3.0), torch.full((6,), -3.0), torch.full((2,), -0.0)]
    credit = credit_of(base="host")
    votes = credit.votes(responses, ["?"] * 3)
    shaped = credit.shape(host, [1, 0, 1], votes, [0, 0, 1])
    plain = capo.shape([1, 0], None, groups=2, steps=[[], []], token_ids=RESPONSES)
    for row, advantages, before, silent in zip(shaped, GOLDEN, host, plain, strict=False):
        assert torch.equal(row, before + (torch.tensor(advantages) - silent))
    assert shaped[2].signbit().all() and not shaped[2].any()  # heard, but nothing is flagged: not a bit changes


def test_undecided_outcomes_and_empty_responses():
    credit = credit_of()
    responses = [*RESPONSES, [], [WORD, BAD]]
    votes = credit.votes(responses, ["?"] * 4)
    shaped = credit.shape(own(responses), [1, 0, 0, None], votes, 4)
    assert [row.tolist() for row in shaped] == [*GOLDEN, [], [0.0, 0.0]]
    assert credit.take_metrics()["capo/undecided"] == 1
    assert credit.votes([], []) == [] and credit.votes([[]], ["?"])[0].tolist() == []
    assert credit.shape([torch.zeros(0)], [1], credit.votes([[]], ["?"]), 1)[0].tolist() == []


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_advantages_equal_the_reference(data):
    rule = capo.CreditRule.preset(
        data.draw(st.sampled_from(["capo", "vppo", "fapo", "papo", "grpo_process"])),
        vote=data.draw(st.sampled_from(["majority", "strict_majority", "intersection", "union", "average"])),
    )
    num_votes = data.draw(st.integers(1, 5))
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    masks = [torch.randint(0, 4, (n,), generator=generator) > 0 for n in lengths]
    ids = [torch.randint(0, 3, (n,), generator=generator).tolist() for n in lengths]
    noisy = ScriptedJudge(JUDGE.checker, false_alarm=0.3, missed=0.3, invalid=0.1, failed=0.1, seed=seed)
    credit = credit_of(noisy, rule=rule, num_votes=num_votes)
    votes = credit.votes(ids, ["?"] * len(ids), masks=masks)
    groups = torch.randint(0, 2, (len(ids),), generator=generator)
    outcomes = torch.randint(0, 2, (len(ids),), generator=generator).float()
    host = [torch.randn(n, generator=generator) for n in lengths]
    shaped = credit.shape(host, outcomes, votes, groups, masks)

    flat = torch.tensor([id_ for row in ids for id_ in row], dtype=torch.int64)
    rows = Rows.of([torch.tensor(row, dtype=torch.int64) for row in ids], masks, None)
    steps = rows.segment(flat, TOKEN_BYTES, "\n\n")
    requests = [capo.judges.JudgeRequest("?", None, tuple(t)) for t in capo.steps.step_texts(flat[rows.live], steps, TOKEN_BYTES)]  # fmt: skip
    replies = [noisy.critique([r], num_votes)[0] if r.steps else [] for r in requests]
    table = capo.critique.vote_table(
        [[reply.critique for reply in row] for row in replies], steps.cu_steps.diff().tolist(), num_votes
    )
    exact = reference.token_advantages(
        outcomes, table, steps.starts, steps.ends, steps.cu_steps, rows.cu_seqlens, groups, rule
    )
    of_step = torch.arange(len(ids)).repeat_interleave(steps.cu_steps.diff())
    heard = {int(groups[row]) for row in of_step[(table >= 0).any(1)].tolist()}
    for row, wanted in enumerate(exact.split(rows.cu_seqlens.diff().tolist())):
        if int(groups[row]) in heard:
            assert_as_accurate(shaped[row][masks[row]], wanted.float(), wanted)
            assert not shaped[row][~masks[row]].any()
        else:
            assert shaped is host or shaped[row] is host[row]


@given(
    st.lists(st.tuples(st.integers(1, 4), st.lists(st.sampled_from([-1, 0, 1]), min_size=3, max_size=3)), max_size=6)
)
@settings(max_examples=100, deadline=None)
def test_codes_give_back_steps_and_counts(drawn):
    sizes = torch.tensor([size for size, _ in drawn], dtype=torch.int64)
    ends = sizes.cumsum(0)
    steps = capo.Steps(ends - sizes, ends, torch.tensor([0, len(drawn)]))
    votes = torch.tensor([votes for _, votes in drawn], dtype=torch.int8).reshape(-1, 3)
    rows = Rows.of([torch.zeros(int(sizes.sum()) + 2, dtype=torch.int64)], None, None)
    (codes,) = rows.vote_codes(steps, votes)
    found, table = rows.read_votes(codes)
    assert found.starts.tolist() == steps.starts.tolist() and found.ends.tolist() == ends.tolist()
    assert found.cu_steps.tolist() == [0, len(drawn)]
    for kind in (0, 1):
        assert (table == kind).sum(1).tolist() == (votes == kind).sum(1).tolist()
    assert codes.max() <= 2**15


def test_codes_have_room_for_the_most_votes():
    rows = Rows.of([torch.zeros(3, dtype=torch.int64)], None, None)
    steps = capo.Steps(*map(torch.tensor, ([0], [3], [0, 1])))
    votes = torch.ones(1, MAX_VOTES, dtype=torch.int8)
    _, table = rows.read_votes(rows.vote_codes(steps, votes)[0])
    assert torch.equal(table, votes)


@pytest.mark.parametrize(
    "codes",
    [
        torch.tensor([770.0, 769.0]).bfloat16() + 1.0,  # rounded
        torch.tensor([0.5, 1.0]),
        torch.tensor([-1, 1]),
        torch.tensor([3, 3]),  # one against, of none
        torch.tensor([2**15 + 1, 0]),
        torch.tensor([float("nan"), 0.0]),
    ],
)
def test_numbers_that_are_no_codes_are_refused(codes):
    with pytest.raises(ValueError, match="no code of StepCredit.votes"):
        Rows.of([codes], None, None).read_votes(codes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "both"}, "base must be rule or host, got 'both'"),
        ({"num_votes": 0}, "num_votes must be in 1..127, got 0"),
        ({"num_votes": 128}, "num_votes must be in 1..127, got 128"),
        ({"rule": "grpo"}, "rule='grpo' looks at outcomes only"),
        ({"judge": None}, "judge must have a method critique"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        credit_of(**changes)


def test_token_bytes_are_needed_where_a_judge_is():
    with pytest.raises(ValueError, match="token_bytes must be a capo.TokenBytes, got None"):
        StepCredit(JUDGE, None)


def test_bad_arguments_are_named():
    credit = credit_of()
    with pytest.raises(ValueError, match="2 responses, but 1 questions"):
        credit.votes(RESPONSES, ["?"])
    votes = credit.votes(RESPONSES, ["?", "?"])
    with pytest.raises(ValueError, match="votes must be laid out as the advantages are"):
        credit.shape(own(RESPONSES), [1, 0], votes[::-1], 2)
    with pytest.raises(ValueError, match="votes must be laid out as the advantages are"):
        credit.shape(torch.zeros(2, 6), [1, 0], votes, 2)
    with pytest.raises(ValueError, match="outcomes must have one entry for each of 2 rows"):
        credit.shape(own(RESPONSES), [1], votes, 2)


def test_a_judge_that_gives_too_few_replies():
    class Lazy:
        def critique(self, requests, num_votes):
            return [[] for _ in requests]

    with pytest.raises(ValueError, match=r"asked for 5 critiques of each of 2 responses, and gave lists of \[0, 0\]"):
        credit_of(Lazy()).votes(RESPONSES, ["?", "?"])


def test_judges_may_be_async_and_callers_may_run_a_loop():
    class Async:
        async def critique(self, requests, num_votes):
            await asyncio.sleep(0)
            return JUDGE.critique(requests, num_votes)

    async def both():
        credit = credit_of(Async())
        beside = await credit.votes_async(RESPONSES, ["?", "?"])
        return beside, credit.votes(RESPONSES, ["?", "?"])  # in the way of the loop, but not stuck

    beside, waited = asyncio.run(both())
    wanted = credit_of().votes(RESPONSES, ["?", "?"])
    assert all(map(torch.equal, beside, wanted)) and all(map(torch.equal, waited, wanted))


def test_what_the_judge_is_asked():
    seen = []

    class Curious:
        def critique(self, requests, num_votes):
            seen.extend(requests)
            return JUDGE.critique(requests, num_votes)

    credit_of(Curious()).votes([[WORD, BAD], [], [END, WORD]], ["one", "two", "three"], ["1", "2", None])
    assert [(r.question, r.reference, r.steps) for r in seen] == [
        ("one", "1", ("a!",)),
        ("three", None, (".\n\n", "a")),
    ]


made = None


def make():
    global made
    made = credit_of()
    return made


@pytest.fixture
def configured(monkeypatch):
    configured_credit.cache_clear()
    yield lambda path: monkeypatch.setenv("CAPO_CREDIT", path)
    configured_credit.cache_clear()


def test_credit_by_import_path(configured, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_lib", sys.modules[__name__])
    configured("my_lib.make")
    assert configured_credit() is made and configured_credit() is made


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("", ValueError, "CAPO_CREDIT must be the import path"),
        ("credit", ValueError, "CAPO_CREDIT must be the import path"),
        ("no_such_lib.credit", ValueError, "cannot be imported"),
        ("math.credit", ValueError, "cannot be imported"),
        ("math.pi", TypeError, "not a capo.StepCredit"),
    ],
)
def test_credit_by_a_wrong_path(configured, path, error, message):
    configured(path)
    with pytest.raises(error, match=message):
        configured_credit()


def test_refusals_name_the_setting_and_the_reason():
    with pytest.raises(ValueError, match="^a.b='x' does not go with step-level credit: because$"):
        refuse(credit_of(), c=(1, None), a__b=("x", "because"))
    refuse(StepCredit(None, None, rule=SILENT), a=("x", "because"))


def test_settings_are_found_in_mappings_and_objects():
    class Config:
        inner = {"a": {"b": 3}}  # noqa: RUF012

    assert setting(Config, "inner.a.b") == 3 and setting(Config, "inner.c.b", 4) == 4
    assert setting(Config, "outer.a") is None and setting(None, "a", 5) == 5 and setting({"a": None}, "a", 6) == 6


def test_questions_are_texts_or_messages():
    assert question_text("why?") == "why?" and question_text([{"role": "user", "content": "why?"}]) == "why?"
    parts = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"text": "wh"}, {"text": "y?"}]}]
    assert question_text(parts) == "system: be brief\n\nuser: why?"


def test_adapters_import_no_trainer():
    names = ["areal", "nemo_rl", "openrlhf", "prime_rl", "skyrl", "slime", "tinker"]
    code = (
        "import sys, importlib\n"
        f"for name in {names}: importlib.import_module('capo.integrations.' + name)\n"
        f"assert not {set(names) | {'ray', 'transformers', 'megatron', 'tinker_cookbook'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)
