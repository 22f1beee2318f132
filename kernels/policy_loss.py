"""policy_loss: logits, labels and advantages to loss, metrics and the gradient of the logits.

With a ratio of its own, a token is finished while its row is in the cache: weights of the tokens, one program a row,
metrics. Where the ratio is that of a response, or where rows are fewer than the device can work on at once, the same is
done in steps: sums of (parts of) rows, results of rows, terms of the tokens, gradient of (parts of) rows, metrics. The
bits are the same either way. Nothing waits for the device, and nothing but shapes, strides and the rule decides what is
launched, so the whole can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl
from capo.kernels.launch import alignment, check_vocab, on_device, rates_of, sizes_of, splits_of
from capo.kernels.rows import fill, read_row, write_gradient
from capo.kernels.stats import row_stats
from capo.kernels.tokens import log_ratio_of, token_terms

from capo import reference
from capo.backends import checks_values

_KL = ("none", "k1", "k2", "k3")
_TOKENS = 1024  # of a response, at a time


@triton.jit(do_not_specialize=["rows", "responses"])
def token_weights(
    weights_ptr, counts_ptr, advantages_ptr, mask_ptr, cu_seqlens_ptr, rows, responses, ALWAYS_LIVE: tl.constexpr,
    TOGETHER: tl.constexpr, PER_RESPONSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weight of each token of a response in the loss, 0 for the dead, and how many of its tokens are not masked.

    TOGETHER: the tokens of a response live and die together. PER_RESPONSE: the weight is 1 / (count * responses), else 1.
    """
    response = tl.program_id(0).to(tl.int64)
    first = tl.maximum(tl.load(cu_seqlens_ptr + response), 0)
    last = tl.minimum(tl.load(cu_seqlens_ptr + response + 1), rows)
    lanes = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int64)
    alive = tl.zeros([BLOCK], tl.int32)
    for start in range(first, last, BLOCK):
        inside = start + lanes < last
        active = inside
        if mask_ptr is not None:
            active = active & (tl.load(mask_ptr + start + lanes, mask=inside, other=0) != 0)
        count += active.to(tl.int64)
        alive |= (active & (tl.load(advantages_ptr + start + lanes, mask=inside, other=0.0) != 0.0)).to(tl.int32)
    total = tl.sum(count, 0)
    any_alive = tl.max(alive, 0) != 0
    tl.store(counts_ptr + response, total)
    weight = 1.0
    if PER_RESPONSE:
        weight = 1.0 / (total.to(tl.float32) * responses)
    for start in range(first, last, BLOCK):
        inside = start + lanes < last
        live = inside
        if mask_ptr is not None:
            live = live & (tl.load(mask_ptr + start + lanes, mask=inside, other=0) != 0)
        if not ALWAYS_LIVE:
            if TOGETHER:
                live = live & any_alive
            else:
                live = live & (tl.load(advantages_ptr + start + lanes, mask=inside, other=0.0) != 0.0)
        tl.store(weights_ptr + start + lanes, tl.where(live, weight, 0.0), mask=inside)


@triton.jit
def scale_of(scale, active_ptr):
    """What all weights are multiplied by: ``scale``, or 1 / the number of unmasked tokens."""
    if active_ptr is not None:
        return 1.0 / tl.maximum(tl.load(active_ptr), 1).to(tl.float32)
    else:
        return scale


@triton.jit(do_not_specialize=["stride", "grad_stride", "tokens", "units"])
def loss_of_rows(
    logits_ptr, stride, grad_ptr, grad_stride, token_of_ptr, tokens, labels_ptr, advantages_ptr, old_ptr, ref_ptr,
    rollout_ptr, weights_ptr, active_ptr, logprobs_ptr, entropy_ptr, loss_ptr, kl_ptr, clipped_ptr, units, ratio_low,
    ratio_high, clip_dual, kl_coef, entropy_coef, importance_cap, scale, rate, rest, lowest, inverse, inverse_rest,
    CISPO: tl.constexpr, KL: tl.constexpr, ALIGN: tl.constexpr, GRAD_ALIGN: tl.constexpr, VOCAB_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """All of one row whose ratio is its own: one read from memory, a second mostly from the cache, one write."""
    place = tl.program_id(0).to(tl.int64)
    index = place
    inside = True
    if token_of_ptr is not None:
        index = tl.load(token_of_ptr + place)
        inside = (index >= 0) & (index < tokens)
    vocab = units * VOCAB_ALIGN
    weight = tl.load(weights_ptr + index, mask=inside, other=0.0)
    if weight == 0.0:
        tl.store(logprobs_ptr + index, 0.0, mask=inside)
        tl.store(entropy_ptr + index, 0.0, mask=inside)
        if grad_ptr is not None:
            out = grad_ptr + tl.multiple_of(place * grad_stride, GRAD_ALIGN)
            fill(out, 0, vocab, 0.0, BLOCK)
    else:
        rates = (rate, rest, lowest, inverse, inverse_rest)
        row = logits_ptr + tl.multiple_of(place * stride, ALIGN)
        label = tl.load(labels_ptr + index)
        logp, entropy, top, sum_, mean, at_label = read_row(row, label, vocab, rates, BLOCK, UNROLL, NEIGHBOURS)
        tl.store(logprobs_ptr + index, logp)
        tl.store(entropy_ptr + index, entropy)
        log_ratio = log_ratio_of(logp, old_ptr, index, True)
        loss, through_ratio, through_logp, kl, clipped = token_terms(
            index, True, logp, entropy, log_ratio, advantages_ptr, old_ptr, ref_ptr, rollout_ptr, ratio_low, ratio_high,
            clip_dual, kl_coef, entropy_coef, importance_cap, CISPO, KL, OWN_RATIO=True,
        )  # fmt: skip
        tl.store(loss_ptr + index, loss)
        tl.store(kl_ptr + index, kl)
        tl.store(clipped_ptr + index, clipped)
        if grad_ptr is not None:
            out = grad_ptr + tl.multiple_of(place * grad_stride, GRAD_ALIGN)
            weight *= scale_of(scale, active_ptr)
            g = (through_ratio + through_logp) * weight
            if entropy_coef is None:
                h = None
            else:
                h = -entropy_coef * weight
            write_gradient(
                row, out, 0, vocab, label, top, sum_, mean, at_label, logp, g, h, rates, BLOCK, UNROLL,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def terms_of_tokens(
    logprobs_ptr, entropy_ptr, advantages_ptr, old_ptr, ref_ptr, rollout_ptr, weights_ptr, active_ptr, loss_ptr, kl_ptr,
    clipped_ptr, slope_ptr, rows, ratio_low, ratio_high, clip_dual, kl_coef, entropy_coef, importance_cap, scale,
    CISPO: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Terms of a block of tokens whose ratio is their own; ``slope`` is d loss / d logp."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weights_ptr + index, mask=index < rows, other=0.0)
    live = weight != 0.0
    logp = tl.load(logprobs_ptr + index, mask=live, other=0.0)
    entropy = tl.load(entropy_ptr + index, mask=live, other=0.0)
    loss, through_ratio, through_logp, kl, clipped = token_terms(
        index, live, logp, entropy, log_ratio_of(logp, old_ptr, index, live), advantages_ptr, old_ptr, ref_ptr,
        rollout_ptr, ratio_low, ratio_high, clip_dual, kl_coef, entropy_coef, importance_cap, CISPO, KL, OWN_RATIO=True,
    )  # fmt: skip
    tl.store(loss_ptr + index, loss, mask=live)
    tl.store(kl_ptr + index, kl, mask=live)
    tl.store(clipped_ptr + index, clipped, mask=live)
    tl.store(slope_ptr + index, (through_ratio + through_logp) * (weight * scale_of(scale, active_ptr)), mask=live)


@triton.jit(do_not_specialize=["rows"])
def terms_of_responses(
    logprobs_ptr, entropy_ptr, advantages_ptr, old_ptr, ref_ptr, rollout_ptr, weights_ptr, active_ptr, loss_ptr, kl_ptr,
    clipped_ptr, slope_ptr, counts_ptr, cu_seqlens_ptr, rows, ratio_low, ratio_high, clip_dual, kl_coef, entropy_coef,
    importance_cap, scale, CISPO: tl.constexpr, KL: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Terms of the tokens of a response, whose ratio is the response's. SHARED: so is the gradient through it."""
    response = tl.program_id(0).to(tl.int64)
    first = tl.maximum(tl.load(cu_seqlens_ptr + response), 0)
    last = tl.minimum(tl.load(cu_seqlens_ptr + response + 1), rows)
    count = tl.load(counts_ptr + response).to(tl.float64)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(first, last, BLOCK):
        index = start + lanes
        live = tl.load(weights_ptr + index, mask=index < last, other=0.0) != 0.0
        logp = tl.load(logprobs_ptr + index, mask=live, other=0.0)
        log_ratio = log_ratio_of(logp, old_ptr, index, live)
        total += tl.where(live, log_ratio, 0.0).to(tl.float64)
    mean = (tl.sum(total, 0) / count).to(tl.float32)
    shared = tl.zeros([BLOCK], tl.float64)
    for start in range(first, last, BLOCK):
        index = start + lanes
        weight = tl.load(weights_ptr + index, mask=index < last, other=0.0)
        live = weight != 0.0
        logp = tl.load(logprobs_ptr + index, mask=live, other=0.0)
        entropy = tl.load(entropy_ptr + index, mask=live, other=0.0)
        loss, through_ratio, through_logp, kl, clipped = token_terms(
            index, live, logp, entropy, tl.zeros([BLOCK], tl.float32) + mean, advantages_ptr, old_ptr, ref_ptr,
            rollout_ptr, ratio_low, ratio_high, clip_dual, kl_coef, entropy_coef, importance_cap, CISPO, KL,
            OWN_RATIO=not SHARED,
        )  # fmt: skip
        tl.store(loss_ptr + index, loss, mask=live)
        tl.store(kl_ptr + index, kl, mask=live)
        tl.store(clipped_ptr + index, clipped, mask=live)
        weight *= scale_of(scale, active_ptr)
        if SHARED:
            shared += tl.where(live, through_ratio * weight, 0.0).to(tl.float64)
            tl.store(slope_ptr + index, through_logp * weight, mask=live)
        else:
            tl.store(slope_ptr + index, (through_ratio + through_logp) * weight, mask=live)
    if SHARED:
        own = (tl.sum(shared, 0) / count).to(tl.float32)
        tl.debug_barrier()
        for start in range(first, last, BLOCK):
            index = start + lanes
            live = tl.load(weights_ptr + index, mask=index < last, other=0.0) != 0.0
            logp = tl.load(logprobs_ptr + index, mask=live, other=0.0)
            slope = tl.load(slope_ptr + index, mask=live, other=0.0)
            tl.store(slope_ptr + index, slope + own, mask=live & (logp != -float("inf")))


@triton.jit(do_not_specialize=["stride", "grad_stride", "units", "chunks", "splits"])
def gradient_of_rows(
    logits_ptr, stride, grad_ptr, grad_stride, labels_ptr, weights_ptr, active_ptr, logprobs_ptr, stats_ptr, slope_ptr,
    units, chunks, splits, entropy_coef, scale, rate, rest, lowest, inverse, inverse_rest, ALIGN: tl.constexpr, GRAD_ALIGN: tl.constexpr,
    VOCAB_ALIGN: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """Gradient of one of ``splits`` parts of a row, ``chunks`` of columns each."""
    index = (tl.program_id(0) // splits).to(tl.int64)
    vocab = units * VOCAB_ALIGN
    first = (tl.program_id(0) % splits) * chunks * (BLOCK * UNROLL)
    last = tl.minimum(first + chunks * (BLOCK * UNROLL), vocab)
    weight = tl.load(weights_ptr + index)
    out = grad_ptr + tl.multiple_of(index * grad_stride, GRAD_ALIGN)
    if weight == 0.0:
        fill(out, first, last, 0.0, BLOCK)
    else:
        rates = (rate, rest, lowest, inverse, inverse_rest)
        row = logits_ptr + tl.multiple_of(index * stride, ALIGN)
        if entropy_coef is None:
            h = None
        else:
            h = -entropy_coef * (weight * scale_of(scale, active_ptr))
        stats = stats_ptr + 4 * index
        write_gradient(
            row, out, first, last, tl.load(labels_ptr + index), tl.load(stats), tl.load(stats + 1), tl.load(stats + 2),
            tl.load(stats + 3), tl.load(logprobs_ptr + index), tl.load(slope_ptr + index), h, rates, BLOCK, UNROLL,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "places", "responses"])
def metrics(
    loss_ptr, clip_fraction_ptr, mean_kl_ptr, losses_ptr, kl_ptr, clipped_ptr, weights_ptr, active_ptr, cu_seqlens_ptr,
    token_of_ptr, rows, places, responses, scale, TOKEN_MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over all tokens, in one program and one order. Cumulative lengths, or tokens of the ``places`` rows of
    logits, that do not fit give a loss of NaN."""
    lanes = tl.arange(0, BLOCK)
    loss = tl.zeros([BLOCK], tl.float64)
    kl = tl.zeros([BLOCK], tl.float64)
    clipped = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        index = start + lanes
        weight = tl.load(weights_ptr + index, mask=index < rows, other=0.0)
        live = weight != 0.0
        loss += (tl.load(losses_ptr + index, mask=live, other=0.0)).to(tl.float64) * weight.to(tl.float64)
        kl += tl.load(kl_ptr + index, mask=live, other=0.0).to(tl.float64)
        clipped += tl.load(clipped_ptr + index, mask=live, other=0.0).to(tl.float64)
    wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, responses, BLOCK):
        index = start + lanes
        inside = index < responses
        length = tl.load(cu_seqlens_ptr + index + 1, mask=inside, other=0) - tl.load(
            cu_seqlens_ptr + index, mask=inside, other=0
        )
        wrong |= (length < 0).to(tl.int32)
    if token_of_ptr is not None:
        for start in range(0, places, BLOCK):
            index = start + lanes
            inside = index < places
            token = tl.load(token_of_ptr + index, mask=inside, other=0)
            before = tl.load(token_of_ptr + index - 1, mask=inside & (index > 0), other=-1)
            wrong |= (inside & ((token <= before) | (token >= rows))).to(tl.int32)
    fits = (tl.max(wrong, 0) == 0) & (tl.load(cu_seqlens_ptr) == 0) & (tl.load(cu_seqlens_ptr + responses) == rows)
    active = tl.maximum(rows, 1).to(tl.float64)
    if active_ptr is not None:
        active = tl.maximum(tl.load(active_ptr), 1).to(tl.float64)
    total = tl.sum(loss, 0)
    if TOKEN_MEAN:
        total = total / active
    else:
        total = total * scale
    tl.store(loss_ptr, tl.where(fits, total, float("nan")).to(tl.float32))
    tl.store(clip_fraction_ptr, (tl.sum(clipped, 0) / active).to(tl.float32))
    tl.store(mean_kl_ptr, (tl.sum(kl, 0) / active).to(tl.float32))


def new_gradient(logits):
    """Memory for the gradient: ``policy_loss`` writes all of it."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def formula_of(rule):
    """Numbers of the formula of a token, and which formula it is, as the kernels take them."""
    clip_low, clip_high, clip_dual = rule[:3]
    kl_coef, kl, entropy_coef, _, objective, importance_cap = rule[6:]
    numbers = (
        1.0 - clip_low, 1.0 + clip_high, float("inf") if clip_dual is None else clip_dual, kl_coef, entropy_coef or None,
        float("inf") if importance_cap is None else importance_cap,
    )  # fmt: skip
    return numbers, {"CISPO": objective == "cispo", "KL": _KL.index(kl) if kl_coef > 0 else 0}


def policy_loss(
    logits, grad, labels, advantages, old_logprobs, cu_seqlens, ref_logprobs, mask, rollout_logprobs, *rule,
    token_of=None,
):  # fmt: skip
    """(loss, logprobs, entropy, clip_fraction, kl); the gradient goes into ``grad``, which may be the logits, or None."""
    ratio, reduce, constant = rule[3:6]
    kl_coef, _, entropy_coef, temperature = rule[6:10]
    rows, vocab = len(labels), logits.shape[1]
    responses = cu_seqlens.numel() - 1
    check_vocab("policy_loss", vocab)
    if checks_values(logits.device.type):
        reference.check_rows("policy_loss", logits, labels, mask, cu_seqlens, token_of)

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=logits.device)

    loss, clip_fraction, mean_kl = new(), new(), new()
    of_tokens = new(6, rows)
    if token_of is not None:  # those without a row of logits are visited by nobody
        of_tokens.zero_()
    logprobs, entropy, losses, kls, clipped, slope = of_tokens
    weights, counts = torch.zeros_like(losses), new(max(responses, 1), dtype=torch.int64)
    active = None if mask is None else mask.sum()
    scale = 1.0 if reduce == "sequence_mean" else 1.0 / (constant or max(rows, 1))
    each = active if reduce == "token_mean" else None  # the weights are multiplied by its inverse, or by ``scale``
    formula, kind = formula_of(rule)
    formula = *formula, scale
    entropy_coef = entropy_coef or None
    rates = rates_of(logits, temperature)
    per_token = advantages, old_logprobs, ref_logprobs, rollout_logprobs
    aligned = alignment(logits, grad)
    units = vocab // aligned["VOCAB_ALIGN"]
    splits, chunks = splits_of(logits)
    sequence = ratio != "token"

    with on_device(logits):
        if responses:
            token_weights[(responses,)](
                weights, counts, advantages, mask, cu_seqlens, rows, responses,
                ALWAYS_LIVE=kl_coef > 0 or entropy_coef is not None, TOGETHER=sequence,
                PER_RESPONSE=reduce == "sequence_mean", BLOCK=_TOKENS, enable_fp_fusion=False,
            )  # fmt: skip
        out = losses, kls, clipped
        if len(logits) and (token_of is not None or (not sequence and splits == 1)):
            loss_of_rows[(len(logits),)](
                logits, logits.stride(0), grad, 0 if grad is None else grad.stride(0), token_of, rows, labels,
                *per_token, weights, each, logprobs, entropy, *out, units, *formula, *rates, **kind, **aligned,
                **sizes_of(logits),
            )  # fmt: skip
        elif len(logits):
            stats = new(rows, 4)
            row_stats(logits, labels, weights, logprobs, entropy, stats, temperature)
            terms = (logprobs, entropy, *per_token, weights, each, *out, slope)
            if sequence:
                terms_of_responses[(responses,)](
                    *terms, counts, cu_seqlens, rows, *formula, **kind, SHARED=ratio == "sequence", BLOCK=_TOKENS,
                    enable_fp_fusion=False,
                )  # fmt: skip
            else:
                terms_of_tokens[(triton.cdiv(rows, 128),)](
                    *terms, rows, *formula, **kind, BLOCK=128, enable_fp_fusion=False
                )
            if grad is not None:
                gradient_of_rows[(rows * splits,)](
                    logits, logits.stride(0), grad, grad.stride(0), labels, weights, each, logprobs, stats, slope, units,
                    chunks, splits, entropy_coef, scale, *rates, **aligned, **sizes_of(logits),
                )  # fmt: skip
        metrics[(1,)](
            loss, clip_fraction, mean_kl, *out, weights, active, cu_seqlens, token_of, rows, len(logits), responses,
            scale, TOKEN_MEAN=reduce == "token_mean", BLOCK=_TOKENS, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return loss, logprobs, entropy, clip_fraction, mean_kl
