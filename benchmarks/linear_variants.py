"""What is timed of the ops that start from hidden states; the rest of variants.py, whose words are used here."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from variants import FLOOR, FRESH_FLOOR, FULL, LOGPROBS, Op, Skip, Timed, Variant, clipped_loss, in_halves, native

import capo


@dataclass(frozen=True)
class LinearCase:
    """Hidden states, the weight of the head, and responses as in ``PolicyLossCase``.

    Args:
        live: share of tokens with an advantage, together at the front.
        off: by how much old log-probabilities differ.
        seconds: the case ends after this time, but not before five rounds.
        memory: linear_memory.py measures it, at another size.
    """

    rows: int = 1_024
    hidden: int = 1_024
    vocab: int = 151_936
    dtype: torch.dtype = torch.bfloat16
    live: float = 1.0
    length: int = 64
    off: float = 0.08
    seconds: float = 25.0
    memory = False
    logits = "gaussian"

    @property
    def shape(self) -> str:
        return f"{self.rows} x {self.hidden} x {self.vocab}"

    @property
    def tokens(self) -> int:
        return self.rows

    def make(self) -> SimpleNamespace:
        g = torch.Generator().manual_seed(0)
        hidden, weight, labels, logp = _matrices(self.rows, self.hidden, self.vocab, self.dtype)
        advantages = torch.randn(self.rows, generator=g)
        live = advantages.clone()
        live[round(self.live * self.rows) :] = 0
        return SimpleNamespace(
            hidden=hidden,
            weight=weight,
            labels=labels,
            advantages=live,
            all_advantages=advantages,
            old_logprobs=logp + self.off * torch.randn(self.rows, generator=g),
            cu_seqlens=torch.arange(0, self.rows + 1, self.length),
            length=self.length,
        )


@functools.lru_cache(1)
def _matrices(rows: int, size: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Hidden states, weight, labels and their log-probabilities; all shares of live tokens have the same."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, size, generator=g).to(dtype)
    weight = torch.empty(vocab, size, dtype=dtype)
    for part in weight.split(8_192):
        part.copy_(torch.randn(part.shape, generator=g) * (2 / math.sqrt(size)))
    labels = torch.randint(0, vocab, (rows,), generator=g)
    logp = [_logprobs(h, weight, label) for h, label in zip(hidden.split(64), labels.split(64), strict=True)]
    return hidden, weight, labels, torch.cat(logp)


def _logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities in float32 of the logits as the head makes them."""
    return F.linear(hidden, weight).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def _with_gradients(loss, x: SimpleNamespace) -> Timed:
    hidden, weight = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()
    return in_halves(lambda: loss(hidden, weight), hidden, weight)


# ---- loss and gradients


def _gemms(fresh: bool, backward: bool = True):
    """The products of matrices that are needed for the live rows, and nothing else."""

    def make(x):
        hidden, weight = x.hidden[x.advantages != 0], x.weight
        outputs = [torch.zeros(len(hidden), len(weight), dtype=hidden.dtype)]
        outputs += [torch.zeros_like(hidden), torch.zeros_like(weight)] * backward
        logits = F.linear(hidden, weight)

        def into_memory():
            torch.mm(hidden, weight.t(), out=outputs[0])
            if backward:
                torch.mm(logits, weight, out=outputs[1])
                torch.mm(logits.t(), hidden, out=outputs[2])

        def into_fresh_memory():
            first = hidden @ weight.t()
            return (first, first @ weight, first.t() @ hidden) if backward else first

        return Timed(into_fresh_memory if fresh else into_memory)

    return make


def _capo(x, advantages="advantages"):
    native()
    values = getattr(x, advantages)

    def loss(hidden, weight):
        return capo.linear_policy_loss(hidden, weight, x.labels, values, x.old_logprobs, x.cu_seqlens).loss

    return _with_gradients(loss, x)


def _capo_all_live(x):
    return _capo(x, "all_advantages")


def _eager(x):
    return _with_gradients(lambda hidden, weight: clipped_loss(_logprobs(hidden, weight, x.labels), x), x)


def _eager_live(x):
    live = x.advantages != 0

    def loss(hidden, weight):
        logp = x.old_logprobs.masked_scatter(live, _logprobs(hidden[live], weight, x.labels[live]))
        return clipped_loss(logp, x)

    return _with_gradients(loss, x)


def _compiled(x):
    length = x.length

    def loss(hidden, weight, labels, old_logprobs, advantages):
        rest = SimpleNamespace(old_logprobs=old_logprobs, advantages=advantages, length=length)
        return clipped_loss(_logprobs(hidden, weight, labels), rest)

    function = torch.compile(loss, dynamic=False)
    return _with_gradients(lambda h, w: function(h, w, x.labels, x.old_logprobs, x.advantages), x)


def _liger(x):
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    except ImportError as error:
        raise Skip(f"liger-kernel cannot be imported: {error}") from error
    module = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo")

    def timed(x):
        folded = -1, x.length

        def loss(hidden, weight):
            return module(
                hidden.view(*folded, hidden.shape[1]),
                weight,
                x.labels.view(folded),
                torch.ones(x.labels.shape, dtype=torch.int64).view(folded),
                x.advantages.view(folded)[:, 0],
                old_per_token_logps=x.old_logprobs.view(folded),
            )[0]

        return _with_gradients(loss, x)

    for count in (2, 3):  # compiles for a chunk, which is a response, and the second time for any number of them
        timed(first_responses(x, count)).call()
    return timed(x)


def first_responses(x: SimpleNamespace, count: int) -> SimpleNamespace:
    """The first of the responses of a case."""
    rows = count * x.length
    tokens = {k: v[:rows] for k, v in vars(x).items() if isinstance(v, Tensor) and k not in ("weight", "cu_seqlens")}
    return SimpleNamespace(**{**vars(x), **tokens, "cu_seqlens": x.cu_seqlens[: count + 1]})


def _trl_chunked():
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    except ImportError as error:
        raise Skip(f"trl cannot be imported: {error}") from error

    def logprobs(hidden, weight, labels, outputs=()):
        return ChunkedLogProbFunction.apply(
            hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
        )

    return logprobs


def _trl(x):
    logprobs = _trl_chunked()
    return _with_gradients(lambda hidden, weight: clipped_loss(logprobs(hidden, weight, x.labels)[0], x), x)


def _cce(x):
    try:
        # Outside of macOS the package imports its Triton kernels, too, which are not wanted here.
        with mock.patch("platform.system", return_value="Darwin"):
            from cut_cross_entropy.torch_compile import torch_compile_linear_cross_entropy
    except ImportError as error:
        raise Skip(f"cut-cross-entropy cannot be imported: {error}") from error

    def loss(hidden, weight):
        nll = torch_compile_linear_cross_entropy(hidden, weight, x.labels, reduction="none")
        return clipped_loss(-nll, x)

    return _with_gradients(loss, x)


class _VocabularyChunks(torch.autograd.Function):
    """Log-probabilities from chunks of the vocabulary with a running maximum, made again in the backward."""

    TOKENS = WORDS = 8_192

    @staticmethod
    def _tiles(hidden, weight):
        for first in range(0, len(hidden), _VocabularyChunks.TOKENS):
            for word in range(0, len(weight), _VocabularyChunks.WORDS):
                yield slice(first, first + _VocabularyChunks.TOKENS), slice(word, word + _VocabularyChunks.WORDS)

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        top = torch.full((len(hidden),), -math.inf)
        total, label_logit = torch.zeros(len(hidden)), torch.zeros(len(hidden))
        for rows, words in _VocabularyChunks._tiles(hidden, weight):
            z = F.linear(hidden[rows], weight[words]).float()
            new = torch.maximum(top[rows], z.amax(1))
            total[rows] = total[rows] * (top[rows] - new).exp() + (z - new[:, None]).exp().sum(1)
            top[rows] = new
            inside, column = _VocabularyChunks._column(labels[rows], words, z)
            label_logit[rows] += torch.where(inside, z.gather(1, column)[:, 0], 0.0)
        log_total = top + total.log()
        ctx.save_for_backward(hidden, weight, labels, log_total)
        return label_logit - log_total

    @staticmethod
    def _column(labels, words, z):
        column = labels - words.start
        inside = (column >= 0) & (column < z.shape[1])
        return inside, torch.where(inside, column, 0)[:, None]

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, labels, log_total = ctx.saved_tensors
        grad_hidden, grad_weight = torch.zeros(hidden.shape), torch.zeros_like(weight)
        for rows, words in _VocabularyChunks._tiles(hidden, weight):
            z = F.linear(hidden[rows], weight[words]).float()
            g = (z - log_total[rows, None]).exp_().mul_(-grad[rows, None])
            inside, column = _VocabularyChunks._column(labels[rows], words, z)
            g.scatter_add_(1, column, torch.where(inside, grad[rows], 0.0)[:, None])
            g = g.to(hidden.dtype)
            grad_hidden[rows] += g @ weight[words]
            grad_weight[words] += g.t() @ hidden[rows]
        return grad_hidden.to(hidden.dtype), grad_weight, None


def _vocabulary_chunks(x):
    def loss(hidden, weight):
        return clipped_loss(_VocabularyChunks.apply(hidden, weight, x.labels), x)

    return _with_gradients(loss, x)


PEER_ROUNDS = 2  # they take many times as long, and what is claimed of them is not a matter of per cent

LINEAR_VARIANTS = (
    Variant("three GEMMs", "torch", FLOOR, _gemms(False), note="of the live rows, into memory that is there"),
    Variant("three GEMMs, fresh memory", "torch", FRESH_FLOOR, _gemms(True), note="of the live rows"),
    Variant("capo", "native", FULL, _capo),
    Variant("capo, all live", "native", FULL, _capo_all_live, note="the same inputs with no advantage of 0"),
    Variant("eager", "torch", FULL, _eager, note="log_softmax in float32, autograd", rounds=PEER_ROUNDS),
    Variant(
        "eager, live rows", "torch", FULL, _eager_live, note="the same on the rows with an advantage",
        rounds=PEER_ROUNDS,
    ),
    Variant(
        "torch.compile", "inductor", FULL, _compiled, note="of eager; first_call_ms holds the compilation",
        rounds=PEER_ROUNDS,
    ),
    Variant(
        "Liger", "liger-kernel", FULL, _liger, rough=True, rounds=1,
        note="LigerFusedLinearGRPOLoss; one advantage a response, the first of each; dW summed in the dtype of the weight",
    ),
    Variant("TRL", "trl", FULL, _trl, note="ChunkedLogProbFunction, eager loss", rounds=1),
    Variant(
        "CCE", "cut-cross-entropy", FULL, _cce, note="its torch_compile implementation, eager loss", rounds=PEER_ROUNDS
    ),
    Variant(
        "vocabulary chunks", "torch", FULL, _vocabulary_chunks, note="as prime-rl does: 8,192 words at a time",
        rounds=PEER_ROUNDS,
    ),
)  # fmt: skip


def main_case(quick: bool) -> LinearCase:
    return LinearCase(rows=256, hidden=128, vocab=32_000) if quick else LinearCase()


def linear_cases(quick: bool) -> list:
    everything = tuple(v.name for v in LINEAR_VARIANTS if v.name not in ("capo, all live", "eager, live rows"))
    live = ("three GEMMs", "three GEMMs, fresh memory", "capo", "capo, all live", "eager, live rows")
    main = main_case(quick)
    return [(main, everything), *((replace(main, live=f), live) for f in (0.5, 0.25, 0.05))]


def check_linear(variant: Variant, case: LinearCase) -> tuple[float | None, float | None]:
    """Errors against float64 on a smaller shape, of the loss relative to the size of the advantages, and of the worse of
    the two gradients, relative L2: at most twice those of eager PyTorch."""
    x = replace(case, rows=256, hidden=96, vocab=4_099, off=0.3).make()
    if variant.backend == "liger-kernel":
        x.advantages = x.advantages.view(-1, x.length)[:, :1].repeat(1, x.length).flatten()
    if variant.name == "capo, all live":
        x.advantages = x.all_advantages
    double = SimpleNamespace(**{k: v.double() if _is_float(v) else v for k, v in vars(x).items()})
    truth = [
        t.detach()
        for t in _with_gradients(lambda h, w: clipped_loss(_double_logprobs(h, w, x.labels), double), double).call()
    ]

    def errors(result) -> tuple[float, float]:
        value, *gradients = (t.detach().double() for t in result)
        return (
            float((value - truth[0]).abs() / x.advantages.abs().mean()),
            max(float((a - b).norm() / b.norm()) for a, b in zip(gradients, truth[1:], strict=True)),
        )

    mine, eager = errors(variant.make(x).call()), errors(_eager(x).call())
    allowed = (0.05, 0.2) if variant.rough else (2 * eager[0] + 1e-5, 2 * eager[1])
    for what, error, limit in zip(("loss", "gradient"), mine, allowed, strict=True):
        assert error <= limit, f"{variant.name}: {what} off by {error}, allowed are {limit}"
    return mine


def _is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _double_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear(hidden, weight).log_softmax(-1).gather(-1, labels[:, None])[:, 0]


# ---- log-probabilities and entropies


def _capo_logprobs(x):
    native()
    return Timed(lambda: capo.linear_logprobs(x.hidden, x.weight, x.labels))


def _eager_logprobs(hidden, weight, labels):
    logp = F.linear(hidden, weight).float().log_softmax(-1)
    return logp.gather(-1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def _eager_whole(x):
    return Timed(torch.no_grad()(lambda: _eager_logprobs(x.hidden, x.weight, x.labels)))


def _eager_chunks(x):
    def call():
        parts = [_eager_logprobs(h, x.weight, y) for h, y in zip(x.hidden.split(512), x.labels.split(512), strict=True)]
        return tuple(torch.cat(values) for values in zip(*parts, strict=True))

    return Timed(torch.no_grad()(call))


def _trl_logprobs(x):
    logprobs = _trl_chunked()
    return Timed(torch.no_grad()(lambda: logprobs(x.hidden, x.weight, x.labels, ("entropy",))[:2]))


LOGPROBS_VARIANTS = (
    Variant("one GEMM", "torch", FLOOR, _gemms(False, False), note="into memory that is there"),
    Variant("one GEMM, fresh memory", "torch", FRESH_FLOOR, _gemms(True, False)),
    Variant("capo.linear_logprobs", "native", LOGPROBS, _capo_logprobs),
    Variant("eager", "torch", LOGPROBS, _eager_whole, note="log_softmax in float32", rounds=PEER_ROUNDS),
    Variant(
        "eager, chunks", "torch", LOGPROBS, _eager_chunks, note="512 tokens at a time, as verl does", rounds=PEER_ROUNDS
    ),
    Variant("TRL", "trl", LOGPROBS, _trl_logprobs, note="ChunkedLogProbFunction", rounds=1),
)


def logprobs_cases(quick: bool) -> list:
    return [(main_case(quick), None)]


def check_logprobs(variant: Variant, case: LinearCase) -> tuple[float | None, float | None]:
    """Largest error of log-probabilities and entropies against float64 on a smaller shape: at most twice that of eager."""
    x = replace(case, rows=256, hidden=96, vocab=4_099).make()
    logp = F.linear(x.hidden.double(), x.weight.double()).log_softmax(-1)
    truth = logp.gather(-1, x.labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    mine, eager = (
        max(float((a.double() - b).abs().max()) for a, b in zip(make(x).call(), truth, strict=True))
        for make in (variant.make, _eager_whole)
    )
    assert mine <= 2 * eager, f"{variant.name}: log-probabilities or entropies off by {mine}, allowed are {2 * eager}"
    return mine, None


OPS = {
    "linear_policy_loss": Op(("tests/test_linear_policy_loss.py",), linear_cases, LINEAR_VARIANTS, check_linear),
    "linear_logprobs": Op(("tests/test_linear_logprobs.py",), logprobs_cases, LOGPROBS_VARIANTS, check_logprobs),
}
