"""The loss of a token and its derivatives: the formulas of capo.reference and csrc/common/policy_loss.h."""

import triton
import triton.language as tl
from capo.kernels.numbers import expm1

LOG_RATIO_LIMIT = tl.constexpr(20.0)


@triton.jit
def limited(x):
    """x held within the limit of log-ratios; NaN stays."""
    return tl.where(x > LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, tl.where(x < -LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT, x))


@triton.jit
def log_ratio_of(logp, old_ptr, rows, live):
    """logp - old_logp; on-policy 0, but NaN where logp is."""
    if old_ptr is None:
        return tl.where(logp == logp, 0.0, logp)
    else:
        return logp - tl.load(old_ptr + rows, mask=live, other=0.0)


@triton.jit
def token_terms(
    rows,
    live,
    logp,
    entropy,
    log_ratio,
    advantages_ptr,
    old_ptr,
    ref_ptr,
    rollout_ptr,
    ratio_low,
    ratio_high,
    clip_dual,
    kl_coef,
    entropy_coef,
    importance_cap,
    CISPO: tl.constexpr,
    KL: tl.constexpr,
    OWN_RATIO: tl.constexpr,
):
    """Loss, d loss / d log_ratio, d loss / d logp besides that, KL and whether the ratio was clipped (0 or 1).

    Of one row or of a block of rows, of which those that are ``live`` are read.
    """
    advantage = tl.load(advantages_ptr + rows, mask=live, other=0.0)
    ratio = tl.exp(limited(log_ratio))
    bounded = tl.where(ratio < ratio_low, ratio_low, tl.where(ratio > ratio_high, ratio_high, ratio))
    if CISPO:
        clipped = bounded != ratio
        loss = -bounded * advantage * logp
        through_ratio = 0.0 * advantage
        through_logp = -bounded * advantage
    else:
        dual = (advantage < 0.0) & (ratio > clip_dual)
        clipped = bounded * advantage < ratio * advantage
        loss = -tl.where(dual, clip_dual, tl.where(clipped, bounded, ratio)) * advantage
        clipped = clipped | dual
        held = clipped | (tl.abs(log_ratio) > LOG_RATIO_LIMIT)
        if OWN_RATIO:  # a label of probability 0 has no gradient through a ratio of its own
            held = held | (logp == -float("inf"))
        through_ratio = tl.where(held, 0.0, -ratio * advantage)
        through_logp = 0.0 * ratio
    if rollout_ptr is not None:
        if old_ptr is None:
            old = logp
        else:
            old = tl.load(old_ptr + rows, mask=live, other=0.0)
        weight = tl.exp(limited(old - tl.load(rollout_ptr + rows, mask=live, other=0.0)))
        weight = tl.where(weight > importance_cap, importance_cap, weight)
        loss *= weight
        through_ratio *= weight
        through_logp *= weight
    kl = 0.0 * ratio
    if KL != 0:
        d = logp - tl.load(ref_ptr + rows, mask=live, other=0.0)
        if KL == 1:
            kl = d
            slope = 1.0
        elif KL == 2:
            kl = 0.5 * d * d
            slope = d
        else:
            e = expm1(-limited(d))
            kl = e + limited(d)
            slope = tl.where(tl.abs(d) > LOG_RATIO_LIMIT, 0.0, -e)
        loss += kl_coef * kl
        through_logp += kl_coef * slope
    if entropy_coef is not None:
        loss -= entropy_coef * entropy
    return loss, through_ratio, through_logp, kl, tl.where(clipped, 1.0, 0.0)
