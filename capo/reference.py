"""Every formula of capo in plain PyTorch, slow and obvious: the specification that all backends are tested against.

In float64 it is the truth. ``credit``, ``policy_loss`` and ``logprobs`` at the end make it a backend.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from capo.credit import CreditRule
from capo.losses import LossRule

# ---- credit


def step_weights(votes: Tensor, vote: str) -> Tensor:
    """Weight of each step from its votes. int8 [M, K] -> float64 [M]

    Only valid votes count, n of them, c flagging; without any the weight is 0 (paper, section 3.1 and appendix E).
    """
    n = (votes >= 0).sum(1)
    c = (votes == 1).sum(1)
    weights = {
        "majority": (2 * c >= n).double(),
        "strict_majority": (2 * c > n).double(),
        "intersection": (c == n).double(),
        "union": (c >= 1).double(),
        "average": c.double() / n.clamp(min=1),
    }[vote]
    return torch.where(n > 0, weights, 0.0)


class _Response:
    """One response, its tokens counted from 0."""

    def __init__(self, index, outcomes, weights, starts, ends, cu_steps, cu_seqlens):
        first, last = int(cu_seqlens[index]), int(cu_seqlens[index + 1])
        steps = slice(int(cu_steps[index]), int(cu_steps[index + 1]))
        self.tokens, self.length = slice(first, last), last - first
        self.outcome = float(outcomes[index])
        self.right = self.outcome > 0
        self.weights = weights[steps].tolist()
        self.flagged = [weight >= 0.5 for weight in self.weights]
        self.ranges = [(int(s) - first, int(e) - first) for s, e in zip(starts[steps], ends[steps], strict=True)]
        self.zeros = torch.zeros(self.length, dtype=torch.float64, device=outcomes.device)

    def token_rewards(self, rule: CreditRule) -> tuple[float, Tensor]:
        """The reward of a token outside all steps, and those of all tokens. float64 [length]"""
        c, p = rule.outcome_weight, rule.process_weight
        if rule.reward == "step":  # paper, Eq. 1
            base = c * self.outcome
            rewards = self.zeros + base
            if p > 0:
                for (start, end), weight in zip(self.ranges, self.weights, strict=True):
                    rewards[start:end] = base - p * weight
        elif rule.reward == "prefix":  # VPPO
            base = c if self.right else p
            rewards = self.zeros + base
            if not self.right and any(self.flagged):
                rewards[self.ranges[self.flagged.index(True)][0] :] = 0.0
        elif rule.reward == "flawed":  # FAPO
            base = (c - p if any(self.flagged) else c) if self.right else -c
            rewards = self.zeros + base
        else:
            raise ValueError(f"reward={rule.reward!r} is not a reward of tokens")
        return base, rewards


def token_advantages(
    outcomes: Tensor,
    votes: Tensor,
    starts: Tensor,
    ends: Tensor,
    cu_steps: Tensor,
    cu_seqlens: Tensor,
    groups: Tensor,
    rule: CreditRule,
) -> Tensor:
    """Advantage of every token; statistics are taken on token tensors, group by group. float64 [N]"""
    weights = step_weights(votes, rule.vote)
    advantages = torch.zeros(int(cu_seqlens[-1]), dtype=torch.float64, device=outcomes.device)
    for group in groups.unique():
        members = [
            _Response(i, outcomes, weights, starts, ends, cu_steps, cu_seqlens)
            for i in (groups == group).nonzero()[:, 0].tolist()
            if not outcomes[i].isnan()
        ]
        if members:
            for member, values in zip(members, _group_advantages(members, rule), strict=True):
                limit = float("inf") if rule.clamp is None else rule.clamp
                advantages[member.tokens] = values.clamp(-limit, limit)
    return advantages


def _group_advantages(members: list[_Response], rule: CreditRule) -> list[Tensor]:
    """Advantages of the tokens of each response of one group."""
    zeros = [member.zeros for member in members]
    if rule.reward == "step_suffix":
        return _step_suffix_advantages(members, rule)
    if rule.reward == "share":
        return _share_advantages(members, rule)

    bases, rewards = zip(*(member.token_rewards(rule) for member in members), strict=True)
    tokens = torch.cat(rewards)
    if rule.normalize in ("group_tokens", "group_mean"):
        if tokens.numel() == 0 or tokens.max() == tokens.min():
            return zeros
        std = 1.0 if rule.normalize == "group_mean" else max(float(tokens.std(correction=0)), rule.std_floor)
        return [(r - tokens.mean()) / std for r in rewards]

    means = torch.stack([_mean(r, base) for r, base in zip(rewards, bases, strict=True)])
    if _spread(torch.cat([tokens, means])) == 0:
        return zeros
    if rule.normalize == "responses_mean":
        return [r - means.mean() for r in rewards]
    if len(members) == 1:
        return zeros
    if rule.normalize == "leave_one_out":
        return [r - (means.sum() - mean) / (len(members) - 1) for r, mean in zip(rewards, means, strict=True)]
    if _spread(means) == 0:
        return zeros
    return [(r - means.mean()) / max(float(means.std()), rule.std_floor) for r in rewards]


def _step_suffix_advantages(members: list[_Response], rule: CreditRule) -> list[Tensor]:
    """DeepSeekMath's process supervision: normalised step rewards, summed over the steps that end after the token."""
    rewards = [
        [rule.outcome_weight * member.outcome - rule.process_weight * weight for weight in member.weights]
        for member in members
    ]
    steps = torch.tensor([r for response in rewards for r in response], dtype=torch.float64)
    if steps.numel() == 0 or steps.max() == steps.min():
        return [member.zeros for member in members]
    mean, std = float(steps.mean()), max(float(steps.std(correction=0)), rule.std_floor)
    result = []
    for member, response in zip(members, rewards, strict=True):
        values = member.zeros.clone()
        for (_, end), reward in zip(member.ranges, response, strict=True):
            values[:end] += (reward - mean) / std
        result.append(values)
    return result


def _share_advantages(members: list[_Response], rule: CreditRule) -> list[Tensor]:
    """PAPO: normalised outcome, plus the share of unflagged steps normalised over the right responses."""
    outcome = _normalized([member.outcome for member in members], rule.std_floor)
    right = [member for member in members if member.right]
    shares = [1.0 - sum(m.flagged) / len(m.flagged) if m.flagged else 1.0 for m in right]
    process = dict(zip(map(id, right), _normalized(shares, rule.std_floor), strict=True))
    return [
        member.zeros + (rule.outcome_weight * o + rule.process_weight * process.get(id(member), 0.0))
        for member, o in zip(members, outcome, strict=True)
    ]


def _normalized(values: list[float], std_floor: float) -> list[float]:
    """(x - mean) / sample std; zeros where all are equal or there is but one."""
    x = torch.tensor(values, dtype=torch.float64)
    if x.numel() < 2 or _spread(x) == 0:
        return [0.0] * x.numel()
    return ((x - x.mean()) / max(float(x.std()), std_floor)).tolist()


def _mean(rewards: Tensor, base: float) -> Tensor:
    """Mean over tokens; exactly their value if they are equal, and the base reward of an empty response."""
    if rewards.numel() == 0:
        return torch.tensor(base, dtype=torch.float64, device=rewards.device)
    return rewards[0] if rewards.max() == rewards.min() else rewards.mean()


def _spread(values: Tensor) -> float:
    """max - min; 0 if that is within the rounding of the means among the values."""
    spread = float(values.max() - values.min())
    return 0.0 if spread <= 1e-12 * float(values.abs().max()) else spread


# ---- policy loss

LOG_RATIO_LIMIT = 20.0  # beyond it exp() is held and has no gradient, as in verl


def label_logprobs(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of each row, differentiable. [N], [N]

    Computed in float64 for float64 logits, else in float32.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logp = z.log_softmax(-1)
    finite = logp.clamp(min=torch.finfo(z.dtype).min)  # 0 * -inf has no place in a mean
    return logp.gather(-1, labels[:, None])[:, 0], -(logp.exp() * finite).sum(-1)


def row_weights(
    advantages: Tensor, cu_seqlens: Tensor, mask: Tensor | None, rule: LossRule, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which tokens are live, bool [N]; the response of each, [N]; its weight in the loss, [N]; unmasked tokens, [B]."""
    lengths = cu_seqlens.diff()
    response = torch.bucketize(torch.arange(len(advantages), device=advantages.device), cu_seqlens[1:], right=True)
    response = response.clamp(max=max(len(lengths) - 1, 0))  # where lengths are wrong and nobody checked them
    active = torch.ones_like(advantages, dtype=torch.bool) if mask is None else mask.bool()
    counts = torch.zeros_like(lengths).index_add(0, response, active.to(lengths.dtype))
    live = active & live_tokens(advantages, active, response, len(lengths), rule)
    if rule.reduce == "sequence_mean":
        weights = 1 / (counts[response] * len(lengths)).to(dtype)
    elif rule.reduce == "token_mean":
        weights = (1 / counts.sum().to(dtype)).expand(len(response))
    else:
        weights = torch.full(response.shape, 1 / (rule.constant or 1.0), dtype=dtype, device=response.device)
    return live, response, weights, counts


class _Tokens:
    """Live tokens, [L] each: what the loss of a token is made of. ``counts`` are those of its response."""

    def __init__(self, logp, entropy, advantages, old, ref, rollout, response, num_responses, counts, weights):
        self.logp, self.entropy, self.advantages = logp, entropy, advantages
        self.old, self.ref, self.rollout = old, ref, rollout
        self.response, self.num_responses, self.counts, self.weights = response, num_responses, counts, weights

    def response_mean(self, values: Tensor) -> Tensor:
        """Mean of token values over each token's response."""
        total = values.new_zeros(self.num_responses).index_add(0, self.response, values)
        return total[self.response] / self.counts

    def ratio(self, rule: LossRule) -> tuple[Tensor, Tensor]:
        """Probability ratio of each token, and whether a gradient goes through it."""
        # A label of probability 0 has no gradient through the ratio, and on-policy its ratio is 1 like any other.
        possible = ~self.logp.isneginf()
        own = torch.where(possible, self.logp - self.logp.detach(), 0.0)
        log_ratio = own if self.old is None else torch.where(possible, self.logp, self.logp.detach()) - self.old
        if rule.ratio == "sequence":
            log_ratio = self.response_mean(log_ratio)
        elif rule.ratio == "sequence_token":
            log_ratio = self.response_mean(log_ratio).detach() + own
        inside = ~(log_ratio.abs() > LOG_RATIO_LIMIT)
        return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp(), inside

    def clip(self, ratio: Tensor, rule: LossRule) -> tuple[Tensor, Tensor, Tensor]:
        """Ratio held inside the clip range, whether clipping decides the loss, and whether the dual clip does."""
        low, high = torch.tensor([1 - rule.clip_low, 1 + rule.clip_high], dtype=ratio.dtype).tolist()
        bounded = ratio.detach().clamp(low, high)
        if rule.objective == "cispo":
            return bounded, bounded != ratio, torch.zeros_like(ratio, dtype=torch.bool)
        clipped = bounded * self.advantages < ratio * self.advantages
        dual = (self.advantages < 0) & (ratio > (rule.clip_dual or float("inf")))
        return bounded, clipped, dual

    def importance(self, rule: LossRule) -> Tensor | float:
        """Truncated importance weight of the sampler/trainer mismatch, without gradient."""
        if rule.importance_cap is None:
            return 1.0
        mismatch = (self.logp.detach() if self.old is None else self.old) - self.rollout
        return mismatch.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp(max=rule.importance_cap)

    def slopes(self, rule: LossRule) -> tuple[Tensor, Tensor]:
        """Derivatives of the loss by each token's log-probability and by its entropy."""
        ratio, inside = self.ratio(rule)
        bounded, clipped, dual = self.clip(ratio, rule)
        if rule.objective == "cispo":
            g = -bounded * self.advantages * self.importance(rule) * self.weights
        else:
            g = -ratio * self.advantages * self.importance(rule) * self.weights
            g = torch.where(clipped | dual | ~inside, 0.0, g)
            if rule.ratio == "sequence":
                g = self.response_mean(g)
            g = torch.where(self.logp.isneginf(), 0.0, g)
        if rule.kl_coef > 0:
            d = self.logp - self.ref
            k3 = torch.where(d.abs() > LOG_RATIO_LIMIT, 0.0, 1 - torch.exp(-d))
            g = g + rule.kl_coef * self.weights * {"k1": torch.ones_like(d), "k2": d, "k3": k3}[rule.kl]
        return g, -rule.entropy_coef * self.weights * torch.ones_like(g)

    def losses(self, rule: LossRule) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each token before its weight, KL estimate without gradient, and whether it is clipped."""
        ratio, _ = self.ratio(rule)
        bounded, clipped, dual = self.clip(ratio, rule)
        if rule.objective == "cispo":
            loss = -bounded * self.advantages * self.logp
        else:
            loss = -torch.where(clipped, bounded, ratio) * self.advantages
            loss = torch.where(dual, -(rule.clip_dual or 0.0) * self.advantages, loss)
        loss = loss * self.importance(rule)
        kl = torch.zeros_like(loss)
        if rule.kl_coef > 0:
            d = self.logp - self.ref
            limited = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            kl = {"k1": d, "k2": d * d / 2, "k3": torch.exp(-limited) + limited - 1}[rule.kl]
            loss = loss + rule.kl_coef * kl
        if rule.entropy_coef != 0:
            loss = loss - rule.entropy_coef * self.entropy
        return loss, kl.detach(), clipped | dual


class _Live(_Tokens):
    """The live tokens of a batch."""

    def __init__(
        self, logits, labels, advantages, old_logprobs, cu_seqlens, rule, ref_logprobs, mask, rollout_logprobs,
        token_of=None,
    ):  # fmt: skip
        dtype = torch.promote_types(logits.dtype, torch.float32)
        self.rows, response, weights, counts = row_weights(advantages, cu_seqlens, mask, rule, dtype)
        self.kept = self.rows  # among the rows of the logits
        if token_of is not None:
            self.kept = self.rows[token_of]
            self.rows = torch.zeros_like(self.rows).index_fill(0, token_of[self.kept], True)
        self.logits, self.labels = logits[self.kept], labels[self.rows]
        self.num_active = counts.sum().clamp(min=1)

        def of_live(values):
            return None if values is None else values[self.rows].to(dtype)

        response = response[self.rows]
        super().__init__(
            *label_logprobs(self.logits, self.labels, rule.temperature),
            *map(of_live, (advantages, old_logprobs, ref_logprobs, rollout_logprobs)),
            response, len(counts), counts[response], weights[self.rows],
        )  # fmt: skip

    def scatter(self, values: Tensor) -> Tensor:
        """Values of the live tokens in a row per token, 0 elsewhere. [N]"""
        return values.new_zeros(len(self.rows)).masked_scatter(self.rows, values.detach())


def policy_loss_terms(
    logits: Tensor,
    labels: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    cu_seqlens: Tensor,
    rule: LossRule,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    token_of: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (differentiable), logprobs, entropy, clip fraction and KL; see ``capo.policy_loss`` for the arguments.

    ``token_of``: ``rows`` there. Masked and dead tokens are left out by selection, so nothing in them can reach the result.
    """
    live = _Live(
        logits, labels, advantages, old_logprobs, cu_seqlens, rule, ref_logprobs, mask, rollout_logprobs, token_of
    )
    loss, kl, clipped = live.losses(rule)
    return (
        (loss * live.weights).sum(),
        live.scatter(live.logp),
        live.scatter(live.entropy),
        clipped.sum().to(loss.dtype) / live.num_active,
        kl.sum() / live.num_active,
    )


def policy_loss_gradient(
    logits: Tensor,
    labels: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    cu_seqlens: Tensor,
    rule: LossRule,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    token_of: Tensor | None = None,
) -> Tensor:
    """Gradient of the loss of ``policy_loss_terms`` in closed form, as the fused kernels have it. [N, V]

    With g = d loss / d logp and h = d loss / d entropy of a row, p its probabilities and z its scaled logits::

        d loss / d logits = (g * (onehot - p) - h * p * (z - sum(p * z))) / temperature
    """
    live = _Live(
        logits, labels, advantages, old_logprobs, cu_seqlens, rule, ref_logprobs, mask, rollout_logprobs, token_of
    )
    g, h = live.slopes(rule)
    z = live.logits.to(g.dtype) / rule.temperature
    p = z.softmax(-1)
    dz = (-g[:, None] * p).scatter_add(-1, live.labels[:, None], g[:, None])
    if rule.entropy_coef != 0:
        finite = z.clamp(min=torch.finfo(z.dtype).min)
        dz = dz - h[:, None] * p * (finite - (p * finite).sum(-1, keepdim=True))
    gradient = torch.zeros(logits.shape, dtype=dz.dtype, device=logits.device)
    gradient[live.kept] = dz / rule.temperature
    return gradient


class LinearLogits:
    """Logits ``hidden @ weight.T + bias`` of which only the rows that are asked for are made; for ``policy_loss_terms``.

    Args:
        hidden: [N, H].
        weight: [V, H].
        bias: [V], or None.
        temperature: [N], by which each row is divided besides ``rule.temperature``; None: 1.
        softcap: logits z become ``softcap * tanh(z / softcap)``, before the temperature; None: off.
        vocab_size: rows of ``weight`` from here on are left out; None: none are.
    """

    def __init__(self, hidden, weight, bias=None, temperature=None, softcap=None, vocab_size=None):
        self.hidden, self.weight, self.bias = hidden, weight[:vocab_size], None if bias is None else bias[:vocab_size]
        self.temperature, self.softcap, self.dtype = temperature, softcap, hidden.dtype

    def __getitem__(self, rows: Tensor) -> Tensor:
        z = torch.nn.functional.linear(self.hidden[rows], self.weight, self.bias)
        wide = torch.promote_types(z.dtype, torch.float32)
        if self.softcap is not None:
            z = (self.softcap * torch.tanh(z.to(wide) / self.softcap)).to(z.dtype)
        return z if self.temperature is None else z.to(wide) / self.temperature[rows, None].to(wide)


def live_tokens(advantages: Tensor, active: Tensor, response: Tensor, num_responses: int, rule: LossRule) -> Tensor:
    """Which tokens can have a gradient: advantage not 0, or a KL or entropy term. bool [N]

    With a sequence ratio the tokens of a response live and die together.
    """
    if rule.kl_coef > 0 or rule.entropy_coef != 0:
        return torch.ones_like(active)
    live = active & (advantages != 0)
    if rule.ratio == "token":
        return live
    alive = torch.zeros(num_responses, dtype=torch.int64, device=advantages.device)
    return alive.index_add(0, response, live.long())[response] > 0


# ---- the functions of a backend: plain tensors in and out. Gradients go into ``grad``: zeros, the logits, or None.


def credit(outcomes, votes, starts, ends, cu_steps, cu_seqlens, groups, num_tokens, *rule):
    check_credit(outcomes, votes, starts, ends, cu_steps, cu_seqlens, num_tokens)
    return token_advantages(outcomes, votes, starts, ends, cu_steps, cu_seqlens, groups, CreditRule(*rule)).float()


def new_gradient(logits):
    return torch.zeros_like(logits, memory_format=torch.contiguous_format)


def policy_loss(
    logits, grad, labels, advantages, old_logprobs, cu_seqlens, ref_logprobs, mask, rollout_logprobs, *rule,
    token_of=None,
):  # fmt: skip
    check_rows("policy_loss", logits, labels, mask, cu_seqlens, token_of)
    args = labels, advantages, old_logprobs, cu_seqlens, LossRule(*rule), ref_logprobs, mask, rollout_logprobs, token_of
    with torch.no_grad():
        result = policy_loss_terms(logits, *args)
        if grad is not None:
            grad.copy_(policy_loss_gradient(logits, *args))
    return tuple(value.float() for value in result)


def logprobs(logits, labels, temperature, mask):
    check_rows("logprobs", logits, labels, mask)
    active = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    values = label_logprobs(logits[active], labels[active], temperature)
    return tuple(torch.zeros(len(labels), device=logits.device).masked_scatter(active, v.float()) for v in values)


# The parts of a loss over chunks of rows; see capo.linear.

LOG2_E = 1.4426950408889634
_BLOCK = 32  # rows that are in float32 at a time


@contextlib.contextmanager
def workspace(size, device):
    """Some bytes of memory with anything in them."""
    yield torch.empty(size, dtype=torch.uint8, device=device)


def row_stats(logits, labels, temperature):
    """Top and label's logit of each row, sums of 2^t and t 2^t with t = (logit - top) / temperature * log2(e). [L, 5]"""
    stats = torch.zeros(len(labels), 5, dtype=torch.float64, device=logits.device)
    for rows in torch.arange(len(labels), device=logits.device).split(_BLOCK):
        z = logits[rows].float()
        top, own = z.amax(-1), labels[rows]
        t = (z - top[:, None]) * _scale(temperature, rows)
        power = torch.exp2(t)
        at_label = z.gather(-1, own.clamp(min=0)[:, None])[:, 0]
        centred = torch.where(power == 0, 0.0, power * t)
        stats[rows, 0] = top.double()
        stats[rows, 1] = power.sum(-1, dtype=torch.float64)
        stats[rows, 2] = centred.sum(-1, dtype=torch.float64)
        stats[rows, 4] = torch.where(own < 0, -torch.inf, at_label).double()
    return stats


def row_logprobs(stats, dtype, temperature):
    top, total, centred, _, at_label = stats.unbind(-1)
    log_sum = total.log2()
    logp = (at_label - top) * (LOG2_E / temperature) - log_sum
    return (logp / LOG2_E).float(), ((log_sum - centred / total) / LOG2_E).float()


def loss_terms(logprobs, entropy, advantages, old_logprobs, ref_logprobs, rollout_logprobs, weights, cu_seqlens, *rule):
    lengths = cu_seqlens.diff()
    response = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    values = advantages, old_logprobs, ref_logprobs, rollout_logprobs
    tokens = _Tokens(logprobs, entropy, *values, response, len(lengths), lengths[response], weights)
    return *tokens.losses(LossRule(*rule)), tokens.slopes(LossRule(*rule))[0].double()


def row_grads(logits, out, rows, labels, stats, slopes, entropy_slopes, temperature):
    """Writes the gradient of row ``rows[i]`` of the logits into row i of ``out``, which may be the logits if rows[i] is i
    or i is not among the rows."""
    for target in torch.arange(len(rows), device=logits.device).split(_BLOCK):
        source = rows[target]
        top, total, centred = (x[:, None].float() for x in stats[source, :3].unbind(-1))
        g, h = slopes[source, None].float(), entropy_slopes[source, None].float()
        scale = _scale(temperature, source)
        t = (logits[source].float() - top) * scale
        p = torch.exp2(t) / total
        dz = -g * p - h * p * (torch.where(p == 0, 0.0, t) - centred / total) / LOG2_E
        own = labels[source, None]
        dz.scatter_add_(-1, own.clamp(min=0), torch.where(own < 0, 0.0, g))
        out[target] = (dz * (scale / LOG2_E)).to(out.dtype)


def exponent_rate(temperature: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """Factor from logits to exponents of two in the sums over rows of this type."""
    if dtype == torch.float32:
        return LOG2_E / (temperature.double() if isinstance(temperature, Tensor) else temperature)
    return (LOG2_E / torch.as_tensor(temperature, dtype=torch.float64)).float().double()


def _scale(temperature: Tensor | float, rows: Tensor) -> Tensor | float:
    """Factor from logits to exponents of two."""
    return LOG2_E / (temperature[rows, None] if isinstance(temperature, Tensor) else temperature)


def check_credit(outcomes, votes, starts, ends, cu_steps, cu_seqlens, num_tokens):
    """Raise ValueError for the first thing that contradicts the layout of a ``Credit``."""
    if outcomes.isinf().any():
        raise ValueError(
            f"credit: outcome {float(outcomes[outcomes.isinf()][0])} of response {_first(outcomes.isinf())}"
        )
    bad = (votes < -1) | (votes > 1)
    if bad.any():
        raise ValueError(f"credit: votes must be -1, 0 or 1, got {int(votes[bad][0])} for step {_first(bad.any(1))}")
    check_cumulative("credit", "cu_seqlens", cu_seqlens, num_tokens)
    check_cumulative("credit", "steps.cu_steps", cu_steps, starts.numel())
    step_response = torch.repeat_interleave(torch.arange(len(outcomes), device=starts.device), cu_steps.diff())
    previous_end = torch.cat([cu_seqlens[:1], ends[:-1]])[: starts.numel()]
    first_of_response = torch.cat([step_response[:1] < 0, step_response[1:] != step_response[:-1]])
    first_of_response[:1] = True
    lowest = torch.where(first_of_response, cu_seqlens[step_response], previous_end)
    bad = (starts < lowest) | (ends < starts) | (ends > cu_seqlens[step_response + 1])
    if bad.any():
        step = _first(bad)
        raise ValueError(
            f"credit: step {step} is [{int(starts[step])}, {int(ends[step])}), but steps must be in order, without overlap "
            f"and inside their response {int(step_response[step])}"
        )


def check_cumulative(op, name, values, total):
    """Raise ValueError unless values run from 0 to total without falling."""
    if int(values[0]) != 0 or int(values[-1]) != total or bool((values.diff() < 0).any()):
        raise ValueError(f"{op}: {name} must rise from 0 to {total}, got {values.tolist()!s:.200}")


def check_rows(op, logits, labels, mask, cu_seqlens=None, token_of=None):
    """Raise ValueError for a label outside the vocabulary in an unmasked row, or cu_seqlens or rows that do not fit."""
    check_labels(op, labels, logits.shape[1], mask)
    if cu_seqlens is not None:
        check_cumulative(op, "cu_seqlens", cu_seqlens, labels.shape[0])
    if token_of is not None:
        bad = (token_of < 0) | (token_of >= labels.shape[0])
        bad[1:] |= token_of.diff() <= 0
        if bad.any():
            row = _first(bad)
            raise ValueError(
                f"{op}: rows must be tokens 0 to {labels.shape[0] - 1}, rising, got {int(token_of[row])} at {row}"
            )


def check_labels(op, labels, vocab, mask=None):
    """Raise ValueError for a label outside the vocabulary in an unmasked row."""
    bad = (labels < 0) | (labels >= vocab)
    if mask is not None:
        bad &= mask
    if bad.any():
        row = _first(bad)
        raise ValueError(f"{op}: label {int(labels[row])} in row {row} is outside the vocabulary of {vocab}")


def _first(flags: Tensor) -> int:
    return int(flags.nonzero()[0, 0])
