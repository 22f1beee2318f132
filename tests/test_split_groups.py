import dataclasses

import pytest
import torch
from batches import random_credit
from numerics import assert_as_accurate

import capo
from capo.split_groups import MOMENTS, gathered_advantages, response_moments, without_steps

RULES = ["capo", "grpo", "dr_grpo", "rloo", "opo", "vppo", "fapo"]


def part(credit, low, high):
    """Some consecutive responses of a credit, as a process of its own would hold them."""
    steps = credit.steps
    first, last = int(steps.cu_steps[low]), int(steps.cu_steps[high])
    begin = int(credit.cu_seqlens[low])
    return dataclasses.replace(
        credit,
        outcomes=credit.outcomes[low:high],
        votes=credit.votes[first:last],
        steps=capo.Steps(
            steps.starts[first:last] - begin, steps.ends[first:last] - begin, steps.cu_steps[low : high + 1] - first
        ),
        cu_seqlens=credit.cu_seqlens[low : high + 1] - begin,
        groups=credit.groups[low:high],
    )


def split(credit, at=3):
    return [part(credit, 0, at), part(credit, at, len(credit.outcomes))]


def gathered(parts, groups):
    moments = torch.cat([response_moments(each) for each in parts])
    assert moments.shape == (len(groups), MOMENTS) and moments.dtype == torch.float64
    return torch.cat([gathered_advantages(each, moments, groups) for each in parts])


def truth(credit):
    parts = credit.steps.starts, credit.steps.ends, credit.steps.cu_steps, credit.cu_seqlens, credit.groups
    return capo.reference.token_advantages(credit.outcomes, credit.votes, *parts, credit.rule)


@pytest.mark.parametrize("vote", ["majority", "average"])
@pytest.mark.parametrize("name", RULES)
def test_split_groups_have_the_advantages_of_whole_ones(name, vote):
    for seed in range(6):
        credit = random_credit(seed, rule=capo.CreditRule.preset(name, vote=vote), num_groups=1 + seed % 3)
        if seed % 4 == 0:
            credit.outcomes[1] = float("nan")
        if seed % 5 == 0:
            credit = dataclasses.replace(credit, outcomes=credit.outcomes * 0.3 - 0.1)
        exact = truth(credit)
        assert_as_accurate(gathered(split(credit), credit.groups), exact.float(), exact, size=1.0)


def test_the_golden_vector_over_two_processes():
    credit = capo.Credit(
        torch.tensor([1.0, 0.0]),
        torch.tensor([[0], [1], [0], [0]], dtype=torch.int8),
        capo.Steps(torch.tensor([0, 2, 4, 7]), torch.tensor([2, 4, 7, 10]), torch.tensor([0, 2, 4])),
        torch.tensor([0, 4, 10]),
        torch.tensor([7, 7]),
    )
    assert gathered(split(credit, 1), credit.groups).tolist() == [1.75, 1.75, 0.5, 0.5] + [-0.75] * 6


@pytest.mark.parametrize("name", RULES)
def test_groups_that_are_constant_over_all_processes_have_advantage_zero_exactly(name):
    """By smallest and largest reward: sums of 0.1 differ in their last bits from process to process."""
    base = random_credit(3, num_responses=9, rule=capo.CreditRule.preset(name), num_groups=1)
    credit = dataclasses.replace(base, outcomes=torch.full((9,), 0.1), votes=torch.zeros_like(base.votes))
    for at in (1, 4, 8):
        assert not gathered(split(credit, at), credit.groups).any()


def test_a_reward_that_differs_in_its_last_bit_is_not_constant():
    credit = random_credit(3, num_responses=9, num_groups=1)
    votes, outcomes = torch.zeros_like(credit.votes), torch.full((9,), 0.1)
    outcomes[int(credit.cu_seqlens.diff().argmax())] = torch.nextafter(torch.tensor(0.1), torch.tensor(1.0))
    credit = dataclasses.replace(credit, outcomes=outcomes, votes=votes)
    result = gathered(split(credit), credit.groups)
    assert result.any() and torch.equal(result, credit.advantages())


def test_large_rewards_do_not_cancel():
    credit = random_credit(1, num_groups=1)
    credit = dataclasses.replace(credit, outcomes=credit.outcomes + 1e6, rule=capo.CreditRule(outcome_weight=1.0))
    exact = truth(credit)
    assert_as_accurate(gathered(split(credit), credit.groups), exact.float(), exact, size=1.0)


def test_the_order_and_number_of_processes_do_not_matter_bit_for_bit():
    credit = random_credit(5, num_responses=12, num_groups=3)
    one = gathered([credit], credit.groups)
    assert torch.equal(one, gathered(split(credit, 5), credit.groups))
    assert torch.equal(one, gathered([part(credit, i, i + 1) for i in range(12)], credit.groups))


def test_groups_of_undecided_responses_are_zero_wherever_they_are():
    credit = random_credit(2, num_groups=2)
    nothing = dataclasses.replace(credit, outcomes=torch.full_like(credit.outcomes, float("nan")))
    assert not gathered(split(nothing), nothing.groups).any()
    one = dataclasses.replace(
        credit, outcomes=credit.outcomes.masked_fill(credit.groups == credit.groups[0], float("nan"))
    )
    assert torch.equal(gathered(split(one), one.groups), one.advantages())


@pytest.mark.parametrize("name", ["grpo_process", "papo"])
def test_rules_that_need_whole_groups_say_so(name):
    with pytest.raises(ValueError, match="needs the steps of whole groups in one process"):
        response_moments(random_credit(0, rule=capo.CreditRule.preset(name)))


def test_bad_credit_is_named():
    credit = random_credit(0)
    credit.votes[1, 0] = 2
    with pytest.raises(ValueError, match="votes must be -1, 0 or 1, got 2 for step 1"):
        response_moments(credit)


def test_without_steps_is_the_same_rule_at_penalty_zero():
    credit = random_credit(0)
    rule = dataclasses.replace(credit.rule, process_weight=0.0)
    assert without_steps(credit).rule == rule and without_steps(credit).votes is credit.votes
