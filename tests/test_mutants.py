"""Mutation tests: faults put into the kernels, one at a time, each of which the other tests have to notice.

Every mutant is one replacement in one file. It becomes a complete package in a folder of its own: a copy of ``capo`` with
the native module that its sources give. The tests named beside it run there in a process of their own and must fail.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import emulated
import pytest

pytestmark = pytest.mark.mutants

ROOT = Path(__file__).resolve().parent.parent
CREDIT, LOSS, LOGPROBS = "test_credit.py::", "test_policy_loss.py::", "test_logprobs.py::"
OPTIONS, REGIMES, SIZES = LOSS + "test_every_option", LOSS + "test_every_regime", LOSS + "test_every_size_of_vocabulary"
COMBINATIONS = LOSS + "test_every_combination_equals_the_reference"
EDGE = LOSS + "test_a_ratio_on_the_edge_is_not_clipped_and_beyond_it_is"
EXTREME = LOSS + "test_extreme_ratios_stay_finite"
DEAD = LOSS + "test_dead_tokens_are_not_read_and_still_count_in_the_denominator"
NO_LABEL = LOSS + "test_a_label_of_probability_zero_has_no_gradient_through_the_ratio"
NAN = LOSS + "test_nan_in_one_row_stays_there"
BAD_LABEL = LOSS + "test_a_label_outside_the_vocabulary_is_named"
INPLACE = LOSS + "test_inplace_gives_the_same_bits_in_the_memory_of_the_logits"
HEAD = "test_linear_policy_loss.py::"
HEAD_OPTIONS, DROPPED = HEAD + "test_every_option", HEAD + "test_what_is_clipped"
WRITTEN = HEAD + "test_all_of_the_gradient"
HEAD_BITS = HEAD + "test_chunks or test_a_row_does"
WEIGHTS, RULES = CREDIT + "test_step_weights", CREDIT + "test_every_rule_equals_the_reference"
PRODUCTS = CREDIT + "test_every_reward_with_every_normalisation"
GOLDEN, CONSTANT = CREDIT + "test_the_golden_vector_of_the_paper", CREDIT + "test_constant_groups_have_advantage_zero"
BAD_CREDIT = CREDIT + "test_bad_values_are_named"
FOREIGN = CREDIT + "test_only_minus_one_nought_and_one_are_votes"
STEPS, CRITIQUE, SCORE, SHAPE = "test_steps.py::", "test_critique.py::", "test_score.py::", "test_shape.py::"
CONFIG, CHECKPOINT, TRAIN = "test_config.py::", "test_checkpoint.py::", "test_train.py::"
ORACLE, SAME_STEPS = STEPS + "test_each_token_has_the_step_of_the_table", STEPS + "test_native_equals"
BAD_SHAPE, DAMAGE = SHAPE + "test_bad_input", CHECKPOINT + "test_damage"
SPOILED_SAVES = CHECKPOINT + "test_a_save_that_dies or test_a_save_is_on_the_disk"


class Mutant(NamedTuple):
    """The fault ``name``: ``old``, which stands in the file once, becomes ``new``; ``tests`` has to fail."""

    name: str
    tests: str
    old: str
    new: str


TOKEN_LOSS = [
    Mutant("clip takes the other side", EDGE, "bounded * t.advantage < ratio * ", "bounded * t.advantage > ratio * "),
    Mutant("clip on the edge", EDGE, "bounded * t.advantage < ratio * ", "bounded * t.advantage <= ratio * "),
    Mutant(
        "clip bounds swapped",
        OPTIONS,
        "rule.ratio_low : (ratio > rule.ratio_high ? rule.ratio_high",
        "rule.ratio_high : (ratio > rule.ratio_high ? rule.ratio_low",
    ),
    Mutant("no upper clip", OPTIONS, "(ratio > rule.ratio_high ? rule.ratio_high : ratio)", "ratio"),
    Mutant("no dual clip", OPTIONS, "t.advantage < 0.f && ratio > rule.clip_dual", "false"),
    Mutant("dual clip of good tokens", LOSS + "test_the_dual", "t.advantage < 0.f && ratio", "ratio"),
    Mutant("gradient beyond the dual clip", OPTIONS, "out.clipped = clipped || dual", "out.clipped = clipped"),
    Mutant("gradient of clipped tokens", OPTIONS, "const bool held = out.clipped || ", "const bool held = "),
    Mutant("gradient beyond the limit of the ratio", EXTREME, "fabsf(t.log_ratio) > kLogRatioLimit || ", ""),
    Mutant("gradient of a label of probability 0", NO_LABEL, " || impossible", ""),
    Mutant("ratio without limit", EXTREME, "expf(limited(t.log_ratio))", "expf(t.log_ratio)"),
    Mutant("cispo does not clip its gradient", COMBINATIONS, "through_logp = -bounded", "through_logp = -ratio"),
    Mutant("cispo reports no clipping", COMBINATIONS, "out.clipped = bounded != ratio", "out.clipped = false"),
    Mutant(
        "importance without cap",
        OPTIONS,
        "fminf(expf(limited(t.mismatch)), rule.importance_cap)",
        "expf(limited(t.mismatch))",
    ),
    Mutant("importance leaves out the gradient", OPTIONS, "out.through_ratio *= weight;", ""),
    Mutant("importance leaves out the gradient of cispo", COMBINATIONS, "out.through_logp *= weight;", ""),
    Mutant("kl sign", OPTIONS, "t.logp - t.ref_logp", "t.ref_logp - t.logp"),
    Mutant("k1 slope sign", OPTIONS, "slope = 1.f", "slope = -1.f"),
    Mutant("k2 slope without distance", OPTIONS, "slope = d;", "slope = 1.f;"),
    Mutant("k3 without limit", LOSS, "const float held = limited(d)", "const float held = d"),
    Mutant("k3 slope beyond the limit", LOSS, "fabsf(d) > kLogRatioLimit ? 0.f : -e", "-e"),
    Mutant("k3 slope sign", OPTIONS, "0.f : -e", "0.f : e"),
    Mutant("kl slope without coefficient", OPTIONS, "rule.kl_coef * slope", "slope"),
    Mutant("entropy sign in the loss", OPTIONS, "out.loss -= rule.entropy", "out.loss += rule.entropy"),
    Mutant("NaN hidden on-policy", LOSS + "test_nan_shows", "0.f + (isnan(logp) ? logp : 0.f)", "0.f"),
    Mutant("mismatch against the new policy", OPTIONS, "old - values.rollout", "t.logp - values.rollout"),
    Mutant(
        "on-policy mismatch without logp",
        LOSS + "test_importance_on_policy",
        "nullptr ? t.logp : values.old",
        "nullptr ? 0.f : values.old",
    ),
    Mutant(
        "kl of tokens without advantage dropped",
        LOSS + "test_with_kl_or_entropy_no_unmasked_token_is_dead",
        "rule.kl != Kl::kNone || rule.entropy_coef != 0.f",
        "rule.entropy_coef != 0.f",
    ),
]

ROW_FORMULAS = [
    Mutant("no off-label gradient", OPTIONS, "s * (h * mean - g) / sum", "0.0"),
    Mutant("off-label gradient flipped", OPTIONS, "s * (h * mean - g) / sum", "s * (h * mean + g) / sum"),
    Mutant("label gradient halved", OPTIONS, "s * (g * -expm1", "s * (0.5 * g * -expm1"),
    Mutant("entropy not centred", OPTIONS, "s * (h * mean - g)", "s * -g"),
    Mutant("entropy not centred at the label", OPTIONS, "log(sum) - mean : 0.0", "log(sum) : 0.0"),
    Mutant("no entropy gradient", OPTIONS, "how.beta = -s * h * kLn2 / sum", "how.beta = 0.0"),
    Mutant("entropy without its second term", OPTIONS, "log_sum - row.stats.centred / row.stats.sum", "log_sum"),
    Mutant("temperature dropped in the gradient", OPTIONS, "s = 1.0 / temperature", "s = 1.0"),
    Mutant("temperature dropped in logp", LOGPROBS, "1.0 / (kLn2 * temperature)", "(void(temperature), 1.0 / kLn2)"),
]

ROW_LOSS = [
    Mutant("entropy sign in the gradient", OPTIONS, "h = -static_cast<double>", "h = static_cast<double>"),
    Mutant("mask ignored", OPTIONS, "return args.mask == nullptr || args.mask[row];", "return row >= 0;"),
    Mutant(
        "mask shifted by one",
        OPTIONS,
        "|| args.mask[row]; }",
        "|| args.mask[std::max<int64_t>(row, 1) - 1]; }",
    ),
    Mutant("masked labels checked", LOSS + "test_poison", "(mask == nullptr || mask[i]) && (", "(mask == mask) && ("),
    Mutant("label bound one too high", BAD_LABEL, "labels[i] >= vocab", "labels[i] > vocab"),
    Mutant("negative labels accepted", BAD_LABEL, "labels[i] < 0 || labels[i]", "labels[i]"),
    Mutant(
        "masked tokens in the denominator",
        OPTIONS,
        "if (!active(row)) continue;\n        ++counts[i];",
        "++counts[i];\n        if (!active(row)) continue;",
    ),
    Mutant(
        "dead tokens not in the denominator",
        DEAD,
        "++counts[i];",
        "counts[i] += args.values.advantages[row] != 0.f;",
    ),
    Mutant("dead tokens read", DEAD, "other_terms || args.values.advantages[row] != 0.f;", "true;"),
    Mutant("one response too few", OPTIONS, "static_cast<double>(args.responses))", "(args.responses - 1.0))"),
    Mutant("token mean over all rows", OPTIONS, "1.0 / static_cast<double>(num_active)", "1.0 / args.rows"),
    Mutant("constant ignored", OPTIONS, "static_cast<double>(args.rule.constant)", "static_cast<double>(num_active)"),
    Mutant("dead tokens of a live response skipped", OPTIONS, "!= Ratio::kToken && any)", "!= Ratio::kToken && !any)"),
    Mutant("sequence ratio not averaged", OPTIONS, "total / static_cast<double>(count)", "total"),
    Mutant(
        "sequence gradient of the own token only",
        OPTIONS,
        "if (rule.ratio == Ratio::kSequenceToken)",
        "if (rule.ratio != Ratio::kToken)",
    ),
    Mutant("sequence gradient not averaged", OPTIONS, "through_ratio / static_cast<double>(count)", "through_ratio"),
    Mutant(
        "sequence gradient of a label of probability 0",
        NO_LABEL,
        "live(row) && logprobs[row] != -std::numeric_limits<float>::infinity()",
        "live(row)",
    ),
    Mutant(
        "logits overwritten before they are read again",
        INPLACE,
        "const Row r = read(row);",
        "const Row r = read(row);\n        if (args.grad != nullptr) kernels.fill[type](grad(row), args.vocab, 0.f, false);",
    ),
    Mutant(
        "gradient of dead rows not written",
        INPLACE,
        "if (args.grad != nullptr) fill_zero(row);",
        "",
    ),
    Mutant("kl averaged over all rows", OPTIONS, "total_kl / active_or_one", "total_kl / args.rows"),
    Mutant(
        "masked rows read by logprobs",
        LOGPROBS + "test_masked",
        "|| args.mask[row])\n        result",
        "|| true)\n        result",
    ),
    Mutant("gradients of moved rows stay", DROPPED, "row_at(grad, i, args.stride", "row_at(grad, from, args.stride"),
    Mutant("labels of moved rows stay", DROPPED, "args.labels[from], false", "args.labels[i], false"),
    Mutant("slopes of moved rows stay", DROPPED, "row_grad(row, slopes[from]", "row_grad(row, slopes[i]"),
    Mutant(
        "weights in another order",
        HEAD_OPTIONS,
        "tokens.slope(row, args.weights[row])",
        "tokens.slope(row, *args.weights)",
    ),
    Mutant("masked rows take the row before", LOGPROBS + "test_masked", "      result = {};\n", ""),
]

ROWS = [
    Mutant(
        "last logits not in the sum", SIZES, "for (; i < last; i += kPair)", "for (; i + kPair <= last; i += kPair)"
    ),
    Mutant(
        "last logits not in the maximum",
        REGIMES,
        "for (; i < size; i += kPair)",
        "for (; i + kPair <= size; i += kPair)",
    ),
    Mutant("last gradients not written", SIZES, "if (i < size) part(i, size - i);", ""),
    Mutant("first guess of the top is final", REGIMES, "result.sum > 0.0 && result.sum < 0x1p24", "true"),
    Mutant("label not in the guess of the top", REGIMES, "if (at_label > top) top = at_label;", ""),
    Mutant("-inf not held", REGIMES, "if constexpr (kHeld || !kAnyExponent) d = hold", "if constexpr (false) d = hold"),
    Mutant(
        "gradient of -inf not 0",
        LOSS + "test_logits_of_minus_infinity",
        "if constexpr (!kAnyExponent) g = t <",
        "if constexpr (false) g = t <",
    ),
    # No mutant takes the shift out of the factors (back = 1): its effect is below twice eager PyTorch's error there.
    Mutant(
        "16 bits without shift of the entropy term",
        LOSS + "test_the_entropy_of_a_uniform_row",
        "how.alpha - how.beta * shift",
        "how.alpha",
    ),
    Mutant("first vector of a run left out", RULES, "put(p, whole, false);", ""),
    Mutant("last vector of a run left out", RULES, "put(p + size - kWhole, whole, false);", ""),
    Mutant("NaN filled with 0", NAN, "store_one(&element, value);", "store_one(&element, 0.f);"),
    Mutant("label gradient not written", OPTIONS, "store_one(out + how.label, how.label_grad);", ""),
]

VECTORS = [
    Mutant(
        "even and odd logits swapped", OPTIONS, "put(p, low | high, stream)", "put(p, low << 16 | high >> 16, stream)"
    ),
    Mutant(
        "bfloat16 truncated",
        LOSS + "test_gradients_are_rounded",
        "(bit_cast<vu>(even) + 0x8000u) >> 16",
        "bit_cast<vu>(even) >> 16",
    ),
    Mutant(
        "half truncated", LOSS + "test_gradients_are_rounded", "rebiased + 0xfffu + ((rebiased >> 13) & 1u)", "rebiased"
    ),
    Mutant("half of the lanes lost in float64", OPTIONS, "const half_vd both = low + high", "const half_vd both = low"),
    Mutant("low precision of the exponential", OPTIONS, "0.24022242426872253f", "0.24032242426872253f"),
]

FORMULAS = [
    Mutant("a tie is no majority", WEIGHTS, "2 * c >= n", "2 * c > n"),
    Mutant("a tie is a strict majority", WEIGHTS, "2 * c > n", "2 * c >= n"),
    Mutant("abstentions count as clear", WEIGHTS, "count - static_cast<int64_t>(abstained_total)", "count"),
    Mutant("abstentions count as flags", WEIGHTS, "word & kOnes & ~abstained", "word & kOnes"),
    Mutant("votes of the ninth critique are lost", WEIGHTS, "k < count; k += 8", "k < 8; k += 8"),
    Mutant("intersection is union", WEIGHTS, "return c == n", "return c >= 1"),
    Mutant("union is intersection", WEIGHTS, "return c >= 1", "return c == n"),
    Mutant("average over absent votes", WEIGHTS, "static_cast<double>(n);", "static_cast<double>(n + 1);"),
    Mutant("numbers that are no votes", FOREIGN, "foreign |= word ^ (flagged | (abstained * 0xff));", ""),
    Mutant("a step without votes is flagged", WEIGHTS, "if (n == 0) return 0.0;", ""),
    Mutant("flawed are the clear ones", RULES, "? c - p : c)", "? c : c - p)"),
    Mutant("outcome 0 earns what 1 does", RULES, "outcome > 0.0 ? c : p", "outcome >= 0.0 ? c : p"),
    Mutant(
        "rounding is a difference",
        CREDIT + "test_rewards_that_differ_by",
        " || high - low <= 1e-12 * (a > b ? a : b)",
        "",
    ),
    Mutant(
        "floor added to the deviation",
        PRODUCTS,
        "(std < rule.std_floor ? rule.std_floor : std)",
        "(std + rule.std_floor)",
    ),
]

ADVANTAGES = [
    Mutant(
        "steps end one token early",
        GOLDEN,
        "run(args.starts[s], args.ends[s], base -",
        "run(args.starts[s], args.ends[s] - 1, base -",
    ),
    Mutant(
        "steps start one token late",
        GOLDEN,
        "run(token, args.starts[s], base);\n        run(args.starts[s],",
        "run(token, args.starts[s] + 1, base);\n        run(args.starts[s] + 1,",
    ),
    Mutant(
        "steps begin and end one token early",
        GOLDEN,
        "token = args.ends[s];\n      }\n      run",
        "token = args.ends[s] - 1;\n      }\n      run",
    ),
    Mutant(
        "flagged steps are rewarded",
        GOLDEN,
        "base - rule.process_weight * weights[s]",
        "base + rule.process_weight * weights[s]",
    ),
    Mutant(
        "sample deviation of tokens",
        GOLDEN,
        "std::sqrt(squares / static_cast<double>(count))",
        "std::sqrt(squares / (count - 1.0))",
    ),
    Mutant(
        "population deviation of responses",
        RULES,
        "const Moments moments(means, 1.0)",
        "const Moments moments(means, 0.0)",
    ),
    Mutant(
        "mean over runs, not tokens",
        GOLDEN,
        "range.add(r);\n        sum += static_cast<double>(last - first) * r;",
        "range.add(r);\n        sum += first < last ? r : 0.0;",
    ),
    Mutant(
        "constant tokens not noticed",
        CONSTANT,
        "if (range.constant()) return;\n    const double mean",
        "const double mean",
    ),
    Mutant(
        "constant step rewards not noticed",
        CONSTANT,
        "if (range.constant()) return;\n    const Moments",
        "const Moments",
    ),
    Mutant("undecided outcomes stay", CREDIT + "test_an_undecided", "if (!std::isnan(args.outcomes[i])) ", ""),
    Mutant(
        "undecided is wrong",
        CREDIT + "test_an_undecided",
        "if (!std::isnan(args.outcomes[i])) members.push_back(i);",
        "{ float& x = const_cast<float*>(args.outcomes)[i]; if (std::isnan(x)) x = 0.f; members.push_back(i); }",
    ),
    Mutant("groups mixed", CREDIT + "test_groups", " || args.groups[order[i]] != args.groups[order[i - 1]]", ""),
    Mutant(
        "groups only if adjacent", CREDIT + "test_groups", "return args.groups[a] < args.groups[b];", "return a < b;"
    ),
    Mutant("half a vote does not flag", RULES, "weights[s] < 0.5", "weights[s] <= 0.5"),
    Mutant("prefix up to the end of the error", RULES, "? args.starts[s] : last", "? args.ends[s] : last"),
    Mutant("outcome 0 is right", RULES, "args.outcomes[i] > 0.f", "args.outcomes[i] >= 0.f"),
    Mutant(
        "clamp of one side",
        PRODUCTS,
        "std::clamp(advantage, -rule.clamp, rule.clamp)",
        "std::min(advantage, rule.clamp)",
    ),
    Mutant("leave one out leaves none out", RULES, "(sum - means[k]) / (count - 1.0)", "sum / count"),
    Mutant(
        "a step's own reward left out",
        RULES,
        "put(args.ends[s], end, sum);\n        sum += (step_reward(i, s) - offset[i]) * factor[i];",
        "sum += (step_reward(i, s) - offset[i]) * factor[i];\n        put(args.ends[s], end, sum);",
    ),
    Mutant("no steps, no share", RULES, "count == 0 ? 1.0", "count == 0 ? 0.0"),
    Mutant("shares of the wrong responses", RULES, "if (!right(i)) continue;", ""),
    Mutant(
        "few groups are not written",
        CREDIT + "test_result_does_not_depend_on_the_order_of_votes_or_on_threads",
        "if (all_fit && !write_at_once)",
        "if (all_fit && write_at_once)",
    ),
    Mutant("steps beyond their response", BAD_CREDIT, " && token <= args.cu_seqlens[i + 1]", ""),
    Mutant("steps overlap", BAD_CREDIT, "args.starts[s] < token || ", ""),
]

CALLS = [
    Mutant("memory that a tensor has", HEAD + "test_memory_of_the_gradient", "given() is not None or ", ""),
    Mutant(
        "strides of the weight forgotten",
        HEAD + "test_kept_memory_has",
        "as_strided(x.shape, strides)",
        "view(x.shape)",
    ),
    Mutant("order of the votes", WEIGHTS, '("majority", "strict_majority",', '("strict_majority", "majority",'),
    Mutant("order of the normalisations", PRODUCTS, '("group_tokens", "group_mean",', '("group_mean", "group_tokens",'),
    Mutant("order of the kl estimators", OPTIONS, '("none", "k1", "k2", "k3")', '("none", "k2", "k1", "k3")'),
    Mutant(
        "order of the ratios",
        OPTIONS,
        '("token", "sequence", "sequence_token")',
        '("token", "sequence_token", "sequence")',
    ),
    Mutant("clip widths swapped", OPTIONS, "_float32(1 - clip_low)", "_float32(1 - clip_high)"),
    Mutant(
        "row stride ignored",
        LOGPROBS + "test_strided",
        "logits.stride(0),\n        _DTYPES.index(logits.dtype),\n        rows,\n        vocab,\n"
        "        _address(labels)",
        "vocab,\n        _DTYPES.index(logits.dtype),\n        rows,\n        vocab,\n        _address(labels)",
    ),
]

OPS = [
    Mutant(
        "upstream gradient of the head dropped",
        HEAD + "test_upstream",
        "_scaled(grad, grad_loss) for grad",
        "grad for grad",
    ),
    Mutant(
        "upstream gradient of the head dropped by compile",
        HEAD + "test_compile",
        "*(grad * grad_loss if",
        "*(grad if",
    ),
    Mutant("autocast ignored", HEAD + "test_autocast", "else x.to(wanted)", "else x"),
    Mutant(
        "old log-probabilities ignored",
        OPTIONS,
        '_row_floats(op, "old_logprobs", old_logprobs, rows)',
        "None",
    ),
    Mutant(
        "upstream gradient dropped",
        LOSS + "test_upstream",
        "return _scaled(grad_logits, grad_loss), None, None",
        "return grad_logits, None, None",
    ),
    Mutant(
        "upstream gradient dropped by compile",
        LOSS + "test_compile_without",
        "(grad_logits * grad_loss, *",
        "(grad_logits, *",
    ),
    Mutant("mask inverted", OPTIONS, "return mask.contiguous()", "return ~mask.contiguous()"),
    Mutant("numbers as mask inverted", LOSS + "test_kinds", "mask = mask != 0", "mask = mask == 0"),
    Mutant(
        "version not raised in place",
        LOSS + "test_inplace_is_noticed",
        "torch.autograd.graph.increment_version(logits)",
        "pass",
    ),
]

LINEAR = [
    Mutant("another row moves", DROPPED, "count + kept[count:].nonzero()", "kept[count:].nonzero()"),
    Mutant("hidden states do not move", DROPPED, "if len(moves) == len(piece) else inputs[moves]", "[: len(moves)]"),
    Mutant(
        "gradients go to other rows",
        DROPPED,
        "add_rows(rows.index[piece[moves]]",
        "add_rows(rows.index[piece[: len(moves)]]",
    ),
    Mutant(
        "clipped rows kept", HEAD + "test_dead_and_clipped", "kept = (slopes != 0) |", "kept = (slopes == slopes) |"
    ),
    Mutant("entropy of clipped rows dropped", DROPPED, " | (entropy_slopes[these] != 0)", ""),
    Mutant("entropy raised", HEAD_OPTIONS, "weights * -float(", "weights * float("),
    Mutant(
        "weights of the first chunk", HEAD_OPTIONS, "*of_these, weights[these]", "*of_these, weights[: last - first]"
    ),
    Mutant("ratios of parts of a response", HEAD_OPTIONS, 'by_response = rule.ratio != "token"', "by_response = False"),
    Mutant("rows of the first response again", HEAD_BITS, "(first + kept.nonzero()", "(kept.nonzero()"),
    Mutant("the last chunk's gradient of weight", HEAD_OPTIONS, "part += product", "part.copy_(product)"),
    Mutant(
        "the first chunk adds to nothing",
        WRITTEN,
        "if written:\n                    part +=",
        "if True:\n                    part +=",
    ),
    Mutant(
        "the only chunk adds to nothing", WRITTEN, "grad.t(), inputs, beta=int(written)", "grad.t(), inputs, beta=1"
    ),
    Mutant("gradient of padding is not written", WRITTEN, "self.total[self.head.width :].zero_()", "pass"),
    Mutant(
        "without live rows nothing is written",
        WRITTEN,
        "torch.zeros_like(self.head.whole",
        "torch.empty_like(self.head.whole",
    ),
    Mutant("the last chunk's gradient of bias", HEAD_OPTIONS, "part += columns.sum", "part[:] = columns.sum"),
    Mutant(
        "gradient of weight summed in 16 bits", HEAD + "test_the_error", "torch.float32 if several else head", "head"
    ),
    Mutant("no derivative of the softcap", HEAD + "test_softcap", " / torch.cosh(", " / torch.ones_like("),
    Mutant(
        "no softcap", HEAD + "test_softcap", "torch.tanh(uncapped.float() / self.softcap) * self.softcap", "uncapped"
    ),
    Mutant("temperatures of other rows", HEAD + "test_a_temp", "temperature[index] if", "temperature[: len(index)] if"),
    Mutant(
        "padding has probability",
        HEAD + "test_a_padded",
        "min(max(self.vocab - first, 0), len(weight))",
        "len(weight)",
    ),
    Mutant("products of any number of rows", HEAD_BITS, "ROW_MULTIPLE = 32", "ROW_MULTIPLE = 1"),
    Mutant("metrics over live tokens", HEAD_OPTIONS, "counts.sum().clamp(min=1)", "max(len(index), 1)"),
    Mutant(
        "labels not checked",
        HEAD + "test_bad",
        "reference.check_labels(head.op, labels, head.vocab, mask)\n        reference.check_cumulative",
        "reference.check_cumulative",
    ),
]

SEGMENTS = [
    Mutant(
        "steps inside characters",
        STEPS + "test_no_step_begins",
        "return character_length(byte) > back;",
        "return false;",
    ),
    Mutant("overlong characters", STEPS + "test_what_begins_no", "lead >= 0xC2", "lead >= 0xC0"),
    Mutant("returns between line ends", ORACLE, "if (after_return) found = 0;", ""),
    Mutant("steps without limit", SAME_STEPS, "if (num_steps_ == max_steps_) return;", ""),
]

PARSER = [
    Mutant(
        "the form of the answer is an answer",
        CRITIQUE + "test_a_judge_that_quotes",
        "if content == _PLACEHOLDER else content",
        "if False else content",
    ),
    Mutant(
        "reasoning before the answer is read",
        CRITIQUE + "test_reasoning",
        "            kept.clear()\n",
        "            pass\n",
    ),
    Mutant(
        "steps in another prompt's tags",
        CRITIQUE + "test_step_tags_in",
        "match[2] not in (None, suffix) or",
        "False or",
    ),
    Mutant(
        "a forged verdict undoes a list",
        CRITIQUE + "test_two_verdicts",
        'and (block is None or trust == "verdict")',
        "",
    ),
    Mutant(
        "flags before the first step", CRITIQUE + "test_vote_table", "if not 0 <= index < steps:", "if index >= steps:"
    ),
    Mutant("agreement of one vote with itself", CRITIQUE + "test_agreement", "(valid >= 2)", "(valid >= 1)"),
]

STEP_RULES = [
    Mutant("padded ids are text", STEPS + "test_padded", "        self.special[known:] = True\n", ""),
    Mutant(
        "ids without a token are text",
        STEPS + "test_ids_that_no_token",
        "special_ids.update(id_ for id_ in range(size) if id_ not in by_id)",
        "pass",
    ),
    Mutant("steps without text after them", ORACLE, "has_content_before and has_content_after", "has_content_before"),
    Mutant("code is cut", STEPS + "test_fences_are", "if start >= reach:", "if True:"),
    Mutant(
        "fences close before they end",
        STEPS + "test_fences_are",
        "reach = max(reach, ends[place][1])",
        "reach = ends[place][1]",
    ),
]

TABLES = [
    Mutant(
        "responses flow together", SHAPE + "test_all_layouts", "begins[inner[inner < len(positions)]] = True", "pass"
    ),
    Mutant(
        "missing votes are clear",
        SHAPE + "test_votes_that_are_missing",
        "[-1] * (width - len(ballots))",
        "[0] * (width - len(ballots))",
    ),
    Mutant("steps that run backwards", BAD_SHAPE, "(pairs[:, 1] < pairs[:, 0]) |", ""),
]

SCORES = [
    Mutant("scattered groups are torn", SCORE + "test_small_chunks", "if response.group < first_open:", "if False:"),
    Mutant("refused twice", SCORE + "test_rows_refused_before", "            index.reset()\n", ""),
    Mutant(
        "responses without steps lack critiques",
        SCORE + "test_a_response_without_steps",
        "[votes.silent] > 0)",
        "[votes.silent] >= 0)",
    ),
]

SETTINGS = [
    Mutant(
        "anchors are read",
        CONFIG + "test_what_is_no_plain",
        "isinstance(event, AliasEvent) or event.anchor is not None",
        "False",
    ),
    Mutant(
        "secrets are saved",
        CONFIG + "test_secrets",
        "if _SECRET.search(key):\n        raise",
        "if False:\n        raise",
    ),
    Mutant(
        "groups of one",
        CONFIG + "test_where_ranges_end",
        "group_size: int = Field(default=8, ge=2",
        "group_size: int = Field(default=8, ge=1",
    ),
]

SAVES = [
    Mutant("links are followed", DAMAGE, "path.is_symlink() or ", ""),
    Mutant("names lead out of the folder", DAMAGE, "if not plain or", "if"),
    Mutant(
        "moments of another run stay", CHECKPOINT + "test_before_the_first", "        optimizer.state.clear()\n", ""
    ),
    Mutant(
        "a name before its contents",
        SPOILED_SAVES,
        "        for path in [*temporary.iterdir(), temporary]:\n            _sync(path)\n",
        "",
    ),
    Mutant(
        "deleted under its name",
        CHECKPOINT + "test_a_checkpoint_that_is_deleted",
        "os.replace(checkpoint_path(folder, update), doomed)",
        "shutil.rmtree(checkpoint_path(folder, update))",
    ),
]

UPDATES = [
    Mutant("updates of NaN", TRAIN + "test_bad_updates", "        if not finite:\n            break\n", ""),
    Mutant("gradients of any size", TRAIN + "test_gradients_are_scaled", "config.max_grad_norm)", "1e9)"),
    Mutant(
        "responses with an entropy term left out",
        TRAIN + "test_gradient_is_that",
        "rule.kl_coef == 0 and rule.entropy_coef == 0:",
        "rule.kl_coef == 0:",
    ),
]

# Of the Triton kernels, which run under its interpreter.
TRITON = "test_triton_linear.py::"
COUNTS, PARTS = TRITON + "test_products_of_the_first_rows_only", "test_triton.py::test_parts_of_rows"
CLIPPED, BROKEN = TRITON + "test_rows_that_are_clipped", TRITON + "test_stats_of_parts"
FEW = TRITON + "test_any_number and few"
DEVICE_ROWS = [
    Mutant("moves by one", TRITON + "test_moves", "found[vacant.cumsum(0)]", "found[vacant.cumsum(0) - 1]"),
    Mutant("moves into rows that stay", TRITON + "test_moves", "inside & ~kept, ~inside", "inside, ~inside"),
    Mutant("dead rows first", FEW, "(~live).byte().sort", "live.byte().sort"),
    Mutant(
        "dead rows have labels",
        TRITON + "test_dead_rows",
        "self.inside, self.labels, ABSENT",
        "self.inside, self.labels, 0",
    ),
    Mutant(
        "metrics of rows that are not there", FEW, "return self.there(values).sum()", "return values.sum() + self.size"
    ),
    Mutant(
        "unchecked labels have no probability", TRITON + "test_an_unchecked", "(labels < 0) | (", "labels.isnan() | ("
    ),
    Mutant(
        "lengths do not matter", TRITON + "test_unchecked_lengths", "(cu_seqlens[0] != 0) |", "(cu_seqlens[0] < 0) &"
    ),
    Mutant("a wrong number does not matter", TRITON + "test_a_wrong_number_that", "wrong | rows.wrong", "wrong"),
    Mutant(
        "fewer live rows are wrong", TRITON + "test_a_given_number", "num_live < int(number)", "num_live != int(number)"
    ),
    Mutant(
        "fewer live rows are wrong where nobody checks",
        TRITON + "test_a_wrong_number_that",
        "number > num_live",
        "number != num_live",
    ),
    Mutant(
        "hidden states of dead rows are read",
        TRITON + "test_a_given_number",
        "masked_fill_(~inside",
        "masked_fill_(inside",
    ),
    Mutant("dead rows have values", TRITON + "test_a_given_number", "torch.where(self.inside, values, 0)", "values"),
]
PRODUCTS_OF_ROWS = [
    Mutant(
        "the number counts from the first row of all", COUNTS, "tl.load(count_ptr) - first, 0", "tl.load(count_ptr), 0"
    ),
    Mutant("the row after the last", COUNTS, "inside = i < number\n", "inside = i <= number\n"),
    Mutant("sums go one row too far", COUNTS, "blocks(left_ptr, number,", "blocks(left_ptr, number + 1,"),
    Mutant(
        "sums of columns go one row too far", COUNTS, "(start + k < number)[:, None]", "(start + k <= number)[:, None]"
    ),
    Mutant("no targets", COUNTS, "target = tl.load(targets_ptr + i, mask=inside, other=0)", "target = i.to(tl.int64)"),
    Mutant("no bias", COUNTS, "if bias_ptr is not None:", "if bias_ptr is None and False:"),
    Mutant("only the first of the depth", COUNTS, "rows_blocks.load([top, start])", "rows_blocks.load([top, 0])"),
    Mutant("a tile a program", COUNTS, "tl.num_programs(0), flatten=True", "1 << 20, flatten=True"),
    Mutant("a tile of a sum a program", COUNTS, "tiles, tl.num_programs(0)):", "tiles, 1 << 20):"),
    Mutant(
        "rows at odd places are not copied", TRITON + "test_a_matrix_is_copied", "matrix.stride(0) % width == 0", "True"
    ),
    Mutant(
        "the last product only",
        TRITON + "test_any_number and all",
        "sum_ = tl.load(total, mask=inside, other=0.0).to(tl.float32)",
        "sum_ += 0.0",
    ),
    Mutant("the first product adds to nothing", COUNTS, "if WRITTEN:  #", "if True:  #"),
    Mutant("without rows nothing is written", COUNTS, "    if WRITTEN:\n        tiles", "    if True:\n        tiles"),
    Mutant("the last sum of columns only", COUNTS, "total + tl.sum(sum_, 0)", "tl.sum(sum_, 0)"),
]
LINEAR_ROWS = [
    Mutant(
        "rows that are not there are read", TRITON + "test_rows_that_are_not", "if label == ABSENT:", "if label == -3:"
    ),
    Mutant(
        "gradients stay where they are",
        CLIPPED,
        "tl.multiple_of(target * out_stride",
        "tl.multiple_of(source * out_stride",
    ),
    Mutant("slopes of other rows", CLIPPED, "tl.load(slopes_ptr + source)", "tl.load(slopes_ptr + target)"),
    Mutant("NaN of a part is nothing", BROKEN, 'top += float("nan")', "top += 0.0"),
    Mutant("parts without sums are empty", BROKEN, 'sum_ += float("nan")', "sum_ += 0.0"),
    Mutant("another's label is the first", BROKEN, 'tl.where(own, at_label, -float("inf"))', "at_label"),
    Mutant("one temperature for all", BROKEN, "tl.load(temperature_ptr + index)", "tl.load(temperature_ptr)"),
    Mutant("softcap without sign", TRITON + "test_a_softcap", "tl.where(x < 0.0, cap, -cap)", "-cap"),
    Mutant(
        "slope of a softcap of other rows",
        TRITON + "test_a_softcap",
        "            source = tl.load(rows_ptr + target)",
        "            source = target",
    ),
    Mutant(
        "a response counts one more",
        FEW.replace("few", "sequence"),
        "*terms, cu_seqlens.diff(), cu",
        "*terms, cu_seqlens.diff() + 1, cu",
    ),
]
TRITON_ROWS = [
    Mutant(
        "the first guess of the top is final",
        REGIMES,
        "if beyond != 0:\n        top = largest",
        "if beyond < 0:\n        top = largest",
    ),
    Mutant("no label", OPTIONS, "if (label >= first) & (label < last):", "if label < first:"),
    Mutant("the rest of the row has no gradient", OPTIONS, "alpha = (-s * g / sum_)", "alpha = (0.0 * g / sum_)"),
    Mutant("entropy not centred", OPTIONS, "s * (h * mean - g) / sum_", "s * -g / sum_"),
    Mutant("entropy without its slope", OPTIONS, "beta = (-s * h * LN2 / sum_)", "beta = (0.0 * h)"),
    Mutant("NaN is filled with 0", NAN, 'tl.where(broken, float("nan"), 0.0)', "0.0"),
    Mutant("half of the neighbours", SIZES, "return a + b", "return a"),
    Mutant("sums that do not fit are taken", REGIMES, "beyond | tl.where(fits, 0, 1)", "beyond"),
]
TRITON_STATS = [
    Mutant(
        "parts overlap", PARTS, "first = (tl.program_id(0) % splits) * chunks * (BLOCK * UNROLL)", "first = 0 * splits"
    ),
    Mutant("parts twice", PARTS, "3 * (index * splits + part)", "3 * (index * splits + part // 2)"),
]
TRITON_LOSS = [
    Mutant("dead rows keep what was there", INPLACE, "fill(out, 0, vocab, 0.0, BLOCK)", "pass"),
    Mutant("no mean over responses", OPTIONS, "(total.to(tl.float32) * responses)", "total.to(tl.float32)"),
    Mutant(
        "masked tokens weigh",
        OPTIONS,
        "            live = live & (tl.load(mask_ptr",
        "            live = live | (tl.load(mask_ptr",
    ),
    Mutant(
        "ratios of responses not averaged",
        OPTIONS,
        "(tl.sum(total, 0) / count).to(tl.float32)",
        "tl.sum(total, 0).to(tl.float32)",
    ),
]
TRITON_TOKENS = [
    Mutant("clip on the edge", EDGE, "clipped = bounded * advantage < ratio", "clipped = bounded * advantage <= ratio"),
    Mutant("gradient of clipped tokens", OPTIONS, "held = clipped | (tl.abs", "held = (tl.abs"),
    Mutant("dual clip of good tokens", LOSS + "test_the_dual", "dual = (advantage < 0.0) & (", "dual = ("),
    Mutant("kl without its slope", OPTIONS, "through_logp += kl_coef * slope", "through_logp += 0.0 * slope"),
    Mutant("importance without cap", OPTIONS, "tl.where(weight > importance_cap, importance_cap, weight)", "weight"),
]
# Logits of some tokens only.
SOME_ROWS, UNFIT_ROWS = LOSS + "test_rows_of_live", LOSS + "test_rows_that_do_not_fit"
ROWS_OF_TOKENS = [
    Mutant(
        "tokens without a row stay live",
        LOSS + "test_a_token_without_a_row",
        "    if (args.rows < args.tokens) leave_out_tokens();",
        "",
    ),
    Mutant("label of another token", SOME_ROWS, "args.vocab, args.labels[token]", "args.vocab, args.labels[row]"),
    Mutant("rows may fall", UNFIT_ROWS, "places[i] <= (i == 0 ? -1 : places[i - 1])", "places[i] < 0"),
]
ROWS_OF_RULES = [
    Mutant(
        "rows with a ratio of responses", UNFIT_ROWS, "    _check_compact(op, rule)\n    return rows", "    return rows"
    ),
    Mutant("live without regard to the mask", SOME_ROWS, "live if mask is None else live & mask", "live"),
]
TRITON_ROWS_OF_TOKENS = [
    Mutant("row of another token", SOME_ROWS, "index = tl.load(token_of_ptr + place)", "index = place"),
]

# Of the CUDA kernels, which run in the emulator.
CUDA = "test_cuda.py::"
ODD, STATS = CUDA + "test_an_odd_address", CUDA + "test_stats_of_rows"
BLOCKS, FORMS = CUDA + "test_the_number_of_blocks", CUDA + "test_all_forms"
LARGE_GROUPS = CUDA + "test_groups_larger_than"
CUDA_ROWS = [
    Mutant(
        "offsets of 32 bits",
        CUDA + "test_offsets",
        "base) + row * stride * Format<kType>::kSize;\n}\ntemplate <Dtype kType>\nCAPO_DEVICE char*",
        "base) + static_cast<int>(row * stride) * Format<kType>::kSize;\n}\ntemplate <Dtype kType>\nCAPO_DEVICE char*",
    ),
    Mutant(
        "offsets of 32 bits where the gradient is written",
        CUDA + "test_offsets",
        "static_cast<char*>(base) + row * stride *",
        "static_cast<char*>(base) + static_cast<int>(row * stride) *",
    ),
    Mutant("one column beyond the row is read", ODD, "return i < count ?", "return i <= count ?"),
    Mutant(
        "a tile beyond the row is whole",
        ODD,
        "column(tile + 1, 0, 0) - shift <= vocab;",
        "column(tile + 1, 0, 0) - shift <= vocab + 1;",
    ),
    Mutant("a tile before the row is whole", ODD, "return column(tile, 0, 0) >= shift && ", "return "),
    Mutant("a shift by other words", ODD, "return to_columns<1>(", "return to_columns<2>("),
    Mutant("no shift by half a word", ODD, "x[kFrom + i + 1], bits)", "x[kFrom + i + 1], 0 * bits)"),
    Mutant("the last lane goes on in the same vector", ODD, "lane == 0 ? below : x[i]", "(void(below), x[i])"),
    Mutant("nothing after the last vector", ODD, "lane < shift && end < vocab ? F::load_bits(row, end) : ", ""),
    Mutant(
        "the maximum of half a warp",
        STATS,
        "// drops NaN\n#pragma unroll\n    for (int mask = kLanes / 2",
        "// drops NaN\n#pragma unroll\n    for (int mask = kLanes / 4",
    ),
    Mutant(
        "the sum of half a warp",
        STATS,
        "for (int mask = kLanes / 2; mask > 0; mask /= 2) {\n      total",
        "for (int mask = kLanes / 4; mask > 0; mask /= 2) {\n      total",
    ),
    Mutant("half of the neighbours", STATS, "int distance = kCount / 2", "int distance = kCount / 4"),
    Mutant("a tile of -inf has no exponents", STATS, "top = x == -infinity() ? 0.f : x;", "top = x;"),
    Mutant(
        "32 tiles of a row",
        CUDA + "test_rows_of_more_tiles",
        "for (int64_t i = lane; i < count; i += kLanes) {",
        "for (int64_t i = lane; i < count && i < kLanes; i += kLanes) {",
    ),
    Mutant(
        "a label beyond the row",
        CUDA + "test_a_label_beyond",
        "place < F::kWidth && how.label < vocab",
        "place < F::kWidth",
    ),
    Mutant(
        "the label's entry by another lane",
        FORMS,
        "(place / F::kWidth % kLanes) == lane",
        "(place / F::kWidth % kLanes) == (lane ^ 1)",
    ),
    Mutant(
        "columns behind the last tile have no gradient",
        ODD,
        "F::kVectors + (tile + 1 == tiles_of(vocab)); ++k) {",
        "F::kVectors; ++k) {",
    ),
    Mutant(
        "columns behind the last tile are not zeroed",
        ODD,
        "F::kVectors + (tile + 1 == tiles_of(vocab)); ++k)\n",
        "F::kVectors; ++k)\n",
    ),
    Mutant(
        "columns before the row are written",
        ODD,
        "if (first + i >= 0 && first + i < vocab) F::store",
        "if (first + i < vocab) F::store",
    ),
    Mutant(
        "logits at other addresses than the gradient",
        ODD,
        "return Format<kType>::shift_of(logits) == shift && ",
        "return (void(logits), true) && ",
    ),
]
CUDA_STEPS = [
    Mutant("dead rows are read", CUDA + "test_dead_rows", "return live.weights[row] != 0.0;", "return true;"),
    Mutant(
        "the first tile of a block has no gradient",
        FORMS,
        "last - 1 - warp; tile >= first;",
        "last - 1 - warp; tile > first;",
    ),
    Mutant(
        "another row's factors",
        FORMS,
        "  device::sync_block();\n  const GradFactors how = *shared;",
        "  const GradFactors how = *shared;",
    ),
]
CUDA_LOSS = [
    Mutant(
        "the last block of a cluster hears nothing",
        BLOCKS,
        "if (lane < a.cluster && lane != rank)",
        "if (lane < a.cluster - 1 && lane != rank)",
    ),
    Mutant(
        "a cluster does not meet",
        BLOCKS,
        "    device::arrive_at_cluster();\n    device::wait_for_cluster();\n  } else",
        "  } else",
    ),
    Mutant(
        "a cluster does not meet before it writes to others",
        BLOCKS,
        "    device::sync_warp();\n    device::wait_for_cluster();\n",
        "    device::sync_warp();\n",
    ),
    Mutant(
        "a block does not wait for its factors",
        BLOCKS,
        "  device::sync_block();\n  const GradFactors& factors",
        "  const GradFactors& factors",
    ),
    Mutant(
        "dead rows keep what was there",
        ODD,
        "    if (l.grad != nullptr)\n      write_zeros",
        "    if (l.grad == nullptr)\n      write_zeros",
    ),
    Mutant(
        "a tile of two blocks", BLOCKS, "last = end < tiles ? end : tiles;", "last = end + 1 < tiles ? end + 1 : tiles;"
    ),
    Mutant(
        "another tile from the chip",
        BLOCKS,
        "z.get(kept + (tile - rank * a.tiles_of_block) * kBytes",
        "z.get(kept + (tile + 0 * rank - first) / kRowWarps * kBytes",
    ),
    Mutant("lengths do not matter", CUDA + "test_unchecked_lengths", "fits &= a.cu_seqlens[0] == 0 && ", "fits &= "),
    Mutant(
        "a group of a response is a warp",
        CUDA + "test_responses_of_more_tokens",
        "for (int i = 0; i < kWarps; ++i) {\n      seen.count +=",
        "for (int i = 0; i < 1; ++i) {\n      seen.count +=",
    ),
]
CUDA_CREDIT = [
    Mutant(
        "earlier members only among the last ids",
        CUDA + "test_members_of_a_group",
        "for (int64_t end = leader; end > 0;",
        "for (int64_t end = leader; end > leader - kChunk;",
    ),
    Mutant(
        "all responses lead",
        CREDIT + "test_every_rule",
        "if (device::any_of_block(found)) return false;",
        "if (device::any_of_block(found)) return true;",
    ),
    Mutant("members over members", LARGE_GROUPS, "      place += device::count_bits(found[k]);\n", ""),
    Mutant("members of earlier warps are forgotten", LARGE_GROUPS, "if (i < warp) place += memory.counts[i];", ""),
    Mutant(
        "32 steps but the last",
        CUDA + "test_steps_and_votes",
        "k < kLanes && s + k < r.last_step;",
        "k < kLanes - 1 && s + k < r.last_step;",
    ),
    Mutant(
        "population std", CREDIT + "test_every_rule", "sqrt(m.squares / (m.count - 1.0))", "sqrt(m.squares / m.count)"
    ),
    Mutant(
        "squares around nought",
        CREDIT + "test_statistics_do_not_cancel",
        "squares += often * (value - mean) * (value - mean)",
        "squares += often * (value * value - mean * mean)",
    ),
    Mutant(
        "constant only if exactly equal",
        CREDIT + "test_rewards_that_differ_by",
        "if (constant_but_rounding(low, high)) return;",
        "if (low == high) return;",
    ),
    Mutant(
        "one of two blocks writes",
        LARGE_GROUPS,
        "each_member(part, kParts, [&](int64_t i) { write",
        "each_member(0, kParts, [&](int64_t i) { write",
    ),
    Mutant(
        "a token less than a vector",
        CREDIT + "test_every_rule",
        "if (lane < last - whole) out[whole + lane] = value;",
        "",
    ),
    Mutant(
        "the sum of one warp",
        LARGE_GROUPS,
        "for (int i = 1; i < kWarps; ++i) x = combine",
        "for (int i = 1; i < 1; ++i) x = combine",
    ),
]

FILES = {
    "csrc/common/policy_loss.h": TOKEN_LOSS,
    "csrc/common/rows.h": ROW_FORMULAS,
    "csrc/cpu/policy_loss.cpp": ROW_LOSS + ROWS_OF_TOKENS,
    "csrc/cpu/simd/rows.cpp": ROWS,
    "csrc/cpu/simd/vec.h": VECTORS,
    "csrc/common/credit.h": FORMULAS,
    "csrc/cpu/credit.cpp": ADVANTAGES,
    "capo/native.py": CALLS,
    "capo/ops.py": OPS + ROWS_OF_RULES,
    "csrc/text/segment.cpp": SEGMENTS,
    "capo/steps.py": STEP_RULES,
    "capo/critique.py": PARSER,
    "capo/shaping.py": TABLES,
    "capo/score.py": SCORES,
    "capo/config.py": SETTINGS,
    "capo/checkpoint.py": SAVES,
    "capo/learn.py": UPDATES,
    "capo/linear.py": LINEAR + DEVICE_ROWS,
    "capo/kernels/product.py": PRODUCTS_OF_ROWS,
    "capo/kernels/linear.py": LINEAR_ROWS,
    "capo/kernels/rows.py": TRITON_ROWS,
    "capo/kernels/stats.py": TRITON_STATS,
    "capo/kernels/policy_loss.py": TRITON_LOSS + TRITON_ROWS_OF_TOKENS,
    "capo/kernels/tokens.py": TRITON_TOKENS,
    "csrc/cuda/rows.cuh": CUDA_ROWS,
    "csrc/cuda/rows.cu": CUDA_STEPS,
    "csrc/cuda/policy_loss.cu": CUDA_LOSS,
    "csrc/cuda/credit.cu": CUDA_CREDIT,
}

MUTANTS = {f"{Path(file).name}: {mutant.name}": (file, mutant) for file, mutants in FILES.items() for mutant in mutants}


def backend_of(file: str, mutant: Mutant) -> str:
    """The backend whose tests have to notice a mutant."""
    if file.startswith("csrc/cuda/"):
        return "emulated"
    return "triton" if "kernels" in file or mutant.tests.startswith(TRITON) else "native"


def run_of(file: str, mutant: Mutant) -> str:
    """The file of the tests of a mutant, and the backend that they run."""
    return f"{mutant.tests.split('::')[0]} {backend_of(file, mutant)}"


# Object files of the native module, and which of them a header goes into that is not compiled by itself.
SOURCES = ["bindings.cpp", "cpu/credit.cpp", "cpu/dispatch.cpp", "cpu/policy_loss.cpp", "cpu/simd/rows.cpp"]
INCLUDED_BY = {
    "common/policy_loss.h": "cpu/policy_loss.cpp",
    "common/rows.h": "cpu/policy_loss.cpp",
    "common/credit.h": "cpu/credit.cpp",
    "cpu/simd/vec.h": "cpu/simd/rows.cpp",
}
# The same of the CUDA kernels.
CUDA_SOURCES = {"cuda/rows.cuh": ["rows.cu", "policy_loss.cu"]}


def fused() -> list[str]:
    """Flags for a fused multiply-add, where the machine has it: some faults lie on that path alone."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return ["-march=x86-64-v3"] if {"avx2", "fma", "bmi2"} <= set(flags) else []


FAST = ("-O1",)  # flags of the emulated kernels
WORKERS = min(2, os.cpu_count() or 1)
SECONDS = 240  # for one run of the tests

# Imports what takes long, then runs pytest in a fork of itself for every line of its input: the folder of the package,
# the file for the output, the limit in seconds and the arguments. Exit status 70: not that package was in use.
RUN = """
import json, os, pathlib, signal, sys
import pytest, torch

def run(package, arguments):
    sys.path.insert(0, package)
    try:
        import capo._native
    except ImportError as error:
        print(error)
        return 70
    if not all(module.__file__.startswith(package) for module in (capo, capo._native)):
        return 70
    sys.path.insert(0, "tests")
    import emulated
    kernels = [emulated.load(file) for file in pathlib.Path(package).glob(f"cuda_emulated{emulated.SUFFIX}")]
    if kernels:
        emulated.module = lambda: kernels[0]
    return int(pytest.main(arguments))

for line in sys.stdin:
    package, output, seconds, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1), os.dup2(file, 2)
        status = run(package, arguments)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def compiler() -> str:
    """The C++ compiler; skips the tests where something is missing to build with."""
    if not hasattr(os, "fork"):
        pytest.skip("mutants run in forks, which this system does not have")
    found = next(filter(shutil.which, os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]), None)
    if found is None:
        pytest.skip("no C++ compiler to build mutants with: install g++ or clang++, or set CXX")
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("no pybind11 to build mutants with: pip install pybind11")
    return found


def execute(command: list) -> None:
    """Run a command; its messages become the error if it fails."""
    done = subprocess.run([*map(str, command)], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command} gave {done.returncode}:\n{done.stderr[-4000:]}")


class Factory:
    """Builds packages in ``folder``: a copy of ``capo`` each, with the module of its own sources."""

    def __init__(self, folder: Path, cxx: str):
        import pybind11

        self.folder, self.cxx = folder, cxx
        self.includes = [pybind11.get_include(), sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
        self.module = "_native" + sysconfig.get_config_var("EXT_SUFFIX")
        self.sources = [*SOURCES, *(f"text/{path.name}" for path in (ROOT / "csrc/text").glob("*.cpp"))]
        # What PyTorch compiled without the fault would be taken from its cache.
        env = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        self.runners: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        for _ in range(WORKERS):
            self.runners.put(
                subprocess.Popen(
                    [sys.executable, "-c", RUN],
                    cwd=ROOT,
                    env=env,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        self.pool = ThreadPoolExecutor(WORKERS)
        objects = self.pool.map(lambda source: self.compile(ROOT / "csrc", source, folder), self.sources)
        self.objects = dict(zip(self.sources, objects, strict=True))
        self.clean = self.package("clean")
        self.link(self.objects, self.clean)
        files = emulated.sources(ROOT) if emulated.compiler() is not None else []
        self.cuda_objects = dict(
            zip([file.name for file in files], emulated.compile_all(ROOT, files, folder / "cuda", FAST), strict=True)
        )
        if files:
            emulated.link(list(self.cuda_objects.values()), self.clean, FAST)

    def compile(self, csrc: Path, source: str, folder: Path) -> Path:
        """The object file of a source, for the plainest instruction set only."""
        output = folder / source.replace("/", "_").replace(".cpp", ".o")
        flags = ["-std=c++20", "-O1", "-w", "-fPIC", "-fvisibility=hidden", "-DCAPO_ISA=baseline"]
        row_flags = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", *fused()]
        flags += row_flags if "simd" in source else ["-ffp-contract=off"]
        includes = [f"-I{path}" for path in (csrc, *self.includes)]
        execute([self.cxx, *flags, *includes, "-c", csrc / source, "-o", output])
        return output

    def link(self, objects: dict[str, Path], package: Path) -> None:
        """Make the native module of a package."""
        target = package / "capo" / self.module
        execute([self.cxx, "-shared", "-pthread", *objects.values(), "-o", target])

    def package(self, name: str) -> Path:
        """A copy of the Python files, laid out as they are installed."""
        folder = self.folder / name
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
        shutil.copytree(ROOT / "capo", folder / "capo", ignore=ignore)
        shutil.copytree(ROOT / "kernels", folder / "capo/kernels", ignore=ignore)
        return folder

    def mutate(self, number: int, file: str, mutant: Mutant) -> Path:
        """The package with one fault in it."""
        package = self.package(f"mutant{number}")
        if file.startswith("csrc/"):
            shutil.copytree(ROOT / "csrc", package / "csrc")
        text = (package / file).read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1, f"{file} has {mutant.old!r} {text.count(mutant.old)} times instead of once"
        (package / file).write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        if file.startswith("csrc/cuda/"):
            source = file.removeprefix("csrc/")
            names = CUDA_SOURCES.get(source, [Path(source).name])
            files = [package / "csrc/cuda" / name for name in names]
            objects = emulated.compile_all(package, files, package, FAST)
            emulated.link(list((self.cuda_objects | dict(zip(names, objects, strict=True))).values()), package, FAST)
            shutil.copy(self.clean / "capo" / self.module, package / "capo")
        elif file.startswith("csrc/"):
            source = file.removeprefix("csrc/")
            source = INCLUDED_BY.get(source, source)
            self.link({**self.objects, source: self.compile(package / "csrc", source, package)}, package)
        else:
            shutil.copy(self.clean / "capo" / self.module, package / "capo")
        return package

    def run(self, package: Path, file: str, names: str, backend: str) -> tuple[int, str]:
        """Exit status and output of the tests in a file whose names fit, with this backend on the CPU."""
        if backend == "emulated" and emulated.compiler() is None:
            pytest.skip("no g++ for the emulator")
        if backend == "triton" and importlib.util.find_spec("triton") is None:
            pytest.skip("no triton")
        # What has no device in its name runs, too; test_triton*.py and test_cuda.py know one backend only.
        others = {
            "native": "not cpu-torch and not cpu-triton and not emulated and not cuda",
            "triton": "cpu-triton",
            "emulated": "cpu-emulated",
        }
        if not file.startswith(("test_triton", "test_cuda")):
            names = f"({names}) and {others[backend]}" if names else others[backend]
        arguments = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore", "-k", names, f"tests/{file}"]
        output = package / "output.txt"
        runner = self.runners.get()
        try:
            print(json.dumps([str(package), str(output), SECONDS, *arguments]), file=runner.stdin, flush=True)
            status = int(runner.stdout.readline())
        finally:
            self.runners.put(runner)
        return status, output.read_text(encoding="utf-8", errors="replace")[-4000:]

    def close(self) -> None:
        """End the workers and the processes of the tests."""
        self.pool.shutdown(cancel_futures=True)
        while not self.runners.empty():
            runner = self.runners.get()
            runner.stdin.close()  # ends it
            runner.wait()
            runner.stdout.close()

    def try_out(self, number: int, file: str, mutant: Mutant) -> tuple[int, str]:
        """Exit status and output of the tests of a mutant."""
        package = self.mutate(number, file, mutant)
        result = self.run(package, *mutant.tests.split("::"), backend_of(file, mutant))
        shutil.rmtree(package)
        return result


@pytest.fixture(scope="module")
def factory(tmp_path_factory):
    factory = Factory(tmp_path_factory.mktemp("mutants"), compiler())
    yield factory
    factory.close()


@pytest.fixture(scope="module")
def results(factory, request):
    """What becomes of each mutant that was asked for; they are tried in the background, all at once."""
    names = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    return {
        name: factory.pool.submit(factory.try_out, number, *MUTANTS[name])
        for number, name in enumerate(n for n in names if n in MUTANTS)
    }


@pytest.mark.parametrize("name", MUTANTS)
def test_the_tests_notice(name, results, record_property):
    status, output = results[name].result()
    assert status != 0, f"{MUTANTS[name]} survives:\n{output}"
    assert status == 1 or (status < 0 and status != -signal.SIGALRM), f"the tests did not run ({status}):\n{output}"
    if status < 0:
        record_property("signal", -status)
        print(f"killed by signal {-status}")


@pytest.mark.parametrize("name", sorted({run_of(*mutant) for mutant in MUTANTS.values()}))
def test_the_same_tests_pass_without_a_fault(name, factory):
    names = {mutant.tests.split("::")[1] for file, mutant in MUTANTS.values() if run_of(file, mutant) == name}
    file, backend = name.split()
    names = "" if "" in names else " or ".join(f"({each})" for each in sorted(names))
    status, output = factory.run(factory.clean, file, names, backend)
    assert status == 0, output
