"""What is timed: for each op its inputs (cases), the ways to compute it (variants), and their check against float64.

``run.py``, ``memory.py`` and ``test_speed.py`` measure the same functions. A variant is made from the inputs once, outside
the timing, and gives the function that is timed.
"""

from __future__ import annotations

import base64
import functools
import importlib.metadata
import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import capo
from capo.backends import use_backend, why_not
from capo.steps import _Delimiter, _segment_reference

FULL, FORWARD, LOGPROBS = "loss + gradient", "loss", "logprobs + entropy"
FLOOR, FRESH_FLOOR = "floor", "floor, fresh memory"


class Skip(Exception):
    """A variant that cannot run here; the message says why."""


@dataclass(frozen=True)
class Timed:
    """A function to be timed, and what is done before each call, outside the timing.

    Args:
        call: the function.
        reset: what is done before.
        halves: a forward, and a backward of what that returns, which are the call in two; None: it has no halves.
    """

    call: Callable[[], object]
    reset: Callable[[], object] = lambda: None
    halves: tuple[Callable, Callable] | None = None


@dataclass(frozen=True)
class Variant:
    """One way to compute an op.

    Args:
        name: what tables and plots call it.
        backend: native, torch, inductor, or the peer with its version.
        what: what is computed; only variants of the same ``what`` compare.
        make: inputs -> ``Timed``; raises Skip.
        rough: its arithmetic is of low precision, so the check allows more.
        note: goes into the CSV.
        rounds: at most so many; 1: slow, a single call when all else of the op has been timed, and none to warm up.
    """

    name: str
    backend: str
    what: str
    make: Callable[[SimpleNamespace], Timed]
    rough: bool = False
    note: str = ""
    rounds: int | None = None

    @property
    def is_slow(self) -> bool:
        return self.rounds == 1

    @property
    def is_floor(self) -> bool:
        return self.what in (FLOOR, FRESH_FLOOR)


@dataclass(frozen=True)
class Op:
    """An op with everything that is timed for it.

    Args:
        tests: test files that must pass before anything is timed.
        cases: quick -> inputs, each with the variants it is for (None: all).
        variants: all ways to compute the op.
        check: (variant, case) -> error of the value and of the gradient against float64; AssertionError if too large.
        threads: how many; None: what PyTorch takes.
    """

    tests: tuple[str, ...]
    cases: Callable[[bool], list[tuple[object, tuple[str, ...] | None]]]
    variants: tuple[Variant, ...]
    check: Callable[[Variant, object], tuple[float | None, float | None]]
    threads: int | None = None


def native() -> None:
    """Raise Skip if there is no native module."""
    if reason := why_not("native", "cpu"):
        raise Skip(reason)


# ---- policy_loss


@dataclass(frozen=True)
class PolicyLossCase:
    """Off-policy responses of equal length with per-token advantages; ``off``: by how much, in log-probability."""

    rows: int = 512
    vocab: int = 151_936
    dtype: torch.dtype = torch.bfloat16
    live: float = 1.0
    logits: str = "gaussian"
    length: int = 64
    off: float = 0.08

    @property
    def shape(self) -> str:
        return f"{self.rows} x {self.vocab}"

    @property
    def tokens(self) -> int:
        return self.rows

    def make(self) -> SimpleNamespace:
        g = torch.Generator().manual_seed(0)
        logits = torch.empty(self.rows, self.vocab, dtype=self.dtype)
        labels = torch.randint(0, self.vocab, (self.rows,), generator=g)
        logp = torch.empty(self.rows)
        for row in range(self.rows):
            z = 2 * torch.randn(self.vocab, generator=g)
            if self.logits == "peaked":  # the label has most of the probability, as in trained models
                z[labels[row]] = 16 + 4 * torch.randn((), generator=g)
            logits[row] = z
            logp[row] = logits[row].float().log_softmax(-1)[labels[row]]
        advantages = torch.randn(self.rows, generator=g)
        advantages[round(self.live * self.rows) :] = 0  # together, as whole groups die
        return SimpleNamespace(
            logits=logits,
            labels=labels,
            advantages=advantages,
            old_logprobs=logp + self.off * torch.randn(self.rows, generator=g),
            cu_seqlens=torch.arange(0, self.rows + 1, self.length),
            length=self.length,
        )


def clipped_loss(logp: Tensor, x: SimpleNamespace) -> Tensor:
    """The loss of the default rule from log-probabilities."""
    ratio = torch.exp(logp - x.old_logprobs)
    loss = -torch.min(ratio * x.advantages, ratio.clamp(0.8, 1.2) * x.advantages)
    return loss.view(-1, x.length).mean(1).mean()


def float32_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def row_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    rows = [row.log_softmax(-1).gather(-1, label) for row, label in zip(logits, labels[:, None], strict=True)]
    return torch.stack(rows)[:, 0]


def in_halves(forward: Callable[[], Tensor], *leaves: Tensor) -> Timed:
    """A loss and its gradients."""

    # autograd.grad hands over the gradients as a model's backward would get them: without a copy into .grad.
    def backward(value):
        return torch.autograd.grad(value, leaves)

    def call():
        value = forward()
        return value, *backward(value)

    return Timed(call, halves=(forward, backward))


def _with_gradient(loss: Callable[[Tensor], Tensor], x: SimpleNamespace) -> Timed:
    logits = x.logits.detach().requires_grad_()
    return in_halves(lambda: loss(logits), logits)


def _capo_loss(x: SimpleNamespace, logits: Tensor, **options) -> Tensor:
    return capo.policy_loss(logits, x.labels, x.advantages, x.old_logprobs, x.cu_seqlens, **options).loss


def _capo(x):
    native()
    return _with_gradient(lambda logits: _capo_loss(x, logits), x)


def _capo_inplace(x):
    native()
    buffer = torch.empty_like(x.logits)

    def call():
        logits = buffer.detach().requires_grad_()
        loss = _capo_loss(x, logits, inplace=True)
        return loss, *torch.autograd.grad(loss, logits)

    return Timed(call, lambda: buffer.copy_(x.logits))


def _loss_of_live_rows(x: SimpleNamespace) -> Timed:
    rows = capo.live_rows(x.advantages)
    logits = x.logits[rows].requires_grad_()  # as a head makes them of the hidden states of these tokens
    return in_halves(lambda: _capo_loss(x, logits, rows=rows), logits)


def _capo_live(x):
    native()
    return _loss_of_live_rows(x)


def _capo_forward(x):
    native()
    return Timed(lambda: (_capo_loss(x, x.logits),))


def _capo_logprobs(x):
    native()
    return Timed(lambda: capo.logprobs(x.logits, x.labels))


def _capo_torch(x):
    timed = _with_gradient(lambda logits: _capo_loss(x, logits), x)

    def call():
        with use_backend("torch"):
            return timed.call()

    return Timed(call)


def _eager(x):
    return _with_gradient(lambda logits: clipped_loss(float32_logprobs(logits, x.labels), x), x)


def _eager_live(x):
    live = x.advantages != 0

    def loss(logits):
        logp = x.old_logprobs.masked_scatter(live, float32_logprobs(logits[live], x.labels[live]))
        return clipped_loss(logp, x)

    return _with_gradient(loss, x)


def _eager_rows(x):
    return _with_gradient(lambda logits: clipped_loss(row_logprobs(logits, x.labels).float(), x), x)


def _eager_logprobs(x):
    def call():
        logp = x.logits.float().log_softmax(-1)
        return logp.gather(-1, x.labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    return Timed(torch.no_grad()(call))


def _compiled(x):
    length = x.length

    def loss(logits, labels, old_logprobs, advantages):
        rest = SimpleNamespace(old_logprobs=old_logprobs, advantages=advantages, length=length)
        return clipped_loss(float32_logprobs(logits, labels), rest)

    torch.compiler.reset()  # else the shapes of all cases together reach the recompile limit, and eager runs instead
    function = torch.compile(loss, dynamic=False)
    return _with_gradient(lambda logits: function(logits, x.labels, x.old_logprobs, x.advantages), x)


def _trl():
    try:
        from trl.trainer import utils
    except ImportError as error:
        raise Skip(f"trl cannot be imported: {error}") from error
    return utils


def _trl_loss(x):
    utils = _trl()

    def loss(logits):
        folded = logits.view(-1, x.length, logits.shape[1])
        logp = utils.selective_log_softmax(folded, x.labels.view(-1, x.length))
        return clipped_loss(logp.float().flatten(), x)

    return _with_gradient(loss, x)


def _trl_logprobs(x):
    utils = _trl()
    logits, labels = x.logits.view(-1, x.length, x.logits.shape[1]), x.labels.view(-1, x.length)

    def call():
        logp, entropy = utils.selective_log_softmax_and_entropy(logits, labels, entropy_requires_grad=False)
        return logp.flatten(), entropy.flatten()

    return Timed(torch.no_grad()(call))


def _liger(x):
    raise Skip(
        "no CPU path from logits: on CPU its GRPO loss takes hidden states, the lm_head weight and one advantage a response"
    )


def _copy_logits(x):
    target = torch.zeros_like(x.logits)
    return Timed(lambda: target.copy_(x.logits))


def _clone_logits(x):
    return Timed(x.logits.clone)


_ROUGH = "log-probabilities rounded to the dtype of the logits"
POLICY_LOSS_VARIANTS = (
    Variant("copy_", "torch", FLOOR, _copy_logits, note="the logits, into memory that is there"),
    Variant("clone", "torch", FRESH_FLOOR, _clone_logits, note="the logits, into fresh memory"),
    Variant("capo", "native", FULL, _capo, note="gradient in fresh memory"),
    Variant("capo, in place", "native", FULL, _capo_inplace, note="gradient over the logits"),
    Variant(
        "capo, live rows", "native", FULL, _capo_live, note="logits and gradient of the rows with an advantage alone"
    ),
    Variant("capo, torch backend", "torch", FULL, _capo_torch, note="the specification, not made for speed"),
    Variant("eager", "torch", FULL, _eager, note="log_softmax in float32, autograd"),
    Variant("eager, live rows", "torch", FULL, _eager_live, note="the same on the rows with an advantage"),
    Variant("eager, row loop", "torch", FULL, _eager_rows, rough=True, note=f"row by row; {_ROUGH}"),
    Variant("torch.compile", "inductor", FULL, _compiled, note="of eager; first_call_ms holds the compilation"),
    Variant("TRL", "trl", FULL, _trl_loss, rough=True, note=f"selective_log_softmax, eager loss; {_ROUGH}"),
    Variant("Liger", "liger-kernel", FULL, _liger),
    Variant("capo, no gradient", "native", FORWARD, _capo_forward),
    Variant("capo.logprobs", "native", LOGPROBS, _capo_logprobs),
    Variant("eager logprobs", "torch", LOGPROBS, _eager_logprobs, note="log_softmax in float32"),
    Variant("TRL logprobs", "trl", LOGPROBS, _trl_logprobs, rough=True, note=_ROUGH),
)


def policy_loss_cases(quick: bool) -> list:
    floors = ("copy_", "clone")
    main = PolicyLossCase(rows=64 if quick else 512)
    live = [
        (replace(main, live=f), (*floors, "capo", "capo, in place", "capo, live rows", "eager", "eager, live rows"))
        for f in (0.5, 0.25, 0.05)
    ]
    # The specification as a backend takes seconds at this size; it is timed once, below.
    everything = tuple(v.name for v in POLICY_LOSS_VARIANTS if v.name not in ("capo, torch backend", "capo, live rows"))
    if quick:
        return [(main, everything), live[1]]
    base = PolicyLossCase(rows=128)
    full = (*floors, "capo", "capo, in place", "eager", "eager, row loop", "torch.compile", "TRL")
    short = (*floors, "capo", "capo, in place", "capo.logprobs", "eager", "eager, row loop")
    return [
        (main, everything),
        *live,
        # As many logits in each, more than a last-level cache of 32 MiB holds.
        *((replace(base, vocab=v, rows=r), full) for v, r in ((32_000, 640), (128_256, 128), (262_144, 64))),
        (base, (*full, "capo, torch backend")),
        (replace(base, logits="peaked"), short),
        (replace(base, dtype=torch.float32), short),
        (replace(base, dtype=torch.float16), short),
    ]


def check_policy_loss(variant: Variant, case: PolicyLossCase) -> tuple[float | None, float | None]:
    """Errors on a smaller shape: of the loss relative to the size of the advantages, or of the log-probabilities and
    entropies, absolute; and of the gradient, relative L2."""
    x = replace(case, rows=256, vocab=4_099, off=0.3).make()
    timed = variant.make(x)
    timed.reset()
    result = [t.detach().double() for t in timed.call()]
    logits = x.logits.double().requires_grad_()
    logp = logits.log_softmax(-1)
    label_logp = logp.gather(-1, x.labels[:, None])[:, 0]
    if variant.what == LOGPROBS:
        truth = label_logp.detach(), -(logp.exp() * logp).sum(-1).detach()
        error = max(float((a - b).abs().max()) for a, b in zip(result, truth, strict=True))
        assert error < (0.5 if variant.rough else 1e-4), (
            f"{variant.name}: log-probabilities or entropies off by {error}"
        )
        return error, None
    double = SimpleNamespace(
        **{**vars(x), "old_logprobs": x.old_logprobs.double(), "advantages": x.advantages.double()}
    )
    truth = clipped_loss(label_logp, double)
    error = float((result[0] - truth.detach()).abs() / x.advantages.abs().mean())
    assert error < (0.05 if variant.rough else 1e-5), f"{variant.name}: loss off by {error}"
    if variant.what == FORWARD:
        return error, None
    (expected,) = torch.autograd.grad(truth, logits)
    if len(result[1]) != len(expected):
        expected = expected[x.advantages != 0]
    rounding = float((expected.to(case.dtype).double() - expected).norm() / expected.norm())
    gradient_error = float((result[1] - expected).norm() / expected.norm())
    limit = 0.2 if variant.rough else 2 * rounding + 2e-5
    assert gradient_error < limit, f"{variant.name}: gradient off by {gradient_error} (relative L2)"
    return error, gradient_error


# ---- credit


@dataclass(frozen=True)
class CreditCase:
    """Responses of equal length with steps that cover them, groups next to each other."""

    responses: int = 1_024
    length: int = 4_096
    steps: int = 32
    votes: int = 8
    group: int = 16
    dtype = torch.float32
    live = None
    logits = ""

    @property
    def shape(self) -> str:
        return f"{self.responses} x {self.length}, {self.steps} steps x {self.votes} votes, groups of {self.group}"

    @property
    def tokens(self) -> int:
        return self.responses * self.length

    def make(self) -> SimpleNamespace:
        g = torch.Generator().manual_seed(0)
        cuts = torch.stack(
            [torch.randperm(self.length - 1, generator=g)[: self.steps - 1] for _ in range(self.responses)]
        )
        cuts = (cuts.sort(1).values + 1) + self.length * torch.arange(self.responses)[:, None]
        first = self.length * torch.arange(self.responses)[:, None]
        credit = capo.Credit(
            torch.randint(0, 2, (self.responses,), generator=g).float(),
            torch.randint(-1, 2, (self.responses * self.steps, self.votes), generator=g, dtype=torch.int8),
            capo.Steps(
                torch.cat([first, cuts], 1).flatten(),
                torch.cat([cuts, first + self.length], 1).flatten(),
                torch.arange(0, self.responses * self.steps + 1, self.steps),
            ),
            torch.arange(0, self.tokens + 1, self.length),
            torch.arange(self.responses) // self.group,
        )
        return SimpleNamespace(credit=credit, length=self.length, group=self.group)


def _majority(credit: capo.Credit) -> Tensor:
    valid, flags = (credit.votes >= 0).sum(1), (credit.votes == 1).sum(1)
    return ((2 * flags >= valid) & (valid > 0)).float()


def _credit_native(x):
    native()
    return Timed(x.credit.advantages)


def _credit_torch(x):
    def call():
        with use_backend("torch"):
            return x.credit.advantages()

    return Timed(call)


def _credit_dense(x):
    """Padded tensors without a loop; right only for groups of one size that lie next to each other, without padding."""
    credit, rule = x.credit, x.credit.rule

    def call():
        weights = _majority(credit)
        change = torch.zeros(int(credit.cu_seqlens[-1]) + 1)
        change.index_add_(0, credit.steps.starts, weights).index_add_(0, credit.steps.ends, -weights)
        flagged = change[:-1].cumsum_(0).view(-1, x.length)
        rewards = rule.outcome_weight * credit.outcomes[:, None] - rule.process_weight * flagged
        grouped = rewards.view(-1, x.group * x.length)
        std, mean = torch.std_mean(grouped, 1, correction=0, keepdim=True)
        return ((grouped - mean) / std).flatten()

    return Timed(call)


def _credit_loop(x):
    """As trainers write it (verl's style): rewards [B, T], a loop over responses and steps, a loop over groups."""
    credit, rule = x.credit, x.credit.rule

    def call():
        weights = _majority(credit).tolist()
        starts, ends, cu_steps = (
            credit.steps.starts.tolist(),
            credit.steps.ends.tolist(),
            credit.steps.cu_steps.tolist(),
        )
        cu_seqlens, outcomes, groups = credit.cu_seqlens.tolist(), credit.outcomes.tolist(), credit.groups.tolist()
        lengths = [b - a for a, b in pairwise(cu_seqlens)]
        rewards = torch.zeros(len(outcomes), max(lengths))
        members = {}
        for i, outcome in enumerate(outcomes):
            rewards[i, : lengths[i]] = rule.outcome_weight * outcome
            for step in range(cu_steps[i], cu_steps[i + 1]):
                if weights[step]:
                    first = cu_seqlens[i]
                    rewards[i, starts[step] - first : ends[step] - first] -= rule.process_weight * weights[step]
            members.setdefault(groups[i], []).append(i)
        advantages = torch.zeros_like(rewards)
        for responses in members.values():
            tokens = torch.cat([rewards[i, : lengths[i]] for i in responses])
            mean, std = tokens.mean(), tokens.std(correction=0)
            for i in responses:
                advantages[i, : lengths[i]] = (rewards[i, : lengths[i]] - mean) / std
        return advantages.flatten()

    return Timed(call)


def _fill(x):
    target = torch.zeros(int(x.credit.cu_seqlens[-1]))
    return Timed(lambda: target.fill_(1.0))


def _fill_fresh(x):
    size = int(x.credit.cu_seqlens[-1])
    return Timed(lambda: torch.empty(size).fill_(1.0))


CREDIT_VARIANTS = (
    Variant("fill_", "torch", FLOOR, _fill, note="N floats, into memory that is there"),
    Variant("empty, fill_", "torch", FRESH_FLOOR, _fill_fresh, note="N floats, into fresh memory"),
    Variant("capo", "native", "advantages", _credit_native),
    Variant("capo, torch backend", "torch", "advantages", _credit_torch, note="the specification, not made for speed"),
    Variant(
        "eager, dense",
        "torch",
        "advantages",
        _credit_dense,
        note="no loop; needs equal groups next to each other, no padding",
    ),
    Variant("eager, loop", "torch", "advantages", _credit_loop, note="a loop over responses, steps and groups"),
)


def check_credit(variant: Variant, case: CreditCase) -> tuple[float | None, float | None]:
    """Largest error of an advantage, absolute."""
    x = replace(case, responses=2 * case.group, length=257, steps=min(case.steps, 32)).make()
    c = x.credit
    truth = capo.reference.token_advantages(
        c.outcomes, c.votes, c.steps.starts, c.steps.ends, c.steps.cu_steps, c.cu_seqlens, c.groups, c.rule
    )
    error = float((variant.make(x).call().double() - truth).abs().max())
    assert error < 1e-5, f"{variant.name}: advantages off by {error}"
    return error, None


# ---- segment


@dataclass(frozen=True)
class SegmentCase:
    """Worked solutions as token ids, a blank line between their steps.

    ``made``: made up here from a seed, in a vocabulary of their words filled up to Qwen's size. ``file``: the texts of a
    JSON-lines file named by the environment variable CAPO_BENCH_TEXTS, ``{"responses": [{"text": ...}]}`` a line, in
    Qwen's vocabulary (needs tiktoken, and dashscope for its qwen.tiktoken).
    """

    responses: int = 4_000
    texts: str = "made"
    dtype = torch.int64
    live = None

    @property
    def logits(self) -> str:
        return f"{self.texts} texts"

    @property
    def shape(self) -> str:
        return f"{self.tokens} tokens"

    @property
    def tokens(self) -> int:
        return self.make().ids.numel()

    def make(self) -> SimpleNamespace:
        return _segment_inputs(self.responses, self.texts)


_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def _segment_inputs(responses: int, texts: str) -> SimpleNamespace:
    ids, token_bytes = (_made_ids if texts == "made" else _file_ids)(responses)
    cu_seqlens = torch.tensor([0, *map(len, ids)]).cumsum(0)
    return SimpleNamespace(
        ids=torch.tensor([id_ for response in ids for id_ in response]), cu_seqlens=cu_seqlens, token_bytes=token_bytes
    )


def _made_ids(responses: int):
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(2_000)]

    def line() -> str:
        a, b = rng.randint(2, 999), rng.randint(2, 99)
        text = " ".join(rng.choices(words, k=rng.randint(6, 18)))
        return f"{text.capitalize()}, so {a} * {b} = {a * b}."

    solutions = ["\n\n".join(line() for _ in range(rng.randint(2, 9))) for _ in range(responses)]
    split = re.compile(r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\n+| ")
    known: dict[str, int] = {}
    ids = [[known.setdefault(piece, len(known)) for piece in split.findall(text)] for text in solutions]
    eos = len(known)
    token_bytes = capo.TokenBytes([*map(str.encode, known), b""], eos_ids=eos, num_tokens=151_936)
    return [[*response, eos] for response in ids], token_bytes


def _file_ids(responses: int):
    name = os.environ.get("CAPO_BENCH_TEXTS")
    if not name:
        raise Skip("CAPO_BENCH_TEXTS names no file")
    try:
        import tiktoken

        files = importlib.metadata.files("dashscope") or []
    except ImportError as error:  # PackageNotFoundError is one
        raise Skip(f"needs tiktoken and dashscope: {error}") from error
    vocabulary = Path(next(str(file.locate()) for file in files if file.name == "qwen.tiktoken"))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ranks = {base64.b64decode(token): int(id_) for token, id_ in map(bytes.split, vocabulary.read_bytes().splitlines())}
    encoding = tiktoken.Encoding("qwen", pat_str=_QWEN_SPLIT, mergeable_ranks=ranks, special_tokens={})
    lines = Path(name).read_text().splitlines()
    solutions = [r["text"].replace("\n", "\n\n") for line in lines for r in json.loads(line)["responses"]][:responses]
    token_bytes = capo.TokenBytes.from_tiktoken_file(
        vocabulary, special_tokens=special, eos_tokens=["<|im_end|>"], num_tokens=151_936
    )
    return [[*encoding.encode_ordinary(text), len(ranks) + 2] for text in solutions], token_bytes


def _segment_native(x):
    native()
    return Timed(lambda: capo.segment(x.ids, x.cu_seqlens, x.token_bytes, num_threads=1))


def _segment_python(x):
    delimiter = _Delimiter("\n\n")
    return Timed(lambda: _segment_reference(x.ids, x.cu_seqlens, x.token_bytes, delimiter))


def _copy_ids(x):
    target = torch.zeros_like(x.ids)
    return Timed(lambda: target.copy_(x.ids))


def _clone_ids(x):
    return Timed(x.ids.clone)


SEGMENT_VARIANTS = (
    Variant("copy_", "torch", FLOOR, _copy_ids, note="the ids, into memory that is there"),
    Variant("clone", "torch", FRESH_FLOOR, _clone_ids, note="the ids, into fresh memory"),
    Variant("capo", "native", "steps", _segment_native, note="one thread"),
    Variant("Python", "torch", "steps", _segment_python, note="the specification, one thread"),
)


def segment_cases(quick: bool) -> list:
    made = SegmentCase(responses=500 if quick else 4_000)
    return [(made, None)] + [(replace(made, texts="file"), None)] * bool(os.environ.get("CAPO_BENCH_TEXTS"))


def check_segment(variant: Variant, case: SegmentCase) -> tuple[float | None, float | None]:
    """Equality with the specification."""
    x = replace(case, responses=200).make()
    steps, expected = variant.make(x).call(), _segment_python(x).call()
    same = all(torch.equal(getattr(steps, name), getattr(expected, name)) for name in ("starts", "ends", "cu_steps"))
    assert same, f"{variant.name}: other steps than the specification's"
    return 0.0, None


OPS = {
    "policy_loss": Op(
        ("tests/test_policy_loss.py", "tests/test_logprobs.py"),
        policy_loss_cases,
        POLICY_LOSS_VARIANTS,
        check_policy_loss,
    ),
    "credit": Op(
        ("tests/test_credit.py",),
        lambda quick: [(CreditCase(responses=64) if quick else CreditCase(), None)],
        CREDIT_VARIANTS,
        check_credit,
    ),
    "segment": Op(("tests/test_steps.py",), segment_cases, SEGMENT_VARIANTS, check_segment, threads=1),
}
