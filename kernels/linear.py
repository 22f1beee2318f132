"""The parts of a loss over chunks of rows (see ``capo.linear``), for rows of which only the device knows how many are there.

A row whose label is ``ABSENT`` is not there: nothing of it is read. A row of a gradient that comes from row -1 is not written.
"""

import contextlib

import torch
import triton
import triton.language as tl
from capo.kernels.launch import alignment, check_vocab, on_device, rates_of, sizes_of
from capo.kernels.numbers import expm1, log1p, not_finite
from capo.kernels.policy_loss import formula_of, terms_of_responses, terms_of_tokens
from capo.kernels.product import number_of
from capo.kernels.rows import CENTRED_ONE, ONE, logp_of, sums_of_row, write_gradient

from capo import reference

ABSENT = tl.constexpr(-2)
STATS = tl.constexpr(5)
_TOKENS = 1024


@contextlib.contextmanager
def workspace(size, device):
    """Some bytes of memory with anything in them."""
    yield torch.empty(size, dtype=torch.uint8, device=device)


@triton.jit
def rates_at(temperature_ptr, index):
    """What ``launch.rates_of`` gives, for the temperature of a row."""
    temperature = tl.load(temperature_ptr + index).to(tl.float64)
    exact = 1.4426950408889634 / temperature
    rate = exact.to(tl.float32)
    exact_inverse = 1.0 / temperature
    inverse = exact_inverse.to(tl.float32)
    rest = (exact - rate.to(tl.float64)).to(tl.float32)
    return rate, rest, -200.0 / rate, inverse, (exact_inverse - inverse.to(tl.float64)).to(tl.float32)


@triton.jit
def has_nan(row, vocab, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        z = tl.load(row + start + columns, mask=start + columns < vocab, other=0.0).to(tl.float32)
        found |= (z != z).to(tl.int32)
    return tl.max(found, 0) != 0


@triton.jit(do_not_specialize=["stride", "units"])
def stats_of_head_rows(
    logits_ptr, stride, labels_ptr, temperature_ptr, stats_ptr, units, rate, rest, lowest, inverse, inverse_rest,
    ALIGN: tl.constexpr, VOCAB_ALIGN: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """Top and sums of one row in float64, whose label may be another's: one read of it."""
    index = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + index)
    stats = stats_ptr + STATS * index
    if label == ABSENT:
        for k in tl.static_range(STATS):
            tl.store(stats + k, 0.0)
    else:
        vocab = units * VOCAB_ALIGN
        own_rest = rest  # None for logits of 16 bits, which no function of the oldest Triton can return
        if temperature_ptr is not None:
            rate, own_rest, lowest, inverse, inverse_rest = rates_at(temperature_ptr, index)
        rates = (rate, None if rest is None else own_rest, lowest, inverse, inverse_rest)
        row = logits_ptr + tl.multiple_of(index * stride, ALIGN)
        own = (label >= 0) & (label < vocab)
        at_label, top, total, centred, beyond = sums_of_row(
            row, tl.where(own, label, 0), vocab, rates, BLOCK, UNROLL, NEIGHBOURS
        )
        sum_ = total.to(tl.float64) / ONE
        if beyond != 0:
            sum_ += float("nan")
            if has_nan(row, vocab, BLOCK):  # or nothing but -inf: whoever adds up parts of a row has to know
                top += float("nan")
        tl.store(stats, top.to(tl.float64))
        tl.store(stats + 1, sum_)
        tl.store(stats + 2, centred.to(tl.float64) / CENTRED_ONE)
        tl.store(stats + 3, 0.0)
        tl.store(stats + 4, tl.where(own, at_label, -float("inf")).to(tl.float64))


@triton.jit(do_not_specialize=["stride", "out_stride", "units"])
def gradient_of_head_rows(
    logits_ptr, stride, out_ptr, out_stride, rows_ptr, labels_ptr, temperature_ptr, stats_ptr, slopes_ptr,
    entropy_slopes_ptr, units, rate, rest, lowest, inverse, inverse_rest, ALIGN: tl.constexpr, GRAD_ALIGN: tl.constexpr,
    VOCAB_ALIGN: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """Gradient of one row, which may go to another that nobody reads."""
    LN2: tl.constexpr = 0.6931471805599453
    target = tl.program_id(0).to(tl.int64)
    source = tl.load(rows_ptr + target)
    if source >= 0:
        vocab = units * VOCAB_ALIGN
        own_rest = rest  # None for logits of 16 bits, which no function of the oldest Triton can return
        if temperature_ptr is not None:
            rate, own_rest, lowest, inverse, inverse_rest = rates_at(temperature_ptr, source)
        rates = (rate, None if rest is None else own_rest, lowest, inverse, inverse_rest)
        row = logits_ptr + tl.multiple_of(source * stride, ALIGN)
        out = out_ptr + tl.multiple_of(target * out_stride, GRAD_ALIGN)
        stats = stats_ptr + STATS * source
        top = tl.load(stats).to(tl.float32)
        total = tl.load(stats + 1)
        mean = tl.load(stats + 2) * LN2 / total
        at_label = tl.load(stats + 4).to(tl.float32)
        log_sum, log_rest = log1p((total - 1.0).to(tl.float32))
        logp = logp_of(top, at_label, log_sum, log_rest, rates)
        write_gradient(
            row, out, 0, vocab, tl.load(labels_ptr + source), top, total, mean, at_label, logp,
            tl.load(slopes_ptr + source), tl.load(entropy_slopes_ptr + source), rates, BLOCK, UNROLL,
        )  # fmt: skip


@triton.jit(do_not_specialize=["stride", "other_stride", "first", "rows"])
def cap_of_rows(
    source_ptr, stride, out_ptr, other_stride, rows_ptr, count_ptr, first, rows, width, cap, SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a row: ``cap * tanh(source / cap)``; with SLOPE the row of ``out`` is multiplied by that one's derivative."""
    target = tl.program_id(0).to(tl.int64)
    if target < number_of(count_ptr, first, rows):
        source = target
        if rows_ptr is not None:
            source = tl.load(rows_ptr + target)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(source_ptr + source * stride + columns, mask=inside, other=0.0).to(tl.float32) / cap
        out = out_ptr + target * other_stride + columns
        if SLOPE:
            e = tl.exp(-2.0 * tl.abs(x))
            value = tl.load(out, mask=inside, other=0.0).to(tl.float32) * (4.0 * e / ((1.0 + e) * (1.0 + e)))
        else:
            e = expm1(-2.0 * tl.abs(x))  # tanh(|x|) is -e / (2 + e)
            value = tl.where(x < 0.0, cap, -cap) * e / (2.0 + e)
            value = tl.where(not_finite(x) & (x != x), x, value)
        tl.store(out, value.to(out_ptr.dtype.element_ty), mask=inside)


def cap_rows(source, out, cap, count, first=0, rows=None):
    """``out[i] = cap * tanh(source[i] / cap)`` for rows i below ``count - first``; with ``rows`` [L] given
    ``out[i] *= 1 / cosh(source[rows[i]] / cap)^2``."""
    size, width = out.shape
    if size and width:
        with on_device(out):
            cap_of_rows[(size, triton.cdiv(width, 4096))](
                source, source.stride(0), out, out.stride(0), rows, count, first, size, width, float(cap),
                SLOPE=rows is not None, BLOCK=4096, num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip


def _head_rows(logits, temperature):
    """The temperature of each row, or None, and what follows from it and the type of the logits."""
    per_row = isinstance(temperature, torch.Tensor)
    return temperature if per_row else None, rates_of(logits, 1.0 if per_row else temperature)


def row_stats(logits, labels, temperature):
    rows, vocab = logits.shape
    check_vocab("row_stats", vocab)
    stats = torch.empty(rows, STATS.value, dtype=torch.float64, device=logits.device)
    temperature, rates = _head_rows(logits, temperature)
    aligned = alignment(logits, None)
    del aligned["GRAD_ALIGN"]
    if rows:
        with on_device(logits):
            stats_of_head_rows[(rows,)](
                logits, logits.stride(0), labels, temperature, stats, vocab // aligned["VOCAB_ALIGN"], *rates, **aligned,
                **sizes_of(logits),
            )  # fmt: skip
    return stats


def row_logprobs(stats, dtype, temperature):
    top, total, centred, _, at_label = stats.unbind(-1)
    log_sum = total.log2()
    logp = (at_label - top) * reference.exponent_rate(temperature, dtype) - log_sum
    return (logp / reference.LOG2_E).float(), ((log_sum - centred / total) / reference.LOG2_E).float()


def loss_terms(logprobs, entropy, advantages, old_logprobs, ref_logprobs, rollout_logprobs, weights, cu_seqlens, *rule):
    """As of the other backends; of tokens of weight 0 everything is 0."""
    rows, responses = len(logprobs), len(cu_seqlens) - 1
    loss, kl, clipped = torch.zeros(3, rows, device=logprobs.device)
    slopes = torch.zeros(rows, dtype=torch.float64, device=logprobs.device)
    ratio = rule[3]
    formula, kind = formula_of(rule)
    terms = (
        logprobs, entropy, advantages, old_logprobs, ref_logprobs, rollout_logprobs, weights, None, loss, kl, clipped, slopes
    )  # fmt: skip
    with on_device(logprobs):
        if ratio == "token":
            if rows:
                terms_of_tokens[(triton.cdiv(rows, 128),)](
                    *terms, rows, *formula, 1.0, **kind, BLOCK=128, enable_fp_fusion=False
                )
        elif responses:
            terms_of_responses[(responses,)](
                *terms, cu_seqlens.diff(), cu_seqlens, rows, *formula, 1.0, **kind, SHARED=ratio == "sequence",
                BLOCK=_TOKENS, enable_fp_fusion=False,
            )  # fmt: skip
    return loss, kl, clipped != 0, slopes


def row_grads(logits, out, rows, labels, stats, slopes, entropy_slopes, temperature):
    temperature, rates = _head_rows(logits, temperature)
    aligned = alignment(logits, out)
    if len(rows):
        with on_device(logits):
            gradient_of_head_rows[(len(rows),)](
                logits, logits.stride(0), out, out.stride(0), rows, labels, temperature, stats, slopes, entropy_slopes,
                logits.shape[1] // aligned["VOCAB_ALIGN"], *rates, **aligned, **sizes_of(logits),
            )  # fmt: skip
