"""What is done with a row of logits, by one program: its sums, and its gradient.

The sums are exact: what a few neighbouring columns give is added in float32 in an order fixed by the columns, then rounded
to a multiple of 2^-34, and those multiples are added as integers. So the result does not depend on how many programs and
threads share a row, nor on how its memory is aligned.
"""

import triton
import triton.language as tl
from capo.kernels.numbers import expm1, log1p, not_finite

# The integers stay below 2^63 up to this size of vocabulary: 2^20 columns, at least 8 in a sum, which is less than LIMIT.
MAX_VOCAB = 2**20
LIMIT = tl.constexpr(2.0**10)
ONE = tl.constexpr(2.0**34)
CENTRED_ONE = tl.constexpr(2.0**32)

BLOCK = 4096  # columns at a time
THREADS = 512


@triton.jit
def powers(z, top, rates):
    """2^t and t = (z - top) * rate, held at -200, where t * 2^t is 0; NaN stays.

    ``rates``: of log2(e) / temperature the float32 and the rest (None: not needed), -200 / rate, and of 1 / temperature the
    float32 and the rest.
    """
    rate, rest, lowest, _, _ = rates
    d = tl.maximum(z - top, lowest, propagate_nan=tl.PropagateNan.ALL)
    t = d * rate
    if rest is not None:
        t = tl.fma(d, rest, t)
    return tl.exp2(t), t


@triton.jit
def add_pairs(x):
    """Sums of two neighbours each. [n] -> [n / 2]"""
    a, b = tl.split(tl.reshape(x, (x.shape[0] // 2, 2)))
    return a + b


@triton.jit
def add_neighbours(x, COUNT: tl.constexpr):
    """Sums of COUNT neighbours each, 4 or 8, in an order of their own. [n] -> [n / COUNT]"""
    x = add_pairs(add_pairs(x))
    if COUNT == 8:  # no recursion: Triton 3.4 compiles none
        x = add_pairs(x)
    return x


@triton.jit
def to_fixed(x, unit):
    return tl.floor(x * unit + 0.5).to(tl.int64)


@triton.jit
def add_exactly(sum_, moment, total, centred, beyond, NEIGHBOURS: tl.constexpr):
    """The integers and whether they do not fit, with the sums of what each thread has added to them."""
    sum_ = add_neighbours(sum_, NEIGHBOURS)
    moment = add_neighbours(moment, NEIGHBOURS)
    fits = sum_ < LIMIT
    total += to_fixed(tl.where(fits, sum_, 0.0), ONE)
    centred += to_fixed(tl.where(fits, moment, 0.0), CENTRED_ONE)
    return total, centred, beyond | tl.where(fits, 0, 1)


@triton.jit
def first_guess(row, label, vocab, BLOCK: tl.constexpr):
    """The largest logit of the first block and the label's, which was sampled: near the largest of all, mostly."""
    columns = tl.arange(0, BLOCK)
    z = tl.load(row + columns, mask=columns < vocab, other=-float("inf"))
    at_label = tl.load(row + label).to(tl.float32)
    return tl.maximum(tl.max(z.to(tl.float32), 0), at_label), at_label


@triton.jit
def largest(row, vocab, BLOCK: tl.constexpr):
    """The largest logit."""
    columns = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        z = tl.load(row + start + columns, mask=start + columns < vocab, other=-float("inf"))
        best = tl.maximum(best, z.to(tl.float32))
    return tl.max(best, 0)


@triton.jit
def sums(row, first, last, top, rates, BLOCK: tl.constexpr, UNROLL: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """Sums of 2^t and of 2^t * t over the columns [first, last), as integers, and whether they do not fit.

    They do not where ``top`` is far below the largest logit, and where there is NaN, +inf or nothing but -inf.
    """
    LANES: tl.constexpr = BLOCK // NEIGHBOURS
    CHUNK: tl.constexpr = BLOCK * UNROLL
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([LANES], tl.int64)
    centred = tl.zeros([LANES], tl.int64)
    beyond = tl.zeros([LANES], tl.int32)
    whole = first + (last - first) // CHUNK * CHUNK
    for start in range(first, whole, CHUNK):
        sum_ = tl.zeros([BLOCK], tl.float32)
        moment = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(UNROLL):
            z = tl.load(row + start + k * BLOCK + columns, eviction_policy="evict_last")
            e, t = powers(z.to(tl.float32), top, rates)
            sum_ += e
            moment = tl.fma(e, t, moment)
        total, centred, beyond = add_exactly(sum_, moment, total, centred, beyond, NEIGHBOURS)
    if whole < last:
        sum_ = tl.zeros([BLOCK], tl.float32)
        moment = tl.zeros([BLOCK], tl.float32)
        for start in range(whole, last, BLOCK):
            inside = start + columns < last
            z = tl.load(row + start + columns, mask=inside, other=-float("inf"), eviction_policy="evict_last")
            e, t = powers(z.to(tl.float32), top, rates)
            sum_ += e
            moment = tl.fma(e, t, moment)
        total, centred, beyond = add_exactly(sum_, moment, total, centred, beyond, NEIGHBOURS)
    return tl.sum(total, 0), tl.sum(centred, 0), tl.max(beyond, 0)


@triton.jit
def logp_of(top, at_label, log_sum, log_rest, rates):
    """Log-probability of the label, from the logarithm of the sum of exp(z - top) in two parts. float64"""
    # A handful of numbers for each row, in float64: the difference may be much smaller than its parts.
    below = at_label.to(tl.float64) - top.to(tl.float64)
    logp = below * rates[3] + (below * rates[4] - (log_sum.to(tl.float64) + log_rest.to(tl.float64)))
    return tl.where(below == -float("inf"), below, logp)


@triton.jit
def results_of_row(known, at_label, top, total, centred, beyond, rates):
    """logp, entropy, top, sum of exp(z - top), mean of z - top and the label's logit, from the sums of a row.

    NaN if they do not fit; without a ``known`` label there is no logp.
    """
    LN2: tl.constexpr = 0.6931471805599453
    nan = tl.where(beyond == 0, 0.0, float("nan"))
    log_sum, log_rest = log1p((total - 17179869184).to(tl.float32) * (1 / ONE))
    sum_ = total.to(tl.float32) * (1 / ONE)
    mean = centred.to(tl.float32) * (LN2 / CENTRED_ONE) / sum_
    logp = logp_of(top, at_label, log_sum, log_rest, rates).to(tl.float32)
    logp = tl.where(known, logp + nan, float("nan"))
    return logp, log_sum + (log_rest - mean) + nan, top, sum_ + nan, mean + nan, at_label


@triton.jit
def settle(
    row, vocab, top, total, centred, beyond, rates, BLOCK: tl.constexpr, UNROLL: tl.constexpr, NEIGHBOURS: tl.constexpr
):  # fmt: skip
    """top and the sums of a row, which is read again from its largest logit if they do not fit."""
    if beyond != 0:
        top = largest(row, vocab, BLOCK)
        total, centred, beyond = sums(row, 0, vocab, top, rates, BLOCK, UNROLL, NEIGHBOURS)
    return top, total, centred, beyond


@triton.jit
def sums_of_row(
    row, label, vocab, rates, BLOCK: tl.constexpr, UNROLL: tl.constexpr, NEIGHBOURS: tl.constexpr
):  # fmt: skip
    """The label's logit, top and the sums of a row; the label lies in the vocabulary."""
    top, at_label = first_guess(row, label, vocab, BLOCK)
    total, centred, beyond = sums(row, 0, vocab, top, rates, BLOCK, UNROLL, NEIGHBOURS)
    top, total, centred, beyond = settle(row, vocab, top, total, centred, beyond, rates, BLOCK, UNROLL, NEIGHBOURS)
    return at_label, top, total, centred, beyond


@triton.jit
def read_row(
    row, label, vocab, rates, BLOCK: tl.constexpr, UNROLL: tl.constexpr, NEIGHBOURS: tl.constexpr
):  # fmt: skip
    """What ``results_of_row`` gives; a label out of range gives NaN."""
    known = (label >= 0) & (label < vocab)
    at_label, top, total, centred, beyond = sums_of_row(
        row, tl.where(known, label, 0), vocab, rates, BLOCK, UNROLL, NEIGHBOURS
    )
    return results_of_row(known, at_label, top, total, centred, beyond, rates)


@triton.jit
def fill(out, first, last, value, BLOCK: tl.constexpr):
    """One value in the columns [first, last)."""
    columns = tl.arange(0, BLOCK)
    block = (tl.full([BLOCK], 0.0, tl.float32) + value).to(out.dtype.element_ty)
    whole = first + (last - first) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        tl.store(out + start + columns, block, eviction_policy="evict_first")
    if whole < last:
        tl.store(out + whole + columns, block, mask=whole + columns < last, eviction_policy="evict_first")


@triton.jit
def gradient_of(z, top, rates, alpha, beta):
    e, t = powers(z.to(tl.float32), top, rates)
    if beta is None:
        return e * alpha
    else:
        return e * tl.fma(beta, t, alpha)


@triton.jit
def write_gradient(
    row, out, first, last, label, top, sum_, mean, at_label, logp, g, h, rates, BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """The gradient in the columns [first, last): g is d loss / d logp, h d loss / d entropy or None; float32 or float64.

    From the last block to the first: what ``sums`` read last is still in the cache.
    """
    LN2: tl.constexpr = 0.6931471805599453
    CHUNK: tl.constexpr = BLOCK * UNROLL
    s = rates[3]
    label_gradient = -s * g * expm1(logp)
    if h is None:
        beta = None
        alpha = (-s * g / sum_).to(tl.float32)
        broken = not_finite(alpha + label_gradient)
        idle = g == 0.0
    else:
        beta = (-s * h * LN2 / sum_).to(tl.float32)
        alpha = (s * (h * mean - g) / sum_).to(tl.float32)
        p = tl.exp(logp)
        label_gradient -= tl.where(p > 0.0, s * h * p * ((at_label - top) * s - mean), 0.0)
        broken = not_finite(alpha + beta + label_gradient)
        idle = (g == 0.0) & (h == 0.0)
    if idle | broken:
        fill(out, first, last, tl.where(broken, float("nan"), 0.0), BLOCK)
    else:
        columns = tl.arange(0, BLOCK)
        whole = first + (last - first) // CHUNK * CHUNK
        for start in range(whole, last, BLOCK):
            inside = start + columns < last
            z = tl.load(row + start + columns, mask=inside, other=-float("inf"), eviction_policy="evict_first")
            value = gradient_of(z, top, rates, alpha, beta).to(out.dtype.element_ty)
            tl.store(out + start + columns, value, mask=inside, eviction_policy="evict_first")
        columns = tl.arange(0, CHUNK)
        for step in range(0, whole - first, CHUNK):
            start = whole - CHUNK - step
            z = tl.load(row + start + columns, eviction_policy="evict_first")
            value = gradient_of(z, top, rates, alpha, beta).to(out.dtype.element_ty)
            tl.store(out + start + columns, value, eviction_policy="evict_first")
        tl.debug_barrier()  # the label's entry lies in one of the blocks
        if (label >= first) & (label < last):
            tl.store(out + label, label_gradient.to(tl.float32).to(out.dtype.element_ty))
