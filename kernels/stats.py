"""Log-probability, entropy and what the gradient needs of each row: the first step of policy_loss, and all of logprobs."""

import torch
import triton
import triton.language as tl
from capo.kernels.launch import MAX_SPLITS, alignment, rates_of, sizes_of, splits_of
from capo.kernels.rows import first_guess, read_row, results_of_row, settle, sums


@triton.jit(do_not_specialize=["stride", "units", "splits"])
def stats_of_rows(
    logits_ptr, stride, labels_ptr, live_ptr, parts_ptr, logprobs_ptr, entropy_ptr, stats_ptr, units, splits, rate, rest,
    lowest, inverse, inverse_rest, ALIGN: tl.constexpr, VOCAB_ALIGN: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """Results of one row: one read of it, or none if the sums of its parts are there, at most PARTS."""
    index = tl.program_id(0).to(tl.int64)
    vocab = units * VOCAB_ALIGN
    live = True
    if live_ptr is not None:
        live = tl.load(live_ptr + index) != 0
    if live:
        rates = (rate, rest, lowest, inverse, inverse_rest)
        row = logits_ptr + tl.multiple_of(index * stride, ALIGN)
        label = tl.load(labels_ptr + index)
        if parts_ptr is None:
            result = read_row(row, label, vocab, rates, BLOCK, UNROLL, NEIGHBOURS)
        else:
            known = (label >= 0) & (label < vocab)
            top, at_label = first_guess(row, tl.where(known, label, 0), vocab, BLOCK)
            part = tl.arange(0, PARTS)
            parts = parts_ptr + 3 * (index * splits + part)
            total = tl.sum(tl.load(parts, mask=part < splits, other=0), 0)
            centred = tl.sum(tl.load(parts + 1, mask=part < splits, other=0), 0)
            beyond = tl.max(tl.load(parts + 2, mask=part < splits, other=0), 0).to(tl.int32)
            top, total, centred, beyond = settle(
                row, vocab, top, total, centred, beyond, rates, BLOCK, UNROLL, NEIGHBOURS
            )
            result = results_of_row(known, at_label, top, total, centred, beyond, rates)
        logp, entropy, top, sum_, mean, at_label = result
        tl.store(logprobs_ptr + index, logp)
        tl.store(entropy_ptr + index, entropy)
        if stats_ptr is not None:
            tl.store(stats_ptr + 4 * index, top)
            tl.store(stats_ptr + 4 * index + 1, sum_)
            tl.store(stats_ptr + 4 * index + 2, mean)
            tl.store(stats_ptr + 4 * index + 3, at_label)
    else:
        tl.store(logprobs_ptr + index, 0.0)
        tl.store(entropy_ptr + index, 0.0)


@triton.jit(do_not_specialize=["stride", "units", "chunks", "splits"])
def sums_of_parts(
    logits_ptr, stride, labels_ptr, live_ptr, parts_ptr, units, chunks, splits, rate, rest, lowest, inverse, inverse_rest,
    ALIGN: tl.constexpr, VOCAB_ALIGN: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """Sums of one of ``splits`` parts of a row, ``chunks`` of columns each. parts: int64 [rows, splits, 3]"""
    part = tl.program_id(0).to(tl.int64)
    index = part // splits
    vocab = units * VOCAB_ALIGN
    live = True
    if live_ptr is not None:
        live = tl.load(live_ptr + index) != 0
    if live:
        rates = (rate, rest, lowest, inverse, inverse_rest)
        row = logits_ptr + tl.multiple_of(index * stride, ALIGN)
        label = tl.load(labels_ptr + index)
        label = tl.where((label >= 0) & (label < vocab), label, 0)
        top, _ = first_guess(row, label, vocab, BLOCK)
        first = (tl.program_id(0) % splits) * chunks * (BLOCK * UNROLL)
        last = tl.minimum(first + chunks * (BLOCK * UNROLL), vocab)
        total, centred, beyond = sums(row, first, last, top, rates, BLOCK, UNROLL, NEIGHBOURS)
        tl.store(parts_ptr + 3 * part, total)
        tl.store(parts_ptr + 3 * part + 1, centred)
        tl.store(parts_ptr + 3 * part + 2, beyond.to(tl.int64))


def row_stats(logits, labels, live, logprobs, entropy, stats, temperature):
    """Fill logprobs [N], entropy [N] and, unless None, stats [N, 4]: top, sum and mean of exp(z - top), label's logit.

    Rows that are not ``live`` (not 0; None: all are) are not read: they get log-probability and entropy 0.
    """
    rows, vocab = logits.shape
    rates = rates_of(logits, temperature)
    aligned = {name: value for name, value in alignment(logits, None).items() if name != "GRAD_ALIGN"}
    sizes = sizes_of(logits)
    units = vocab // aligned["VOCAB_ALIGN"]
    splits, chunks = splits_of(logits)
    source = logits, logits.stride(0), labels, live
    parts = None
    if splits > 1:
        parts = torch.empty((rows, splits, 3), dtype=torch.int64, device=logits.device)
        sums_of_parts[(rows * splits,)](*source, parts, units, chunks, splits, *rates, **aligned, **sizes)
    stats_of_rows[(rows,)](
        *source, parts, logprobs, entropy, stats, units, splits, *rates, **aligned, **sizes, PARTS=MAX_SPLITS
    )
