"""credit: outcomes, votes, steps and groups to token advantages.

Three launches: what the statistics need of each response (one program each), of each group, then the tokens. The responses of
a group are brought together by a sort on the device, so nothing waits for it. Statistics are float64; those of responses
are merged by their means and deviations, as sums of squares would cancel. What contradicts the layout gives NaN.
"""

import torch
import triton
import triton.language as tl
from capo.kernels.launch import on_device

from capo import reference
from capo.backends import checks_values

_VOTES = ("majority", "strict_majority", "intersection", "union", "average")
_REWARDS = ("step", "step_suffix", "prefix", "flawed", "share")
_NORMALIZE = ("group_tokens", "group_mean", "responses", "responses_mean", "leave_one_out", "group_steps")

STEP, STEP_SUFFIX, PREFIX, FLAWED, SHARE = (tl.constexpr(i) for i in range(5))
GROUP_TOKENS, GROUP_MEAN, RESPONSES, RESPONSES_MEAN, LEAVE_ONE_OUT, GROUP_STEPS = (tl.constexpr(i) for i in range(6))

# What is known of each response: a row of float64.
SIZE, MEAN, DEVIATION, LOW, HIGH, BASE, OFFSET, FACTOR = (tl.constexpr(i) for i in range(8))
FACTS = tl.constexpr(8)


@triton.jit
def step_weights(votes_ptr, steps, inside, num_votes, VOTE: tl.constexpr, BLOCK: tl.constexpr, VOTES: tl.constexpr):
    """Weights of a block of steps from their votes; NaN for a vote that is none. float64"""
    n = tl.zeros([BLOCK], tl.int32)
    c = tl.zeros([BLOCK], tl.int32)
    wrong = tl.zeros([BLOCK], tl.int32)
    for first in range(0, num_votes, VOTES):
        k = first + tl.arange(0, VOTES)
        known = inside[:, None] & (k < num_votes)[None, :]
        votes = tl.load(votes_ptr + steps[:, None] * num_votes + k[None, :], mask=known, other=-1).to(tl.int32)
        n += tl.sum((votes >= 0).to(tl.int32), 1)
        c += tl.sum((votes > 0).to(tl.int32), 1)
        wrong += tl.sum(((votes < -1) | (votes > 1)).to(tl.int32), 1)
    if VOTE == 0:
        weight = (2 * c >= n).to(tl.float64)
    elif VOTE == 1:
        weight = (2 * c > n).to(tl.float64)
    elif VOTE == 2:
        weight = (c == n).to(tl.float64)
    elif VOTE == 3:
        weight = (c >= 1).to(tl.float64)
    else:
        weight = c.to(tl.float64) / tl.maximum(n, 1).to(tl.float64)
    return tl.where(wrong > 0, float("nan"), tl.where(n > 0, weight, 0.0))


@triton.jit
def spread_is_rounding(low, high):
    """Whether max - min is within the rounding of means among the numbers."""
    return (high <= low) | (high - low <= 1e-12 * tl.maximum(tl.abs(low), tl.abs(high)))


@triton.jit(do_not_specialize=["num_votes", "num_steps", "num_tokens"])
def facts_of_responses(
    facts_ptr, weights_ptr, rewards_ptr, flagged_ptr, outcomes_ptr, votes_ptr, starts_ptr, ends_ptr, cu_steps_ptr,
    cu_seqlens_ptr, num_votes, num_steps, num_tokens, outcome_weight: "fp64", process_weight: "fp64",
    VOTE: tl.constexpr, REWARD: tl.constexpr, STEPPED: tl.constexpr, BLOCK: tl.constexpr, VOTES: tl.constexpr,
):  # fmt: skip
    """Rewards of a response's steps, and their number, mean, sum of squared deviations and range.

    What is counted are tokens, with ``step_suffix`` steps, and with ``share`` nothing: there the mean is the share of
    unflagged steps. STEPPED: the reward of a token depends on its step.
    """
    response = tl.program_id(0).to(tl.int64)
    outcome_weight = tl.full([], 1.0, tl.float64) * outcome_weight
    process_weight = tl.full([], 1.0, tl.float64) * process_weight
    outcome = tl.load(outcomes_ptr + response).to(tl.float64)
    right = outcome > 0.0
    first_token = tl.load(cu_seqlens_ptr + response)
    last_token = tl.load(cu_seqlens_ptr + response + 1)
    first = tl.load(cu_steps_ptr + response)
    last = tl.load(cu_steps_ptr + response + 1)
    fits = (first_token >= 0) & (first_token <= last_token) & (last_token <= num_tokens)
    fits = fits & (first >= 0) & (first <= last) & (last <= num_steps) & (tl.abs(outcome) != float("inf"))
    first = tl.where(fits, first, 0)
    last = tl.where(fits, last, 0)
    lanes = tl.arange(0, BLOCK)

    wrong = tl.zeros([BLOCK], tl.int32)
    first_flagged = tl.zeros([BLOCK], tl.int64) + last
    num_flagged = tl.zeros([BLOCK], tl.int32)
    for start in range(first, last, BLOCK):
        steps = start + lanes
        inside = steps < last
        weight = step_weights(votes_ptr, steps, inside, num_votes, VOTE, BLOCK, VOTES)
        tl.store(weights_ptr + steps, weight, mask=inside)
        begin = tl.load(starts_ptr + steps, mask=inside, other=0)
        end = tl.load(ends_ptr + steps, mask=inside, other=0)
        before = tl.load(ends_ptr + steps - 1, mask=inside & (steps > first), other=0)
        before = tl.where(steps > first, before, first_token)
        bad = (begin < before) | (end < begin) | (end > last_token) | (weight != weight)
        wrong |= (inside & bad).to(tl.int32)
        is_flagged = inside & (weight >= 0.5)
        first_flagged = tl.minimum(first_flagged, tl.where(is_flagged, steps, last))
        num_flagged += is_flagged.to(tl.int32)
    tl.debug_barrier()  # the weights are read again below, maybe by other threads
    fits = fits & (tl.max(wrong, 0) == 0)
    flagged = tl.min(first_flagged, 0)
    length = (last_token - first_token).to(tl.float64)

    if REWARD == PREFIX:
        base = tl.where(right, outcome_weight, process_weight)
        flagged = tl.where(right, last, flagged)  # the first flagged step of a wrong response and all behind it get 0
    elif REWARD == FLAWED:
        base = tl.where(right, outcome_weight - tl.where(flagged < last, process_weight, 0.0), -outcome_weight)
    else:
        base = outcome_weight * outcome
    if STEPPED or REWARD == STEP_SUFFIX:
        inside_steps = tl.zeros([BLOCK], tl.float64)
        total = tl.zeros([BLOCK], tl.float64)
        low = tl.full([BLOCK], float("inf"), tl.float64)
        high = tl.full([BLOCK], -float("inf"), tl.float64)
        for start in range(first, last, BLOCK):
            steps = start + lanes
            inside = steps < last
            reward = base - process_weight * tl.load(weights_ptr + steps, mask=inside, other=0.0)
            tl.store(rewards_ptr + steps, reward, mask=inside)
            if STEPPED:
                count = tl.load(ends_ptr + steps, mask=inside, other=0) - tl.load(
                    starts_ptr + steps, mask=inside, other=0
                )
                count = count.to(tl.float64)
            else:
                count = inside.to(tl.float64)
            inside_steps += count
            total += count * reward
            low = tl.minimum(low, tl.where(inside & (count > 0.0), reward, float("inf")))
            high = tl.maximum(high, tl.where(inside & (count > 0.0), reward, -float("inf")))
        size = tl.sum(inside_steps, 0)
        sum_ = tl.sum(total, 0)
        lowest = tl.min(low, 0)
        highest = tl.max(high, 0)
        gap = 0.0 * length
        if STEPPED:
            gap = length - size
            size = length
            sum_ += gap * base
            lowest = tl.where(gap > 0.0, tl.minimum(lowest, base), lowest)
            highest = tl.where(gap > 0.0, tl.maximum(highest, base), highest)
        mean = tl.where(highest > lowest, sum_ / size, lowest)
        squares = tl.zeros([BLOCK], tl.float64)
        for start in range(first, last, BLOCK):
            steps = start + lanes
            inside = steps < last
            away = base - process_weight * tl.load(weights_ptr + steps, mask=inside, other=0.0) - mean
            if STEPPED:
                count = tl.load(ends_ptr + steps, mask=inside, other=0) - tl.load(
                    starts_ptr + steps, mask=inside, other=0
                )
                count = count.to(tl.float64)
            else:
                count = inside.to(tl.float64)
            squares += tl.where(inside, count * away * away, 0.0)
        deviation = tl.sum(squares, 0) + gap * (base - mean) * (base - mean)
        empty = size == 0.0
        mean = tl.where(empty, base, mean)
        deviation = tl.where(empty, 0.0, deviation)
    elif REWARD == SHARE:
        steps_in_all = (last - first).to(tl.float64)
        size = 0.0 * length
        mean = 1.0 - tl.sum(num_flagged, 0).to(tl.float64) / tl.maximum(steps_in_all, 1.0)
        deviation = 0.0 * length
        lowest = outcome
        highest = outcome
    else:
        size = length
        ahead = length
        if REWARD == PREFIX:
            if flagged < last:
                ahead = (tl.load(starts_ptr + flagged) - first_token).to(tl.float64)
        behind = length - ahead
        lowest = tl.where(behind > 0.0, tl.minimum(0.0 * base, tl.where(ahead > 0.0, base, 0.0)), base)
        highest = tl.where(behind > 0.0, tl.maximum(0.0 * base, tl.where(ahead > 0.0, base, 0.0)), base)
        mean = tl.where(highest > lowest, ahead * base / tl.maximum(length, 1.0), lowest)
        deviation = ahead * (base - mean) * (base - mean) + behind * mean * mean
        deviation = tl.where(length > 0.0, deviation, 0.0)
    tl.store(flagged_ptr + response, flagged)
    lowest = tl.where(length > 0.0, lowest, base)
    highest = tl.where(length > 0.0, highest, base)
    nan = tl.where(fits, 0.0, float("nan"))
    facts = facts_ptr + FACTS * response
    tl.store(facts + SIZE, size)
    tl.store(facts + MEAN, mean + nan)
    tl.store(facts + DEVIATION, deviation)
    tl.store(facts + LOW, lowest)
    tl.store(facts + HIGH, highest)
    tl.store(facts + BASE, base)
    tl.store(facts + OFFSET, 0.0 * nan)
    tl.store(facts + FACTOR, 0.0 * nan)


@triton.jit
def group_moments(
    facts_ptr, outcomes_ptr, order_ptr, first, last, WEIGHTED: tl.constexpr, OUTCOMES: tl.constexpr,
    RIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Number, mean, sum of squared deviations and range of what the responses of a group are counted by.

    That is their means, or with OUTCOMES their outcomes; with RIGHT those of right responses only. WEIGHTED: a response
    counts as often as its size says, and its own deviations count, too.
    """
    lanes = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    low = tl.full([BLOCK], float("inf"), tl.float64)
    high = tl.full([BLOCK], -float("inf"), tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    mean = tl.sum(squares, 0)
    for again in tl.static_range(2):
        for start in range(first, last, BLOCK):
            member = start + lanes < last
            response = tl.load(order_ptr + start + lanes, mask=member, other=0)
            outcome = tl.load(outcomes_ptr + response, mask=member, other=float("nan")).to(tl.float64)
            counted = outcome == outcome
            if RIGHT:
                counted = counted & (outcome > 0.0)
            facts = facts_ptr + FACTS * response
            if OUTCOMES:
                x = outcome
            else:
                x = tl.load(facts + MEAN, mask=counted, other=0.0)
            size = tl.where(counted, 1.0, 0.0).to(tl.float64)
            if WEIGHTED:
                size = tl.load(facts + SIZE, mask=counted, other=0.0)
            if again == 0:
                count += size
                total += tl.where(counted, size * x, 0.0)
                counted = counted & (size > 0.0)
                if WEIGHTED:
                    low = tl.minimum(low, tl.load(facts + LOW, mask=counted, other=float("inf")))
                    high = tl.maximum(high, tl.load(facts + HIGH, mask=counted, other=-float("inf")))
                else:
                    low = tl.minimum(low, tl.where(counted, x, float("inf")))
                    high = tl.maximum(high, tl.where(counted, x, -float("inf")))
            else:
                squares += tl.where(counted, size * (x - mean) * (x - mean), 0.0)
                if WEIGHTED:
                    squares += tl.load(facts + DEVIATION, mask=counted, other=0.0)
        if again == 0:
            number = tl.sum(count, 0)
            mean = tl.sum(total, 0) / tl.where(number > 0.0, number, 1.0)
    return tl.sum(count, 0), mean, tl.sum(squares, 0), tl.min(low, 0), tl.max(high, 0)


@triton.jit
def scale_of(count, squares, low, high, std_floor):
    """1 / sample std; 0 where all are equal or there is but one."""
    same = (count < 2.0) | spread_is_rounding(low, high)
    return tl.where(same, 0.0, 1.0 / tl.maximum(tl.sqrt(squares / tl.maximum(count - 1.0, 1.0)), std_floor))


@triton.jit(do_not_specialize=["responses"])
def offsets_of_groups(
    facts_ptr, outcomes_ptr, groups_ptr, order_ptr, responses, outcome_weight: "fp64", process_weight: "fp64",
    std_floor: "fp64", REWARD: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each response of a group: advantage = (reward - offset) * factor. groups: sorted, ``order`` says by whom."""
    first = tl.program_id(0).to(tl.int64)
    group = tl.load(groups_ptr + first)
    leads = first == 0
    if first > 0:
        leads = tl.load(groups_ptr + first - 1) != group
    if leads:
        lanes = tl.arange(0, BLOCK)
        last = first
        more = first < responses
        while more:
            inside = last + lanes < responses
            same = inside & (tl.load(groups_ptr + last + lanes, mask=inside, other=0) == group)
            number = tl.sum(same.to(tl.int64), 0)
            last += number
            more = number == BLOCK
        pooled: tl.constexpr = (NORMALIZE == GROUP_TOKENS) or (NORMALIZE == GROUP_MEAN) or (NORMALIZE == GROUP_STEPS)
        if REWARD == SHARE:
            count, mean, squares, low, high = group_moments(
                facts_ptr, outcomes_ptr, order_ptr, first, last, False, True, False, BLOCK
            )
            scale = scale_of(count, squares, low, high, std_floor)
            number, share, deviations, least, most = group_moments(
                facts_ptr, outcomes_ptr, order_ptr, first, last, False, False, True, BLOCK
            )
            share_scale = scale_of(number, deviations, least, most, std_floor)
        elif pooled:
            count, mean, squares, low, high = group_moments(
                facts_ptr, outcomes_ptr, order_ptr, first, last, True, False, False, BLOCK
            )
            scale = tl.where(high > low, 1.0, 0.0).to(tl.float64)
            if NORMALIZE != GROUP_MEAN:
                scale = tl.where(high > low, 1.0 / tl.maximum(tl.sqrt(squares / count), std_floor), 0.0)
        else:
            _, _, _, low, high = group_moments(
                facts_ptr, outcomes_ptr, order_ptr, first, last, True, False, False, BLOCK
            )
            count, mean, squares, least, most = group_moments(
                facts_ptr, outcomes_ptr, order_ptr, first, last, False, False, False, BLOCK
            )
            same_tokens = spread_is_rounding(tl.minimum(low, least), tl.maximum(high, most))
            if NORMALIZE == RESPONSES:
                scale = scale_of(count, squares, least, most, std_floor)
            elif NORMALIZE == LEAVE_ONE_OUT:
                scale = tl.where(count < 2.0, 0.0, 1.0).to(tl.float64)
            else:
                scale = tl.full((), 1.0, tl.float64)
            scale = tl.where(same_tokens, 0.0, scale)
        for start in range(first, last, BLOCK):
            member = start + lanes < last
            response = tl.load(order_ptr + start + lanes, mask=member, other=0)
            outcome = tl.load(outcomes_ptr + response, mask=member, other=float("nan")).to(tl.float64)
            decided = outcome == outcome
            facts = facts_ptr + FACTS * response
            own = tl.load(facts + MEAN, mask=decided, other=0.0)
            if REWARD == SHARE:
                offset = outcome_weight * (outcome - mean) * scale
                offset += tl.where(outcome > 0.0, process_weight * (own - share) * share_scale, 0.0)
                # Without right responses the mean of their shares is 0 / 0, and nobody's.
                offset = tl.where(share_scale == 0.0, outcome_weight * (outcome - mean) * scale, offset)
                factor = tl.where(offset == offset, 1.0, offset) + 0.0 * own
            elif NORMALIZE == LEAVE_ONE_OUT:
                offset = (mean * count - own) / tl.maximum(count - 1.0, 1.0)
                factor = scale + 0.0 * mean + 0.0 * outcome
            else:
                offset = mean + 0.0 * outcome
                factor = scale + 0.0 * mean + 0.0 * outcome
            tl.store(facts + OFFSET, tl.where(decided, offset, 0.0), mask=member)
            tl.store(facts + FACTOR, tl.where(decided, factor, 0.0), mask=member)


@triton.jit
def write_run(out, first, last, value, clamp, BLOCK: tl.constexpr):
    """One advantage for the tokens [first, last), held within the clamp; NaN stays."""
    lanes = tl.arange(0, BLOCK)
    held = tl.where(value > clamp, clamp, tl.where(value < -clamp, -clamp, value)).to(tl.float32)
    for start in range(first, last, BLOCK):
        tl.store(out + start + lanes, tl.zeros([BLOCK], tl.float32) + held, mask=start + lanes < last)


@triton.jit(do_not_specialize=["num_tokens", "responses"])
def advantages_of_tokens(
    advantages_ptr, facts_ptr, rewards_ptr, flagged_ptr, starts_ptr, ends_ptr, cu_steps_ptr, cu_seqlens_ptr, num_tokens,
    responses, clamp: "fp64", REWARD: tl.constexpr, STEPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advantages of the tokens of a response, run by run."""
    response = tl.program_id(0).to(tl.int64)
    facts = facts_ptr + FACTS * response
    base = tl.load(facts + BASE)
    offset = tl.load(facts + OFFSET)
    factor = tl.load(facts + FACTOR)
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + response), 0), num_tokens)
    last = tl.minimum(tl.load(cu_seqlens_ptr + response + 1), num_tokens)
    nan = float("nan")
    if response == 0:  # tokens that no response has
        write_run(advantages_ptr, 0, first, nan + base, clamp, BLOCK)
    if response == responses - 1:
        write_run(advantages_ptr, tl.maximum(last, 0), num_tokens, nan + base, clamp, BLOCK)
    if (factor == 0.0) | (factor != factor):
        write_run(advantages_ptr, first, last, factor, clamp, BLOCK)
    elif REWARD == SHARE:
        write_run(advantages_ptr, first, last, offset, clamp, BLOCK)
    elif REWARD == PREFIX:
        flagged = tl.load(flagged_ptr + response)
        error = last
        if flagged < tl.load(cu_steps_ptr + response + 1):
            error = tl.load(starts_ptr + flagged)
        write_run(advantages_ptr, first, error, (base - offset) * factor, clamp, BLOCK)
        write_run(advantages_ptr, error, last, -offset * factor, clamp, BLOCK)
    elif STEPPED:
        token = first
        for step in range(tl.load(cu_steps_ptr + response), tl.load(cu_steps_ptr + response + 1)):
            begin = tl.load(starts_ptr + step)
            end = tl.load(ends_ptr + step)
            write_run(advantages_ptr, token, begin, (base - offset) * factor, clamp, BLOCK)
            write_run(advantages_ptr, begin, end, (tl.load(rewards_ptr + step) - offset) * factor, clamp, BLOCK)
            token = end
        write_run(advantages_ptr, token, last, (base - offset) * factor, clamp, BLOCK)
    elif REWARD == STEP_SUFFIX:
        total = 0.0 * factor
        end = last
        first_step = tl.load(cu_steps_ptr + response)
        last_step = tl.load(cu_steps_ptr + response + 1)
        for back in range(last_step - first_step):
            step = last_step - 1 - back
            begin = tl.load(ends_ptr + step)
            write_run(advantages_ptr, begin, end, total, clamp, BLOCK)
            total += (tl.load(rewards_ptr + step) - offset) * factor
            end = begin
        write_run(advantages_ptr, first, end, total, clamp, BLOCK)
    else:
        write_run(advantages_ptr, first, last, (base - offset) * factor, clamp, BLOCK)


def credit(outcomes, votes, starts, ends, cu_steps, cu_seqlens, groups, num_tokens, *rule):
    """Advantage of every token. float32 [N]"""
    vote, outcome_weight, process_weight, normalize, std_floor, clamp, reward = rule
    responses, num_steps, device = outcomes.numel(), starts.numel(), outcomes.device
    if checks_values(device.type):
        reference.check_credit(outcomes, votes, starts, ends, cu_steps, cu_seqlens, num_tokens)
    advantages = torch.empty(num_tokens, dtype=torch.float32, device=device)
    if responses == 0:
        return advantages.fill_(float("nan"))
    facts = torch.empty((responses, FACTS.value), dtype=torch.float64, device=device)
    weights, rewards = torch.empty((2, max(num_steps, 1)), dtype=torch.float64, device=device)
    flagged = torch.empty(responses, dtype=torch.int64, device=device)
    ids, order = torch.sort(groups, stable=True)
    layout = starts, ends, cu_steps, cu_seqlens
    kind = {"REWARD": _REWARDS.index(reward)}
    stepped = reward == "step" and process_weight > 0  # else the steps are not looked at: the same bits as without any
    with on_device(outcomes):
        facts_of_responses[(responses,)](
            facts, weights, rewards, flagged, outcomes, votes, *layout, votes.shape[1], num_steps, num_tokens,
            outcome_weight, process_weight, VOTE=_VOTES.index(vote), STEPPED=stepped, BLOCK=64, VOTES=16, **kind,
            enable_fp_fusion=False,
        )  # fmt: skip
        offsets_of_groups[(responses,)](
            facts, outcomes, ids, order, responses, outcome_weight, process_weight, std_floor,
            NORMALIZE=_NORMALIZE.index(normalize), BLOCK=32, **kind, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
        advantages_of_tokens[(responses,)](
            advantages, facts, rewards, flagged, *layout, num_tokens, responses,
            float("inf") if clamp is None else clamp, STEPPED=stepped, BLOCK=256, **kind, enable_fp_fusion=False,
        )  # fmt: skip
    return advantages
