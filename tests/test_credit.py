"""Credit: votes, rewards, normalisation; every rule against hand-made tables and the token-by-token reference."""

import dataclasses

import pytest
import torch
from batches import lengths_to_cu, random_credit

import capo
from capo import Credit, CreditRule, Steps, backends
from capo.reference import step_weights, token_advantages

PRESETS = ("capo", "grpo", "dr_grpo", "rloo", "opo", "grpo_process", "vppo", "fapo", "papo")
VOTES = ("majority", "strict_majority", "intersection", "union", "average")


def make(outcomes, steps, flags, lengths=None, groups=None, rule=None) -> Credit:
    """Steps as lengths per response, without gaps; flags as the votes of each step."""
    lengths = lengths or [sum(s) for s in steps]
    starts, ends = [], []
    for first, own in zip(lengths_to_cu(lengths).tolist(), steps, strict=False):
        for length in own:
            starts.append(first)
            first += length
            ends.append(first)
    votes = torch.tensor([[v] if isinstance(v, int) else v for v in flags]) if flags else torch.empty(0, 1)
    return Credit(
        torch.tensor(outcomes, dtype=torch.float32),
        votes.to(torch.int8),
        Steps(
            torch.tensor(starts, dtype=torch.int64),
            torch.tensor(ends, dtype=torch.int64),
            lengths_to_cu([len(s) for s in steps]),
        ),
        lengths_to_cu(lengths),
        torch.zeros(len(outcomes), dtype=torch.int32) if groups is None else torch.tensor(groups),
        rule or CreditRule(),
    )


def golden(rule=None) -> Credit:
    return make([1, 0], [[2, 2], [3, 3]], [0, 1, 0, 0], rule=rule)


def moved(credit: Credit, device) -> Credit:
    return Credit(
        credit.outcomes.to(device), credit.votes.to(device), credit.steps.to(device), credit.cu_seqlens.to(device),
        credit.groups.to(device), credit.rule,
    )  # fmt: skip


def truth(credit: Credit) -> torch.Tensor:
    steps = credit.steps
    return token_advantages(
        credit.outcomes,
        credit.votes,
        steps.starts,
        steps.ends,
        steps.cu_steps,
        credit.cu_seqlens,
        credit.groups,
        credit.rule,
    )


def same(credit: Credit, expected, device) -> None:
    actual = moved(credit, device).advantages().cpu()
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float32), rtol=2e-7, atol=0)


def test_the_golden_vector_of_the_paper(device):
    same(golden(), [1.75, 1.75, 0.5, 0.5] + [-0.75] * 6, device)


# Rows: n valid votes, c flagging -> weight. Ties, abstentions, one vote, no vote.
@pytest.mark.parametrize(
    ("votes", "majority", "strict", "intersection", "union", "average"),
    [
        ([1, 0], 1, 0, 0, 1, 0.5),
        ([1, 1, 0, 0], 1, 0, 0, 1, 0.5),
        ([1, 0, 0, 0], 0, 0, 0, 1, 0.25),
        ([1, 1, 1, 0], 1, 1, 0, 1, 0.75),
        ([1, 1, 1, 1], 1, 1, 1, 1, 1),
        ([0, 0, 0, 0], 0, 0, 0, 0, 0),
        ([1, -1, -1, -1], 1, 1, 1, 1, 1),
        ([1, 0, -1, -1], 1, 0, 0, 1, 0.5),
        ([0, -1, -1, -1], 0, 0, 0, 0, 0),
        ([1, 1, -1, 0], 1, 1, 0, 1, 2 / 3),
        ([-1, -1, -1, -1], 0, 0, 0, 0, 0),
        ([1], 1, 1, 1, 1, 1),
        ([0], 0, 0, 0, 0, 0),
        ([-1], 0, 0, 0, 0, 0),
        ([], 0, 0, 0, 0, 0),
        # more than a machine word of votes
        ([1] * 8 + [0], 1, 1, 0, 1, 8 / 9),
        ([0] * 8 + [1], 0, 0, 0, 1, 1 / 9),
        ([-1] * 8 + [1], 1, 1, 1, 1, 1),
        ([1] * 8 + [0] * 8, 1, 0, 0, 1, 0.5),
        ([1] * 5 + [-1] * 7 + [0] * 5, 1, 0, 0, 1, 0.5),
        ([1, 0, -1] * 100, 1, 0, 0, 1, 0.5),
    ],
)
def test_step_weights(votes, majority, strict, intersection, union, average, device):
    for vote, weight in zip(VOTES, (majority, strict, intersection, union, average), strict=True):
        table = torch.tensor([votes], dtype=torch.int8).reshape(1, -1)
        assert float(step_weights(table, vote)) == pytest.approx(weight, abs=1e-15)
        # Response 0 has reward 2 - weight on its one token; response 1 has reward 0; mean-only keeps the numbers simple.
        rule = CreditRule(vote=vote, normalize="group_mean")
        credit = make([1, 0], [[1], []], [votes], lengths=[1, 1], rule=rule)
        half = (2 - weight) / 2
        torch.testing.assert_close(
            moved(credit, device).advantages().cpu(),
            torch.tensor([half, -half], dtype=torch.float32),
            rtol=1e-6,
            atol=0,
        )


def test_presets_by_hand(device):
    # Two right responses, one of them flawed in its second step, and one wrong with an error in its second step.
    base = make([1, 1, 0], [[2, 1], [1, 1], [1, 2]], [0, 0, 0, 1, 0, 1])
    third = 1 / 3
    sd = (third) ** 0.5  # sample std of 1, 1, 0
    expected = {
        "grpo": [third / sd] * 5 + [-2 * third / sd] * 3,
        "dr_grpo": [third] * 5 + [-2 * third] * 3,
        "rloo": [0.5] * 5 + [-1.0] * 3,
        "opo": [1 - 5 / 8] * 5 + [-5 / 8] * 3,
        # R: 1, 1, 0 for the prefix token 0.5 (alpha), 0 beyond; means 1, 1, 1/6.
        "vppo": [1 - 13 / 18] * 5 + [0.5 - 13 / 18] + [-13 / 18] * 2,
        # rewards 1, 0, -1: sample std 1.
        "fapo": [1.0] * 3 + [0.0] * 2 + [-1.0] * 3,
        # outcome as in grpo; shares of unflagged steps 1 and 1/2 over the right ones: +-1/sqrt 2.
        "papo": [third / sd + 0.5**0.5] * 3 + [third / sd - 0.5**0.5] * 2 + [-2 * third / sd] * 3,
    }
    # Step rewards 0, 0, 0, -1, 0, -1: mean -1/3, population std sqrt(2)/3: 0 -> 1/sqrt 2, -1 -> -sqrt 2. Sums over later steps.
    good, bad = 0.5**0.5, -(2**0.5)
    expected["grpo_process"] = [2 * good, 2 * good, good, good + bad, bad, good + bad, bad, bad]
    for name, values in expected.items():
        credit = dataclasses.replace(base, rule=CreditRule.preset(name))
        torch.testing.assert_close(
            moved(credit, device).advantages().cpu(), torch.tensor(values, dtype=torch.float32), rtol=1e-6, atol=1e-7,
            msg=lambda m, name=name: f"{name}: {m}",
        )  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("vote", VOTES)
def test_every_rule_equals_the_reference(name, vote, device):
    for seed in range(25):
        credit = random_credit(seed, num_votes=seed % 5, rule=CreditRule.preset(name, vote=vote))
        expected = truth(credit)
        actual = moved(credit, device).advantages().cpu()
        assert actual.dtype == torch.float32
        torch.testing.assert_close(
            actual.double(), expected, rtol=1e-6, atol=1e-9, msg=lambda m, s=seed: f"seed {s}: {m}"
        )


@pytest.mark.parametrize("normalize", ["group_tokens", "group_mean", "responses", "responses_mean", "leave_one_out"])
@pytest.mark.parametrize("reward", ["step", "prefix", "flawed"])
def test_every_reward_with_every_normalisation(normalize, reward, device):
    for seed in range(10):
        rule = CreditRule(
            normalize=normalize, reward=reward, outcome_weight=1.5, process_weight=0.7, std_floor=0.4, clamp=0.9
        )
        credit = random_credit(seed, rule=rule)
        expected = truth(credit)
        assert float(expected.abs().max()) <= 0.9
        torch.testing.assert_close(moved(credit, device).advantages().cpu().double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("normalize", ["group_tokens", "group_mean", "responses", "responses_mean", "leave_one_out"])
def test_without_process_weight_steps_and_votes_have_no_influence_bit_for_bit(normalize, device):
    for seed in range(10):
        credit = random_credit(seed, rule=CreditRule(process_weight=0.0, normalize=normalize, outcome_weight=1.7))
        outcomes = torch.rand(credit.outcomes.shape, generator=torch.Generator().manual_seed(seed))
        credit = dataclasses.replace(credit, outcomes=outcomes)
        bare = dataclasses.replace(
            credit,
            votes=torch.empty(0, 0, dtype=torch.int8),
            steps=Steps(
                torch.empty(0, dtype=torch.int64),
                torch.empty(0, dtype=torch.int64),
                torch.zeros_like(credit.cu_seqlens),
            ),
        )
        assert torch.equal(moved(credit, device).advantages(), moved(bare, device).advantages())


@pytest.mark.parametrize("name", PRESETS)
def test_constant_groups_have_advantage_zero(name, device):
    rule = CreditRule.preset(name)
    for outcome in (0.0, 1.0, 0.1, 1 / 3):
        clear = make([outcome] * 3, [[2, 1], [1, 4], [3]], [0, 0, 0, 0, 0], rule=rule)
        assert not moved(clear, device).advantages().any()
    alone = make([1], [[2, 3]], [0, 0], rule=rule)
    assert not moved(alone, device).advantages().any()


def test_a_group_whose_rewards_differ_in_the_last_bit_is_not_constant(device):
    near = torch.tensor([1.0, 1.0]).nextafter(torch.tensor([1.0, 2.0])).tolist()
    advantages = moved(make(near, [[3], [3]], [0, 0]), device).advantages()
    torch.testing.assert_close(advantages.cpu(), torch.tensor([-1.0] * 3 + [1.0] * 3))


def test_one_flagged_token_among_many_is_amplified_as_the_formula_says(device):
    credit = make([1, 1], [[999, 1], [1000]], [0, 1, 0])
    p = 1 / 2000
    advantages = moved(credit, device).advantages().cpu()
    assert float(advantages[999]) == pytest.approx(-(((1 - p) / p) ** 0.5), rel=1e-6)
    held = moved(dataclasses.replace(credit, rule=CreditRule(clamp=5.0)), device).advantages()
    assert float(held.min()) == -5.0
    floored = moved(dataclasses.replace(credit, rule=CreditRule(std_floor=0.5)), device).advantages().cpu()
    assert float(floored[999]) == pytest.approx(-(1 - p) / 0.5, rel=1e-6)


def test_statistics_do_not_cancel(device):
    # A large common reward and a tiny spread: the difference of sums of squares would lose all digits.
    credit = make([1000.0, 1000.0], [[500, 500], [1000]], [0, 1, 0], rule=CreditRule(process_weight=1e-4))
    expected = truth(credit)
    torch.testing.assert_close(moved(credit, device).advantages().cpu().double(), expected, rtol=1e-5, atol=0)


def test_groups_are_ids_in_any_order_and_do_not_mix(device):
    apart = golden()
    other = make([1, 1, 0], [[1], [5], [2]], [1, 0, 0])
    mixed = make(
        [1, 1, 0, 1, 0],
        [[1], [2, 2], [3, 3], [5], [2]],
        [1, 0, 1, 0, 0, 0, 0],
        groups=[2**31 - 1, -7, -7, 2**31 - 1, 2**31 - 1],
    )
    a, b = moved(apart, device).advantages(), moved(other, device).advantages()
    assert torch.equal(moved(mixed, device).advantages(), torch.cat([b[:1], a, b[1:]]))


def test_an_undecided_outcome_leaves_its_group(device):
    with_undecided = make([1, float("nan"), 0], [[2, 2], [4], [3, 3]], [0, 1, 1, 0, 0])
    advantages = moved(with_undecided, device).advantages()
    without = moved(golden(), device).advantages()
    assert torch.equal(advantages, torch.cat([without[:4], torch.zeros(4, device=device), without[4:]]))
    assert not moved(make([float("nan")] * 2, [[1], [2]], [1, 0]), device).advantages().any()


@pytest.mark.parametrize("vote", VOTES)
def test_votes_only_take_reward_away(vote, device):
    """Whatever a judge is made to say of a response, no token of it has more reward than its outcome gives."""
    for seed in range(10):
        credit = random_credit(seed, num_votes=4, rule=CreditRule(vote=vote, normalize="group_mean"))
        alone = dataclasses.replace(credit, groups=torch.arange(len(credit.outcomes)))
        # Alone in its group a response has mean reward 0; its best token is one that nobody has flagged.
        steps = step_weights(credit.votes, vote)
        rewards = 2 * credit.outcomes.double().repeat_interleave(credit.cu_seqlens.diff())
        for start, end, weight in zip(credit.steps.starts, credit.steps.ends, steps, strict=True):
            rewards[start:end] -= weight
        means = [part.mean() if len(part) else part.sum() for part in rewards.split(credit.cu_seqlens.diff().tolist())]
        expected = rewards - torch.stack(means).repeat_interleave(credit.cu_seqlens.diff())
        assert bool((steps >= 0).all())
        torch.testing.assert_close(moved(alone, device).advantages().cpu().double(), expected, rtol=1e-6, atol=1e-6)


def test_tokens_outside_all_steps_have_weight_zero(device):
    credit = Credit(
        torch.tensor([1.0, 0.0]),
        torch.tensor([[1], [1]], dtype=torch.int8),
        Steps(torch.tensor([1, 3]), torch.tensor([2, 3]), torch.tensor([0, 2, 2])),
        torch.tensor([0, 4, 6]),
        torch.tensor([0, 0]),
        CreditRule(normalize="group_mean"),
    )
    mean = (2 + 1 + 2 + 2) / 6
    same(credit, [2 - mean, 1 - mean, 2 - mean, 2 - mean, -mean, -mean], device)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_empty_everything(index_dtype, device):
    nothing = Credit(
        torch.empty(0), torch.empty(0, 3, dtype=torch.int8),
        Steps(*(torch.empty(0, dtype=index_dtype),) * 2, torch.zeros(1, dtype=index_dtype)),
        torch.zeros(1, dtype=index_dtype), torch.empty(0, dtype=torch.int32),
    )  # fmt: skip
    assert moved(nothing, device).advantages().shape == (0,)
    empty_responses = make([1, 0, 1], [[], [], []], [], lengths=[0, 3, 0])
    assert not moved(empty_responses, device).advantages().any()
    for name in PRESETS:
        credit = dataclasses.replace(
            make([1, 0, 1], [[], [2], []], [[1, 1]], lengths=[0, 2, 3]), rule=CreditRule.preset(name)
        )
        torch.testing.assert_close(
            moved(credit, device).advantages().cpu().double(), truth(credit), rtol=1e-6, atol=1e-9
        )


def test_non_contiguous_inputs_and_many_votes(device):
    credit = random_credit(3, num_votes=1024)
    strided = dataclasses.replace(credit, votes=credit.votes.t().contiguous().t())
    assert not strided.votes.is_contiguous()
    assert torch.equal(moved(strided, device).advantages(), moved(credit, device).advantages())
    torch.testing.assert_close(moved(credit, device).advantages().cpu().double(), truth(credit), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("lengths", [[1] * 10_000, [10_000]], ids=["each token a step", "one step"])
def test_as_many_steps_as_tokens_and_one(lengths, device):
    generator = torch.Generator().manual_seed(0)
    flags = torch.randint(-1, 2, (2 * len(lengths), 3), generator=generator).tolist()
    credit = make([1, 0], [lengths, lengths], flags)
    advantages = moved(credit, device).advantages().cpu()
    torch.testing.assert_close(advantages.double(), truth(credit), rtol=1e-6, atol=1e-9)
    assert len(set(advantages.tolist())) == (4 if len(lengths) > 1 else 2)


def test_result_does_not_depend_on_the_order_of_votes_or_on_threads(device):
    credit = random_credit(5, num_responses=40, num_votes=6)
    advantages = moved(credit, device).advantages()
    shuffled = dataclasses.replace(credit, votes=credit.votes[:, torch.randperm(6)])
    assert torch.equal(moved(shuffled, device).advantages(), advantages)
    threads = torch.get_num_threads()
    try:
        for number in (1, 3, 64):
            torch.set_num_threads(number)
            assert torch.equal(moved(credit, device).advantages(), advantages)
    finally:
        torch.set_num_threads(threads)


def test_only_minus_one_nought_and_one_are_votes(device):
    for vote in range(-128, 128):
        votes = torch.zeros(4, 11, dtype=torch.int8)
        votes[2, vote % 11] = vote
        credit = moved(dataclasses.replace(golden(), votes=votes), device)
        if vote in (-1, 0, 1):
            credit.advantages()
        else:
            with pytest.raises(ValueError, match=f"got {vote} for step 2"):
                credit.advantages()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"votes": torch.tensor([[0], [2], [0], [0]], dtype=torch.int8)},
            r"votes must be -1, 0 or 1, got 2 for step 1",
        ),
        (
            {"votes": torch.tensor([[0], [0], [0], [-2]], dtype=torch.int8)},
            r"votes must be -1, 0 or 1, got -2 for step 3",
        ),
        ({"outcomes": torch.tensor([1.0, float("inf")])}, r"outcome inf of response 1"),
        ({"cu_seqlens": torch.tensor([0, 11, 10])}, r"cu_seqlens must rise from 0 to 10"),
        ({"cu_seqlens": torch.tensor([1, 4, 10])}, r"cu_seqlens must rise from 0 to 10"),
        ({"steps": ([0, 1, 4, 7], [2, 4, 7, 10], [0, 2, 4])}, r"step 1 is \[1, 4\)"),
        ({"steps": ([0, 2, 4, 7], [2, 5, 7, 10], [0, 2, 4])}, r"step 1 is \[2, 5\).*response 0"),
        ({"steps": ([0, 2, 4, 7], [2, 4, 7, 11], [0, 2, 4])}, r"step 3 is \[7, 11\)"),
        ({"steps": ([0, 2, 4, 7], [2, 1, 7, 10], [0, 2, 4])}, r"step 1 is \[2, 1\)"),
        ({"steps": ([0, 2, 3, 7], [2, 4, 7, 10], [0, 2, 4])}, r"step 2 is \[3, 7\).*response 1"),
        ({"steps": ([-1, 2, 4, 7], [2, 4, 7, 10], [0, 2, 4])}, r"step 0 is \[-1, 2\)"),
        ({"steps": ([0, 2, 4, 7], [2, 4, 7, 10], [0, 5, 4])}, r"cu_steps must rise from 0 to 4"),
    ],
)
def test_bad_values_are_named(change, message, device):
    if "steps" in change:
        change = {"steps": Steps(*map(torch.tensor, change["steps"]))}
    credit = dataclasses.replace(golden(), **change)
    with pytest.raises(ValueError, match=message):
        moved(credit, device).advantages()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"votes": torch.zeros(3, 1, dtype=torch.int8)}, r"votes must be int8 \[4, K\], got int8 \[3, 1\]"),
        ({"votes": torch.zeros(4, 1)}, r"votes must be int8"),
        ({"outcomes": torch.zeros(3)}, r"outcomes must be float \[2\]"),
        ({"outcomes": torch.zeros(2, dtype=torch.int64)}, r"outcomes must be float"),
        ({"groups": torch.zeros(2)}, r"groups must be integer \[2\]"),
        ({"groups": torch.zeros(3, dtype=torch.int32)}, r"groups must be integer \[2\]"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0, 10.0])}, r"cu_seqlens must be int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 10])}, r"outcomes must be float \[1\]"),
    ],
)
def test_bad_shapes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(golden(), **change)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vote": "median"}, "vote must be one of majority"),
        ({"normalize": "batch"}, "normalize must be one of group_tokens"),
        ({"reward": "token"}, "reward must be one of step"),
        ({"outcome_weight": float("nan")}, "outcome_weight must be finite"),
        ({"process_weight": -1.0}, "process_weight must be finite and at least 0, got -1.0"),
        ({"std_floor": float("inf")}, "std_floor must be finite"),
        ({"clamp": 0.0}, "clamp must be finite and above 0"),
        ({"reward": "step_suffix"}, "belong together"),
        ({"normalize": "group_steps"}, "belong together"),
        ({"reward": "share", "normalize": "group_tokens"}, "needs normalize='responses'"),
    ],
)
def test_bad_rules_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        CreditRule(**fields)


def test_presets_by_name():
    assert CreditRule.preset("capo") == CreditRule()
    assert CreditRule.preset("vppo", vote="union").vote == "union"
    with pytest.raises(ValueError, match="name must be one of capo, grpo"):
        CreditRule.preset("ppo")


def test_the_op_passes_opcheck(device):
    credit = moved(random_credit(1), device)
    steps = credit.steps
    args = (
        credit.outcomes, credit.votes, steps.starts, steps.ends, steps.cu_steps, credit.cu_seqlens, credit.groups,
        int(credit.cu_seqlens[-1]), *capo.ops._fields(credit.rule),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.capo.credit.default, args)


@pytest.mark.parametrize("normalize", ["responses", "responses_mean", "leave_one_out", "group_tokens", "group_mean"])
@pytest.mark.parametrize("size", [7, 10])
def test_equal_rewards_that_are_no_round_numbers_give_exactly_zero(normalize, size, device):
    rule = CreditRule(normalize=normalize, outcome_weight=1.0)
    for outcome in (0.1, 1 / 3, 0.7):
        credit = make([outcome] * size, [[1, 2]] * size, [0] * 2 * size, rule=rule)
        assert not moved(credit, device).advantages().any()


def test_means_that_differ_by_rounding_only_are_equal(device):
    # Rewards 0.1 and 0.1 - 0.3 in shares 1:2 and 2:4: the same mean but for the order of additions.
    rule = CreditRule(normalize="responses", outcome_weight=1.0, process_weight=0.3)
    steps = [[1, 2], [1, 1, 2, 2], [1, 1, 1, 2, 2, 2], [2, 1], [4, 2]]
    flags = [0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0]
    credit = make([0.1] * 5, steps, flags, rule=rule)
    assert not moved(credit, device).advantages().any()


@pytest.mark.parametrize("normalize", ["responses", "responses_mean", "leave_one_out"])
def test_rewards_that_differ_by_rounding_only_are_equal(normalize, device):
    # 0.1 * 3 - 0.1 and 0.1 * 2
    rule = CreditRule(normalize=normalize, outcome_weight=0.1, process_weight=0.1)
    credit = make([3.0, 2.0], [[2], [2]], [1, 0], rule=rule)
    assert 0.1 * 3.0 - 0.1 != 0.1 * 2.0
    assert not moved(credit, device).advantages().any()


@pytest.mark.skipif(backends.why_not("native", "cpu") is not None, reason="no native module")
def test_large_advantages_take_memory_again_that_nobody_has():
    size = 1 << 20
    steps = Steps(torch.tensor([0, size]), torch.tensor([9, 2 * size]), torch.tensor([0, 1, 2]))
    votes = torch.tensor([[1], [0]], dtype=torch.int8)
    cu_seqlens = torch.tensor([0, size, 2 * size])
    credit = Credit(torch.tensor([1.0, 0.0]), votes, steps, cu_seqlens, torch.tensor([0, 0]))
    with capo.use_backend("native"):
        first = credit.advantages()
        kept, before = first[3:5], first.clone()
        second = credit.advantages()
        assert second.data_ptr() != first.data_ptr()
        address = second.data_ptr()
        del second
        third = credit.advantages()
        assert third.data_ptr() == address and torch.equal(third, before)
        del first, third
        fourth = dataclasses.replace(credit, outcomes=1 - credit.outcomes).advantages()
    assert torch.equal(kept, before[3:5]) and not torch.equal(fourth, before)
