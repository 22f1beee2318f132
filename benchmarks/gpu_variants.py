"""What is timed on a GPU: inputs, the ways to compute each op, the check of each way; words are those of variants.py."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import linear_variants
import torch
import variants
from torch.nn import functional as F
from variants import FLOOR, FORWARD, FULL, LOGPROBS, Skip, Timed, Variant, clipped_loss, in_halves

import capo
from capo.backends import why_not

LIVE = (1.0, 0.5, 0.25, 0.05)
CROSS_ENTROPY = "cross entropy, no policy loss"


@dataclass(frozen=True)
class Case:
    """Inputs of one op, on a device.

    Args:
        op: what is computed.
        sizes: of the inputs, by name.
        dtype: of logits, or of hidden states and weight.
        live: share of the tokens with an advantage, together at the front; whole responses, where that is possible.
        logits: gaussian, or peaked: the label has most of the probability, as in trained models.
    """

    op: str
    sizes: dict[str, int]
    dtype: torch.dtype = torch.bfloat16
    live: float | None = 1.0
    logits: str = "gaussian"

    @property
    def shape(self) -> str:
        return " x ".join(str(size) for size in self.sizes.values())

    @property
    def tokens(self) -> int:
        return self.sizes.get("rows") or self.sizes["responses"] * self.sizes["length"]

    def make(self, device: str) -> SimpleNamespace:
        g = torch.Generator(device).manual_seed(0)
        if self.op == "credit":
            return _credit_inputs(device, **self.sizes)
        rows, vocab = self.sizes["rows"], self.sizes["vocab"]
        labels = torch.randint(0, vocab, (rows,), generator=g, device=device)
        if self.op == "policy_loss":
            logits = torch.empty(rows, vocab, dtype=self.dtype, device=device).normal_(std=2.0, generator=g)
            if self.logits == "peaked":
                top = 16 + 4 * torch.randn(rows, generator=g, device=device)
                logits[torch.arange(rows, device=device), labels] = top.to(self.dtype)
            x = SimpleNamespace(logits=logits)
            logp = torch.cat([_logprobs(*pair) for pair in zip(logits.split(512), labels.split(512), strict=True)])
        else:
            hidden, weight = (
                torch.empty(count, self.sizes["hidden"], dtype=self.dtype, device=device).normal_(generator=g)
                for count in (rows, vocab)
            )
            weight *= 2 / self.sizes["hidden"] ** 0.5
            x = SimpleNamespace(hidden=hidden, weight=weight)
            logp = torch.cat([
                linear_variants._logprobs(part, weight, label)
                for part, label in zip(hidden.split(512), labels.split(512), strict=True)
            ])  # fmt: skip
        x.labels, x.live = labels, round(self.live * rows)
        x.length = next(length for length in (512, 64, rows) if rows % length == 0 and length < rows or length == rows)
        advantages = torch.randn(rows // x.length, generator=g, device=device).repeat_interleave(x.length)
        advantages[x.live :] = 0.0
        x.advantages = advantages  # one a response: some peers know no other
        x.old_logprobs = logp + 0.08 * torch.randn(rows, generator=g, device=device)
        x.cu_seqlens = torch.arange(0, rows + 1, x.length, device=device)
        return x


def _logprobs(logits, labels):
    return logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def _credit_inputs(device: str, responses: int, length: int, steps: int) -> SimpleNamespace:
    """Responses of equal steps with 8 votes, groups of 16."""
    starts = torch.arange(0, responses * length, length // steps, device=device)
    credit = capo.Credit(
        (torch.arange(responses, device=device) % 3 == 0).float(),
        (torch.arange(responses * steps * 8, device=device) % 5 == 0).view(-1, 8).to(torch.int8),
        capo.Steps(starts, starts + length // steps, torch.arange(0, len(starts) + 1, steps, device=device)),
        torch.arange(0, responses * length + 1, length, device=device),
        torch.arange(responses, device=device) // 16,
    )
    return SimpleNamespace(credit=credit, out=torch.empty(responses * length, device=device))


def by(backend: str, make: Callable) -> Callable:
    """What one backend makes of it; skipped where that cannot run."""

    def made(x):
        device = next(value for value in vars(x).values() if isinstance(value, torch.Tensor)).device.type
        if reason := why_not(backend, device):
            raise Skip(reason)
        timed = make(x)

        def under(function: Callable) -> Callable:
            def call(*args):
                with capo.use_backend(backend):
                    return function(*args)

            return call

        halves = timed.halves and tuple(map(under, timed.halves))
        return dataclasses.replace(timed, call=under(timed.call), halves=halves)

    return made


def both(name: str, what: str, make: Callable, note: str = "") -> tuple[Variant, Variant]:
    """A way to compute, by our two backends for GPUs."""
    return tuple(
        Variant(f"capo {shown}{name}", backend, what, by(backend, make), note=note)
        for shown, backend in (("CUDA", "native"), ("Triton", "triton"))
    )


def peer(module: str, name: str):
    """A function of a package that may not be there."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise Skip(f"{module}.{name}: {error}") from error


# ---- from logits


def _loss_of_logits(loss: Callable) -> Callable:
    def make(x):
        logits = x.logits.detach().requires_grad_()
        return in_halves(lambda: loss(logits, x), logits)

    return make


def _in_place(x):
    buffer = torch.empty_like(x.logits)
    leaf = [buffer]

    def reset():
        leaf[0] = buffer.copy_(x.logits).detach().requires_grad_()

    def forward():
        return variants._capo_loss(x, leaf[0], inplace=True)

    def backward(value):
        return torch.autograd.grad(value, leaf[0])

    def call():
        value = forward()
        return value, *backward(value)

    return Timed(call, reset, (forward, backward))


def _trl_loss(x):
    """TRL's fused log-probabilities and the loss in eager PyTorch: how its users run it."""
    kernel = peer("trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy")
    return _loss_of_logits(lambda logits, x: clipped_loss(kernel(logits[None], x.labels[None])[0][0], x))(x)


def _liger_loss(x):
    """It wants one more row a response than tokens; the copy that this takes is outside the timing."""
    kernel = peer("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    shape = len(x.labels) // x.length, x.length
    padded = torch.zeros(shape[0], x.length + 1, x.logits.shape[1], dtype=x.logits.dtype, device=x.logits.device)
    padded[:, :-1] = x.logits.view(*shape, -1)
    logits = padded.requires_grad_()

    def forward():
        return kernel(
            logits, x.old_logprobs.view(shape), None, x.labels.view(shape), x.advantages.view(shape)[:, 0],
            None, temperature=1.0, beta=0.0, eps_low=0.2, eps_high=0.2, inplace=False, loss_type="grpo", reduce=True,
        )[0]  # fmt: skip

    return in_halves(forward, logits)


def _quack(x):
    kernel = peer("quack.cross_entropy", "cross_entropy")
    logits = x.logits.detach().requires_grad_()
    return in_halves(lambda: kernel(logits, x.labels), logits)


def _trl_logprobs(x):
    kernel = peer("trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy")
    return Timed(torch.no_grad()(lambda: tuple(out[0] for out in kernel(x.logits[None], x.labels[None]))))


LOGITS_VARIANTS = (
    Variant("copy_", "torch", FLOOR, variants._copy_logits, note="the logits, into memory that is there"),
    *both("", FULL, _loss_of_logits(lambda logits, x: variants._capo_loss(x, logits))),
    *both(", in place", FULL, _in_place, note="gradient over the logits"),
    *both(", live rows", FULL, variants._loss_of_live_rows, note="logits and gradient of these alone"),
    Variant("eager", "torch", FULL, _loss_of_logits(lambda z, x: clipped_loss(_logprobs(z, x.labels), x))),
    Variant("eager, live rows", "torch", FULL, variants._eager_live, note="the same on the rows with an advantage"),
    Variant(
        "torch.compile", "inductor", FULL, variants._compiled, note="of eager; first_call_ms holds the compilation"
    ),
    Variant("TRL", "trl", FULL, _trl_loss, note="its fused log-probabilities, eager loss"),
    Variant("Liger", "liger-kernel", FULL, _liger_loss, note="triton_grpo_loss; one advantage a response"),
    Variant("QuACK", "quack-kernels", CROSS_ENTROPY, _quack, note="speed of light: cross entropy and its gradient"),
    *both(", no gradient", FORWARD, lambda x: Timed(lambda: (variants._capo_loss(x, x.logits),))),
    *both(" logprobs", LOGPROBS, lambda x: Timed(lambda: capo.logprobs(x.logits, x.labels))),
    Variant("eager logprobs", "torch", LOGPROBS, variants._eager_logprobs),
    Variant("TRL logprobs", "trl", LOGPROBS, _trl_logprobs),
)
_CAPO = tuple(f"capo {backend}{form}" for backend in ("CUDA", "Triton") for form in ("", ", in place"))
_BY_LIVE = ("copy_", *_CAPO, "capo CUDA, live rows", "capo Triton, live rows", "eager, live rows")
_SHORT = ("copy_", *_CAPO, "eager", "torch.compile", "TRL", "Liger", "QuACK")


def logits_cases(rows: int, vocab: int, others: Sequence[int]) -> list:
    """Live shares; then peaked logits, other vocabularies with half as many logits each, other types."""
    main = Case("policy_loss", {"rows": rows, "vocab": vocab})

    def other(size: int) -> Case:
        return dataclasses.replace(main, sizes={"rows": max(8, rows * vocab // size // 1024 * 512), "vocab": size})

    return [
        (main, None),
        *((dataclasses.replace(main, live=live), _BY_LIVE) for live in LIVE[1:]),
        (dataclasses.replace(main, logits="peaked"), _SHORT),
        *((other(size), _SHORT) for size in others),
        *((dataclasses.replace(other(vocab), dtype=dtype), _SHORT) for dtype in (torch.float16, torch.float32)),
    ]


# ---- from hidden states


def _loss_of_hidden(loss: Callable) -> Callable:
    def make(x):
        hidden, weight = (value.detach().requires_grad_() for value in (x.hidden, x.weight))
        return in_halves(lambda: loss(hidden, weight, x), hidden, weight)

    return make


def _capo_loss(hidden, weight, x, **options):
    return capo.linear_policy_loss(hidden, weight, x.labels, x.advantages, x.old_logprobs, x.cu_seqlens, **options).loss


def _products(backward: bool) -> Callable:
    """The products of the live rows, into memory that is there."""

    def make(x):
        hidden, weight = x.hidden[: x.live], x.weight
        logits = torch.mm(hidden, weight.t())
        outputs = torch.empty_like(hidden), torch.empty_like(weight)

        def call():
            torch.mm(hidden, weight.t(), out=logits)
            if backward:
                torch.mm(logits, weight, out=outputs[0])
                torch.mm(logits.t(), hidden, out=outputs[1])

        return Timed(call)

    return make


def _on_device(make: Callable) -> Callable:
    """What run.py times on CPUs, of tensors that are on a device."""

    def made(x):
        with torch.device(x.hidden.device):
            return make(x)

    return made


def _cce(x):
    function = peer("cut_cross_entropy", "linear_cross_entropy")

    def loss(hidden, weight, x):
        return clipped_loss(-function(hidden, weight, x.labels, reduction="none", impl="cce_exact"), x)

    return _loss_of_hidden(loss)(x)


def _verl(backend: str) -> Callable:
    def make(x):
        module = "verl.utils.experimental.torch_functional"
        head = peer(module, "FusedLinearForPPO")(impl_backend=backend)
        if backend == "liger" and peer(module, "_LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY") is None:
            raise Skip("Liger's fused linear scaled cross entropy does not run here")

        def loss(hidden, weight, x):
            return clipped_loss(head(hidden[None], weight, x.labels[None])[0][0].float(), x)

        return _loss_of_hidden(loss)(x)

    return make


def _verl_kernels(x):
    function = peer("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    return _loss_of_hidden(lambda hidden, weight, x: clipped_loss(function(hidden, weight, x.labels)[0].float(), x))(x)


HIDDEN_VARIANTS = (
    Variant("three products", "torch", FLOOR, _products(True), note="of the live rows, into memory that is there"),
    Variant("capo", "native", FULL, _loss_of_hidden(_capo_loss)),
    Variant("capo, num_live", "native", FULL, _loss_of_hidden(lambda h, w, x: _capo_loss(h, w, x, num_live=x.live))),
    Variant("eager, live rows", "torch", FULL, _on_device(linear_variants._eager_live)),
    Variant("torch.compile", "inductor", FULL, _on_device(linear_variants._compiled)),
    Variant("Liger", "liger-kernel", FULL, _on_device(linear_variants._liger), rough=True),
    Variant("TRL", "trl", FULL, _on_device(linear_variants._trl)),
    Variant("CCE", "cut-cross-entropy", FULL, _cce, note="its Triton kernels, which filter no gradients here"),
    Variant("verl", "verl", FULL, _verl("torch")),
    Variant("verl with Liger's FLSCE", "verl", FULL, _verl("liger")),
    Variant("verl kernels", "verl", FULL, _verl_kernels),
)


def hidden_cases(rows: int, hidden: int, vocab: int) -> list:
    main = Case("linear_policy_loss", {"rows": rows, "hidden": hidden, "vocab": vocab})
    by_live = ("three products", "capo", "capo, num_live", "eager, live rows")
    return [(main, None), *((dataclasses.replace(main, live=live), by_live) for live in LIVE[1:])]


def _capo_logprobs(x):
    return Timed(lambda: capo.linear_logprobs(x.hidden, x.weight, x.labels))


def _capo_counted_logprobs(x):
    mask = torch.ones_like(x.labels, dtype=torch.bool)
    return Timed(lambda: capo.linear_logprobs(x.hidden, x.weight, x.labels, mask=mask))


def _epilogue_logprobs(x):
    function = importlib.import_module("gpu_epilogue").linear_logprobs
    count = torch.tensor(len(x.labels), device=x.labels.device)
    return Timed(lambda: function(x.hidden, x.weight, x.labels, count))


LOGPROBS_VARIANTS = (
    Variant("one product", "torch", FLOOR, _products(False), note="into memory that is there"),
    Variant("capo", "native", LOGPROBS, _capo_logprobs),
    Variant("capo, mask", "native", LOGPROBS, _capo_counted_logprobs, note="rows are counted on the device"),
    Variant("in the epilogue", "triton", LOGPROBS, _epilogue_logprobs, note="an experiment: no logits in memory"),
    Variant("eager, chunks", "torch", LOGPROBS, _on_device(linear_variants._eager_chunks)),
    Variant("TRL", "trl", LOGPROBS, _on_device(linear_variants._trl_logprobs)),
)


def logprobs_cases(rows: int, hidden: int, vocab: int) -> list:
    return [(Case("linear_logprobs", {"rows": rows, "hidden": hidden, "vocab": vocab}), None)]


# ---- the products alone: cuBLAS of the live rows, PyTorch's grouped product, the kernels that count on the device


def _product(name: str) -> Callable:
    def make(x):
        hidden, weight, live, device = x.hidden, x.weight, x.live, x.hidden.device
        logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=device)
        torch.mm(hidden, weight.t(), out=logits)
        count, total = torch.tensor(live, device=device), torch.zeros(weight.shape, device=device)
        offsets, grad = torch.tensor([live], dtype=torch.int32, device=device), torch.empty_like(hidden)
        backend = importlib.import_module("capo.kernels.backend")
        calls = {
            "logits, cuBLAS": lambda: torch.mm(hidden[:live], weight.t(), out=logits[:live]),
            "hidden, cuBLAS": lambda: torch.mm(logits[:live], weight, out=grad[:live]),
            "weight, cuBLAS": lambda: torch.mm(logits[:live].t(), hidden[:live]),
            "logits, grouped": lambda: torch._grouped_mm(hidden, weight.t()[None], offs=offsets),
            "hidden, grouped": lambda: torch._grouped_mm(logits, weight[None], offs=offsets),
            "weight, grouped": lambda: torch._grouped_mm(logits.t(), hidden, offs=offsets),
            "logits, capo Triton": lambda: backend.rows_product(hidden, weight.t(), None, logits, count),
            "hidden, capo Triton": lambda: backend.rows_product(logits, weight, None, grad, count),
            "weight, capo Triton": lambda: backend.add_product(logits, hidden, total, count),
        }
        if "grouped" in name and not hasattr(torch, "_grouped_mm"):
            raise Skip("this PyTorch has no grouped product")
        return Timed(calls[name])

    return make


PRODUCT_VARIANTS = tuple(
    Variant(
        f"{result}, {maker}", "triton" if maker.startswith("capo") else "torch", f"product: {result}",
        _product(f"{result}, {maker}"),
    )
    for result in ("logits", "hidden", "weight")
    for maker in ("cuBLAS", "grouped", "capo Triton")
)  # fmt: skip


def product_cases(rows: int, hidden: int, vocab: int) -> list:
    sizes = {"rows": rows, "hidden": hidden, "vocab": vocab}
    return [(Case("product", sizes, live=live), None) for live in LIVE]


# ---- credit

CREDIT_VARIANTS = (
    Variant("fill_", "torch", FLOOR, lambda x: Timed(lambda: x.out.fill_(1.0)), note="writing as many floats"),
    *both("", "advantages", lambda x: Timed(lambda: capo.ops.credit(x.credit, len(x.out)))),
)


def credit_cases(responses: int, length: int, steps: int = 32) -> list:
    sizes = {"responses": responses, "length": length, "steps": steps}
    return [(Case("credit", sizes, torch.float32, None, ""), None)]


# ---- checks, each on a small batch against float64


def check(variant: Variant, case: Case, device: str) -> float | None:
    """The error: relative L2 of the worst gradient, largest of log-probabilities, or of advantages; AssertionError if it is
    too large for the type."""
    if variant.is_floor or case.op == "product":
        return None
    if case.op == "credit":
        x = _credit_inputs(device, 6, 64, 8)
        with capo.use_backend("torch"):
            truth = x.credit.advantages().double()
        error = float((variant.make(x).call().double() - truth).abs().max())
        limit = 1e-5
    else:
        sizes = (
            {"rows": 128, "hidden": 64, "vocab": 1027}
            if device == "cpu"
            else {"rows": 512, "hidden": 128, "vocab": 4099}
        )
        x = dataclasses.replace(case, sizes=sizes, live=0.5 if case.live else 1.0).make(device)
        timed = variant.make(x)
        timed.reset()
        result = timed.call()
        error, limit = _error(variant, x, result)
    assert error < limit, f"{variant.name}: off by {error:.3g}, more than {limit:.3g}"
    return error


def _error(variant: Variant, x: SimpleNamespace, result) -> tuple[float, float]:
    """The error, and how large it may be: of a gradient of logits twice what rounding to their type takes."""
    given = (x.logits,) if hasattr(x, "logits") else (x.hidden, x.weight)
    leaves = [value.double().requires_grad_() for value in given]
    all_logp = (leaves[0] if len(leaves) == 1 else F.linear(*leaves)).log_softmax(-1)
    logp = all_logp.gather(-1, x.labels[:, None])[:, 0]
    coarse = {torch.float32: 1e-4, torch.bfloat16: 0.04, torch.float16: 0.01}[given[0].dtype]
    if variant.what == LOGPROBS:
        truth = logp, -(all_logp.exp() * all_logp).sum(-1)
        error = max(
            float((mine.double() - right).detach().abs().max()) for mine, right in zip(result[:2], truth, strict=True)
        )
        return error, 1e-4 if len(leaves) == 1 else coarse
    double = SimpleNamespace(old_logprobs=x.old_logprobs.double(), advantages=x.advantages.double(), length=x.length)
    loss = -logp.mean() if variant.what == CROSS_ENTROPY else clipped_loss(logp, double)
    if variant.what == FORWARD:
        return float((result[0].double() - loss.detach()).abs()), 1e-5
    truth = torch.autograd.grad(loss, leaves)
    mine = [gradient.double() for gradient in result[1:]]
    if variant.backend == "liger-kernel" and len(leaves) == 1:
        mine = [mine[0][:, :-1].reshape(truth[0].shape)]
    if len(leaves) == 1 and len(mine[0]) != len(truth[0]):
        truth = (truth[0][x.advantages != 0],)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(mine, truth, strict=True)]
    rounding = float((truth[0].to(given[0].dtype).double() - truth[0]).norm() / truth[0].norm())
    return max(errors), 2 * rounding + 2e-5 if len(leaves) == 1 else coarse * (5 if variant.rough else 1)
