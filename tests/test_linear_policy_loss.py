"""linear_policy_loss: against policy_loss of all logits and float64, and the promises of its docstring."""

import dataclasses
import itertools
import math
import os
import subprocess
import sys

import numerics
import pytest
import torch
from batches import Batch, closed_form_gradient, lengths_to_cu, random_batch, slopes
from test_policy_loss import DTYPES, IDS, REGIMES, RULES
from torch.nn.functional import linear as torch_linear

import capo
from capo import LossRule
from capo.reference import LinearLogits

SEEDS = int(os.environ.get("CAPO_SEEDS", "4"))  # of test_every_option
CHUNK = 32 * 257 * 4  # bytes: 32 rows of a vocabulary of 257 in float32


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks may be as small as the multiple of rows."""
    monkeypatch.setattr("capo.linear.MIN_CHUNK_ROWS", 32)


class Head:
    """A batch whose logits come from hidden states, in ``dtype``; old log-probabilities stay clear of the clip edges."""

    def __init__(
        self, lengths=(20, 1, 0, 25, 14), vocab=257, size=48, dtype=torch.float32, seed=0, bias=True, device="cpu"
    ):
        g = torch.Generator().manual_seed(seed)
        self.batch = random_batch(lengths, 2, seed=seed)
        n = len(self.batch.labels)
        self.batch.labels = torch.randint(0, vocab, (n,), generator=g)
        self.hidden = torch.randn(n, size, generator=g).to(dtype)
        self.weight = (2 * torch.randn(vocab, size, generator=g) / size**0.5).to(dtype)
        self.bias = torch.randn(vocab, generator=g).to(dtype) if bias else None
        self.near(g)
        self.to(device)

    def near(self, g, **options):
        logits = LinearLogits(*(None if x is None else x.double() for x in self.leaves()), **options)
        logits = logits[torch.arange(len(self.hidden))]
        logp = logits.log_softmax(-1).gather(-1, self.batch.labels[:, None])[:, 0].float()
        steps = torch.tensor([-0.5, -0.1, 0.1, 0.5])

        def draw():
            return logp + steps[torch.randint(0, 4, logp.shape, generator=g)]

        self.batch = self.batch.replace(old_logprobs=draw(), ref_logprobs=draw(), rollout_logprobs=draw())

    def leaves(self):
        return [self.hidden, self.weight, self.bias]

    def to(self, device):
        self.hidden, self.weight, self.bias = (None if x is None else x.to(device) for x in self.leaves())
        self.batch = self.batch.to(device)
        return self

    def tokens(self):
        return {name: value for name, value in vars(self.batch).items() if name != "logits"}

    def run(self, rule, need=(True, True, True), **options):
        """``capo.linear_policy_loss`` and the gradients of hidden, weight, bias."""
        leaves = [
            None if x is None else x.detach().clone().requires_grad_(wanted)
            for x, wanted in zip(self.leaves(), need, strict=True)
        ]
        hidden, weight, bias = leaves
        out = capo.linear_policy_loss(hidden, weight, rule=rule, bias=bias, **{**self.tokens(), **options})
        if out.loss.requires_grad:
            out.loss.backward()
        return out, [None if x is None else x.grad for x in leaves]

    def eager(self, rule, dtype=None, **options):
        """The same by plain PyTorch and autograd, on the CPU."""
        dtype = dtype or self.hidden.dtype
        leaves = [None if x is None else x.detach().cpu().to(dtype).requires_grad_(True) for x in self.leaves()]
        batch = self.batch.to("cpu")
        batch = batch.double() if dtype == torch.float64 else batch
        rest = batch.labels, batch.credit, batch.old_logprobs, batch.cu_seqlens, rule
        out = capo.reference.policy_loss_terms(
            LinearLogits(*leaves, **options), *rest, batch.ref_logprobs, batch.mask, batch.rollout_logprobs
        )
        if out[0].requires_grad:
            out[0].backward()
        grads = [None if x is None else torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
        return [x.detach() for x in out], grads

    def closed_form(self, rule, softcap=None, temperature=None):
        """The gradients by all logits and the closed form of theirs, on the CPU."""
        batch, leaves = self.batch.to("cpu"), [None if x is None else x.cpu() for x in self.leaves()]
        hidden, weight, bias = leaves
        uncapped = torch_linear(hidden, weight, bias).float()
        divisor = 1 if temperature is None else temperature[:, None]
        logits = (uncapped if softcap is None else torch.tanh(uncapped / softcap) * softcap).to(hidden.dtype)
        grad = closed_form_gradient(batch.replace(logits=logits.float() / divisor), rule) / divisor
        slope = 1.0 if softcap is None else 1 / torch.cosh(uncapped / softcap) ** 2
        grad = (grad * slope).to(hidden.dtype)
        return [grad @ weight, grad.t() @ hidden, None if bias is None else grad.sum(0)]

    def terms(self, rule, **options):
        """What each number of the gradients is the sum of: root of the sum of squares, float64.

        A gradient of a logit is made of those of the objective, of the KL and of the entropy, and of what rounding the
        label's logit to float32 adds; each of hidden, weight and bias is a sum over these.
        """
        batch, leaves = self.batch.to("cpu").double(), [None if x is None else x.cpu().double() for x in self.leaves()]
        logits, itself = torch_linear(*leaves), torch.eye(len(self.weight), dtype=torch.float64)

        def gradient(rule, logits=logits):
            logits = logits.clone().requires_grad_(True)
            rest = batch.labels, batch.credit, batch.old_logprobs, batch.cu_seqlens, rule
            loss, *_ = capo.reference.policy_loss_terms(
                LinearLogits(logits, itself, **options), *rest, batch.ref_logprobs, batch.mask, batch.rollout_logprobs
            )
            return torch.autograd.grad(loss, logits)[0] if loss.requires_grad else torch.zeros_like(logits)

        whole, objective = gradient(rule), gradient(dataclasses.replace(rule, kl_coef=0.0, entropy_coef=0.0))
        with_kl = gradient(dataclasses.replace(rule, entropy_coef=0.0))
        little = 1e-7
        moved = logits.scatter_add(1, batch.labels[:, None], little * logits.abs().amax(-1, keepdim=True))
        rounding = (gradient(rule, moved) - whole) / little * (2.0**-24 / (torch.finfo(self.hidden.dtype).eps / 2))
        squares = sum(x.square() for x in (objective, with_kl - objective, whole - with_kl, rounding))
        hidden, weight, bias = leaves
        sums = squares @ weight.square(), squares.t() @ hidden.square(), None if bias is None else squares.sum(0)
        return [None if x is None else x.sqrt() for x in sums]


def bitwise(device) -> bool:
    """Whether a row gets the same bits in any surroundings: plain PyTorch has others where its vectors end."""
    return capo.backends.chosen(device.type) == "native"


def check(head: Head, rule: LossRule, names=("hidden", "weight"), reference_options=None, **options):
    """Loss, metrics and gradients against float64, no worse than twice eager PyTorch."""
    reference_options = options if reference_options is None else reference_options
    out, grads = head.run(rule, **options)
    eager, _ = head.eager(rule, **reference_options)
    truth, _ = head.eager(rule, torch.float64, **reference_options)
    size = 1 + float(head.weight.double().abs().sum(1).max()) / rule.temperature
    for k in range(5):
        numerics.assert_as_accurate(out[k].detach().cpu(), eager[k], truth[k], size)
    check_gradients(head, rule, grads, names, **reference_options)


def check_gradients(head: Head, rule: LossRule, grads, names=("hidden", "weight", "bias"), **options):
    """Those of hidden, weight and bias, against float64, no worse than twice eager PyTorch."""
    assert all(x is None or x.dtype == head.hidden.dtype for x in grads)
    if not names:
        return
    ways = head.eager(rule, **options)[1], head.closed_form(rule, **options)
    exact = head.eager(rule, torch.float64, **options)[1], head.terms(rule, **options)
    for name, actual, *others in zip(("hidden", "weight", "bias"), grads, *ways, *exact, strict=True):
        if name in names:
            # Each number of the bias is a row: as one row they would have but one of eager's to be compared with.
            x, *eager, truth, terms = (x[:, None] if name == "bias" else x for x in (actual.cpu(), *others))
            own = truth.abs().amax(-1)
            numerics.assert_rows_as_accurate(x, eager, truth, own, torch.zeros(len(truth)), terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("name", RULES)
def test_every_option(name, dtype, device, small_chunks):
    bias = name in ("default", "all")
    for seed in range(SEEDS):
        head = Head(lengths=(70, 1, 0, 45, 44), dtype=dtype, seed=seed, device=device, bias=bias)
        check(head, RULES[name], ("hidden", "weight", *["bias"] * bias), {}, chunk_bytes=CHUNK)


@pytest.mark.parametrize("objective", ["clip", "cispo"])
@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_token"])
def test_combinations_equal_the_reference(ratio, objective, device, small_chunks):
    cases = itertools.product(("sequence_mean", "token_mean", "constant"), (None, "k1", "k2", "k3"), (0.0, 0.02))
    for number, (reduce, kl, entropy) in enumerate(cases):
        rule = LossRule(
            ratio=ratio, reduce=reduce, constant=7.0 if reduce == "constant" else None, kl_coef=0.1 if kl else 0.0,
            kl=kl or "k3", entropy_coef=entropy, objective=objective, importance_cap=(None, 1.5)[number % 2],
            clip_dual=1.3 if number % 3 and objective == "clip" else None, temperature=0.8,
        )  # fmt: skip
        compare_with_reference(rule, device)


def compare_with_reference(rule, device):
    head = Head(lengths=(3, 0, 40, 2), vocab=37, size=9, device=device)
    out, grads = head.run(rule, chunk_bytes=1)
    truth, truth_grads = head.eager(rule, torch.float64)
    for mine, exact in zip(out, truth, strict=True):
        torch.testing.assert_close(mine.detach().cpu().double(), exact, rtol=5e-6, atol=5e-6)
    for mine, exact in zip(grads, truth_grads, strict=True):
        torch.testing.assert_close(mine.cpu().double(), exact, rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("rule", ["default", "all"])
@pytest.mark.parametrize("name", REGIMES)
def test_every_regime(name, rule, dtype, device):
    """Hidden states of one 1 each: the logits are the weight, and so are their gradients."""
    g = torch.Generator().manual_seed(7)
    head = Head(lengths=(13, 0, 25), vocab=1031, dtype=dtype, bias=True)
    n = len(head.hidden)
    logits = REGIMES[name](n, 1031, head.batch.labels, g).to(dtype)
    absent = logits.isinf().any(0)
    absent[head.batch.labels] = False
    head.hidden = torch.eye(n, dtype=dtype)
    head.weight = logits.masked_fill(logits.isinf(), -3.0).t().contiguous()
    head.bias = torch.zeros(1031, dtype=dtype).masked_fill(absent, -math.inf)
    head.near(g)
    head.to(device)
    out, grads = head.run(RULES[rule])
    eager, eager_grads = head.eager(RULES[rule])
    truth, truth_grads = head.eager(RULES[rule], torch.float64)
    size = logits.double().abs().nan_to_num(posinf=0).amax(-1) / RULES[rule].temperature + 1
    for k, scale in ((0, size.max()), (1, size), (2, size), (3, 1.0), (4, size.max())):
        numerics.assert_as_accurate(out[k].detach().cpu(), eager[k], truth[k], scale)
    logit_batch = head.batch.to("cpu").replace(logits=head.weight.cpu().t().masked_fill(absent, -math.inf)).double()
    slope = slopes(logit_batch, RULES[rule])
    dz = [x[1].cpu().t() for x in (grads, eager_grads, truth_grads)]
    numerics.assert_rows_as_accurate(dz[0], [dz[1]], dz[2], slope, size)
    # Finite unless the type has no such number, were the gradients of the logits exact but for their rounding.
    info, sums = torch.finfo(dtype), dz[2].abs() @ head.weight.cpu().double().abs()
    representable = truth_grads[0].abs() + info.eps * sums < info.max
    assert bool(grads[0].cpu()[representable].isfinite().all())
    assert bool(representable.all()) or dtype == torch.float16


def one_token(dtype, device, log_ratio=0.0, advantage=1.0, rule=None):
    """One token of a vocabulary of 16 with equal logits: loss, metrics, and the gradients of hidden and weight."""
    hidden = torch.ones(1, 4, dtype=dtype, device=device, requires_grad=True)
    weight = torch.zeros(16, 4, dtype=dtype, device=device, requires_grad=True)
    labels, cu = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor([0, 1], device=device)
    logp, _ = capo.linear_logprobs(hidden, weight, labels)
    credit = torch.tensor([advantage], device=device)
    out = capo.linear_policy_loss(hidden, weight, labels, credit, logp - log_ratio, cu, rule or LossRule())
    out.loss.backward()
    return out, hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_ratio_on_the_edge_is_not_clipped_and_beyond_it_is(sign, dtype, device):
    # The same hidden states give the same log-probability: the ratio is exactly 1, and widths of 0 put both edges there.
    rule = LossRule(clip_low=0.0, clip_high=0.0)
    for log_ratio, clipped in ((0.0, 0.0), (sign * 1e-3, 1.0), (-sign * 1e-3, 0.0)):  # the last is the pessimistic side
        out, _, grad = one_token(dtype, device, log_ratio, sign, rule)
        assert float(out.clip_fraction) == clipped and bool(grad.any()) == (clipped == 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("log_ratio", [200.0, -200.0, math.inf, -math.inf, 20.5, -20.5])
def test_extreme_ratios_stay_finite(log_ratio, dtype, device):
    for objective, advantage in itertools.product(("clip", "cispo"), (1.0, -1.0)):
        out, *grads = one_token(dtype, device, log_ratio, advantage, LossRule(objective=objective))
        assert bool(out.loss.isfinite()) and all(bool(grad.isfinite().all()) for grad in grads)
        assert objective == "cispo" or not grads[1].any()  # beyond the limit of the ratio


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("advantage", [0.0, -0.0, 1e-45, -1e-38, 1e-6, -1e3, 1e30])
def test_extreme_advantages(advantage, dtype, device):
    out, *grads = one_token(dtype, device, 0.1, advantage)
    assert bool(out.loss.isfinite())
    top, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    slope = abs(advantage) * math.exp(0.1)
    if slope < tiny:  # may round to 0
        assert all(float(grad.abs().max()) <= 2 * tiny for grad in grads)
        assert slope > 0 or not any(grad.any() for grad in grads)
    elif slope < top:
        expected = -slope * math.copysign(15 / 16, advantage)
        assert float(grads[1][0, 0]) == pytest.approx(expected, rel=torch.finfo(dtype).eps)
    else:  # more than the type holds: as any product in it, infinite and never NaN
        assert bool(grads[1].isinf().all())


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=IDS[:2])
@pytest.mark.parametrize("size", [1, 2, 7, 31, 64, 129])
@pytest.mark.parametrize("vocab", [1, 2, 3, 33, 1000, 4099])
def test_every_shape(vocab, size, dtype, device):
    check(Head(lengths=(25, 14), vocab=vocab, size=size, dtype=dtype, device=device), RULES["all"], names=())
    head = Head(lengths=(25, 14), vocab=vocab, size=size, dtype=torch.float32, device=device)
    _, grads = head.run(RULES["all"])
    _, truth = head.eager(RULES["all"], torch.float64)
    for mine, exact in zip(grads, truth, strict=True):
        torch.testing.assert_close(mine.cpu().double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=IDS[:2])
@pytest.mark.parametrize("chunks", [1, 4, 64])
def test_the_error_does_not_grow_with_the_number_of_chunks(chunks, dtype, device, small_chunks):
    head = Head(lengths=[128] * 16, vocab=67, size=40, dtype=dtype, device=device)
    rows = 2048 // chunks
    check(head, LossRule(), ("hidden", "weight", "bias"), {}, chunk_bytes=rows * 67 * dtype.itemsize)


# ---- the order and the size of things


BIT_RULES = ["default", "gspo", "gspo_token", "all"]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=IDS[:2])
@pytest.mark.parametrize("name", BIT_RULES)
def test_chunks_change_no_bit(name, dtype, device, small_chunks):
    head = Head(lengths=(70, 1, 0, 133, 40, 3), dtype=dtype, device=device)
    expected, (grad, *_) = head.run(RULES[name])
    for rows in (32, 64, 96, 128, 256):
        size = rows * 257 * dtype.itemsize
        out, (other, other_weight, _) = head.run(RULES[name], chunk_bytes=size)
        _, (_, same_weight, _) = head.run(RULES[name], chunk_bytes=size)
        assert torch.equal(same_weight, other_weight)  # bitwise from run to run
        if bitwise(device):
            assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True)), rows
            assert torch.equal(other, grad), rows
        else:
            check(head, RULES[name], reference_options={}, chunk_bytes=size)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=IDS[:2])
def test_a_row_does_not_depend_on_the_others(dtype, device, small_chunks):
    rule = LossRule(reduce="constant", constant=9.0, kl_coef=0.1, entropy_coef=0.01)
    head = Head(lengths=(70, 5, 60), dtype=dtype, device=device)
    expected, (grad, *_) = head.run(rule)
    for first, last in ((0, 70), (70, 75), (75, 135)):
        alone = Head(lengths=(last - first,), dtype=dtype, device=device)
        alone.hidden, alone.weight, alone.bias = head.hidden[first:last], head.weight, head.bias
        rows = (x[first:last] if x.shape[0] == 135 else x for x in head.batch.values() if x is not None)
        alone.batch = Batch(*rows).replace(cu_seqlens=lengths_to_cu([last - first]).to(device))
        out, (other, *_) = alone.run(rule)
        if bitwise(device):
            assert torch.equal(out.logprobs, expected.logprobs[first:last])
            assert torch.equal(other, grad[first:last])
        else:
            check(alone, rule)


def test_the_number_of_threads_changes_no_bit(device, small_chunks):
    head = Head(lengths=(70, 133), dtype=torch.bfloat16, device=device)
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2):
        torch.set_num_threads(number)
        try:
            out, (grad, *_) = head.run(RULES["all"], chunk_bytes=CHUNK)
        finally:
            torch.set_num_threads(threads)
        results.append((*out, grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.fixture
def products(monkeypatch, device):
    """Counts the rows of the logits, of the gradient of hidden and of that of weight that are computed."""
    if capo.backends.chosen(device.type) == "triton":
        pytest.skip("these are not PyTorch's products; test_triton_linear.py has the numbers of their rows")
    shapes = []

    def seen(function):
        def run(*args, **kwargs):
            a, b = args[-2:]
            shapes.append((a.shape[0], a.shape[1], b.shape[1]))
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "mm", seen(torch.mm))
    monkeypatch.setattr(torch, "addmm", seen(torch.addmm))

    def count(head, rule, **options):
        shapes.clear()
        head.run(rule, **options)
        (vocab, size), rows = head.weight.shape, [0, 0, 0]
        for m, k, n in shapes:
            rows[0] += m * ((k, n) == (size, vocab))
            rows[1] += m * ((k, n) == (vocab, size))
            rows[2] += k * ((m, n) == (vocab, size))
        return rows

    return count


def test_dead_and_clipped_rows_are_in_no_product(products, device):
    head = Head(lengths=(200, 200), device=device)
    keep = torch.zeros(400, dtype=torch.bool)
    keep[:96] = True
    full = head.batch.replace(mask=None, credit=torch.ones(400, device=device), old_logprobs=None)
    head.batch = full
    assert products(head, LossRule()) == [416, 416, 400]
    head.batch = full.replace(credit=keep.float().to(device))
    assert products(head, LossRule()) == [96, 96, 96]
    head.batch = full.replace(mask=keep.to(device))
    assert products(head, LossRule()) == [96, 96, 96]
    assert products(head, LossRule(ratio="sequence")) == [96, 96, 96]
    head.batch = full.replace(credit=keep.float().to(device))
    assert products(head, LossRule(entropy_coef=0.1)) == [416, 416, 400]
    logp, _ = capo.linear_logprobs(head.hidden, head.weight, head.batch.labels, bias=head.bias)
    head.batch = full.replace(old_logprobs=logp - torch.where(keep, 0.0, 1.0).to(device))
    assert products(head, LossRule()) == [416, 96, 96]
    head.batch = full.replace(old_logprobs=logp - 1)
    assert products(head, LossRule()) == [416, 0, 0]
    head.batch = full
    assert products(head, LossRule(), need=(True, False, False)) == [416, 416, 0]
    assert products(head, LossRule(), need=(False, True, False)) == [416, 0, 400]
    with torch.no_grad():
        assert products(head, LossRule()) == [416, 0, 0]


def test_a_sequence_ratio_needs_no_second_product_where_the_response_fits(products, device, small_chunks):
    head = Head(lengths=(64, 32, 96, 64), device=device, bias=False)
    head.batch = head.batch.replace(mask=None, credit=torch.ones(256, device=device), old_logprobs=None)
    rule = LossRule(ratio="sequence")
    assert products(head, rule, chunk_bytes=96 * 257 * 4) == [256, 256, 256]
    assert products(head, rule, chunk_bytes=64 * 257 * 4) == [256 + 96, 256, 256]


@pytest.mark.parametrize("name", ["default", "gspo", "gspo_token", "cispo", "dual", "entropy"])
def test_what_is_clipped_and_dead_changes_no_denominator(name, device, small_chunks):
    head = Head(lengths=(70, 33, 64), device=device)
    head.batch.credit[70:103] = 0.0
    check(head, RULES[name], chunk_bytes=CHUNK, reference_options={})


GRADIENTS = {
    "nowhere": [False] * 96, "in all chunks": [True] * 96, "not in the first chunk": [False] * 40 + [True] * 56,
    "in the first chunk": [True] * 20 + [False] * 76, "in the last chunk": [False] * 95 + [True],
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=IDS[:2])
@pytest.mark.parametrize("chunk", [32, 96])
@pytest.mark.parametrize("where", GRADIENTS)
def test_all_of_the_gradient_of_weight_is_written(where, chunk, dtype, device, small_chunks):
    """Memory for it has anything in it, here NaN; rows without a gradient are live and clipped."""
    head = Head(lengths=(70, 26), vocab=41, size=9, dtype=dtype, device=device)
    head.batch = head.batch.replace(mask=None, credit=torch.ones(96, device=device))
    head.batch.labels %= 37
    options = {"chunk_bytes": chunk * 37 * dtype.itemsize, "vocab_size": 37}
    logp, _ = capo.linear_logprobs(head.hidden, head.weight, head.batch.labels, bias=head.bias, vocab_size=37)
    clipped = ~torch.tensor(GRADIENTS[where], device=device)
    head.batch.old_logprobs = logp - clipped.float()
    out, grads = head.run(LossRule(), **options)
    assert float(out.clip_fraction) == pytest.approx(float(clipped.float().mean()))
    exact = Head(dtype=torch.float64)
    exact.hidden, exact.weight, exact.bias = head.hidden.double(), head.weight[:37].double(), head.bias[:37].double()
    exact.batch = head.batch.to("cpu").double()
    _, (_, truth, _) = exact.to("cpu").eager(LossRule())
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 1e-3}
    torch.testing.assert_close(grads[1][:37].cpu().double(), truth, **close)
    assert not grads[1][37:].any() and bool(grads[1].any()) == (where != "nowhere")


# ---- what broken rows may do


def test_poison_in_masked_rows_changes_nothing(device, small_chunks):
    head = Head(device=device)
    expected, grads = head.run(RULES["all"], chunk_bytes=CHUNK)
    masked = ~head.batch.mask
    for poison in (math.nan, math.inf, -math.inf):
        head.hidden[masked] = poison
        for x in (head.batch.credit, head.batch.old_logprobs, head.batch.ref_logprobs, head.batch.rollout_logprobs):
            x[masked] = poison
        count = int(masked.sum())
        head.batch.labels[masked] = torch.tensor([-1, -100, 257, 2**31, 2**63 - 1], device=device).repeat(count)[:count]
        out, others = head.run(RULES["all"], chunk_bytes=CHUNK)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


def test_nan_in_one_row_shows_and_stays_in_its_gradient(device):
    head = Head(device=device)
    row = int(head.batch.mask.nonzero()[2])
    head.batch.credit[row] = 1.0
    _, (clean, *_) = head.run(LossRule())
    head.hidden[row, 3] = math.nan
    out, (grad, weight, _) = head.run(LossRule())
    assert bool(out.loss.isnan()) and bool(out.logprobs[row].isnan()) and bool(grad[row].isnan().all())
    others = torch.arange(len(grad), device=device) != row
    assert torch.equal(grad[others], clean[others]) and bool(weight.isnan().any())


# ---- options of the head


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=IDS[:2])
@pytest.mark.parametrize("name", ["default", "all", "gspo"])
def test_softcap(name, dtype, device, small_chunks):
    head = Head(dtype=dtype, lengths=(70, 40))
    head.near(torch.Generator().manual_seed(1), softcap=2.5)
    head.to(device)
    check(head, RULES[name], reference_options={"softcap": 2.5}, softcap=2.5, chunk_bytes=CHUNK)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=IDS[:2])
@pytest.mark.parametrize("name", ["default", "entropy", "gspo"])
def test_a_temperature_for_each_row(name, dtype, device, small_chunks):
    rule = dataclasses.replace(RULES[name], temperature=1.0)
    head = Head(dtype=dtype, lengths=(70, 40))
    temperature = 0.5 + torch.rand(110)
    head.near(torch.Generator().manual_seed(1), temperature=temperature)
    head.to(device)
    options = {"temperature": temperature.to(device), "chunk_bytes": CHUNK}
    check(head, rule, reference_options={"temperature": temperature}, **options)
    if bitwise(device):
        alike, grads = head.run(rule, temperature=torch.full((110,), 0.75, device=device))
        other, other_grads = head.run(dataclasses.replace(rule, temperature=0.75))
        assert torch.equal(alike.loss, other.loss) and torch.equal(grads[0], other_grads[0])


@pytest.mark.parametrize("name", ["default", "all"])
def test_a_padded_vocabulary(name, device):
    head = Head(vocab=320, device=device)
    head.batch.labels %= 257
    expected = Head(vocab=257, device=device)
    expected.weight, expected.bias = head.weight[:257].clone(), head.bias[:257].clone()
    expected.hidden, expected.batch = head.hidden, head.batch
    head.weight[257:] = math.nan
    out, (hidden, weight, bias) = head.run(RULES[name], vocab_size=257)
    other, others = expected.run(RULES[name])
    assert torch.equal(out.loss, other.loss) and torch.equal(hidden, others[0])
    assert torch.equal(weight[:257], others[1]) and not weight[257:].any()
    assert torch.equal(bias[:257], others[2]) and not bias[257:].any()


def test_strides_change_nothing(device):
    head = Head(device=device, dtype=torch.float32)
    expected, grads = head.run(RULES["all"])
    n, size = head.hidden.shape
    wide = torch.full((n, 2 * size), math.nan, device=device)
    wide[:, ::2] = head.hidden
    hidden = wide[:, ::2].requires_grad_(True)
    tall = torch.full((2 * len(head.weight), size), math.nan, device=device)
    tall[1::2] = head.weight
    weight = tall[1::2].requires_grad_(True)
    across = head.weight.t().contiguous().t().requires_grad_(True)
    for x in (weight, across):
        out = capo.linear_policy_loss(hidden, x, rule=RULES["all"], bias=head.bias, **head.tokens())
        torch.testing.assert_close(out.loss, expected.loss)
        grad, weight_grad = torch.autograd.grad(out.loss, (hidden, x))
        torch.testing.assert_close(grad, grads[0])
        torch.testing.assert_close(weight_grad, grads[1])


def test_it_is_the_policy_loss_of_the_logits(device):
    head = Head(device=device, dtype=torch.bfloat16)
    for rule in RULES.values():
        out, _ = head.run(rule)
        logits = torch_linear(*head.leaves())
        expected = capo.policy_loss(logits, rule=rule, **head.tokens())
        for mine, theirs in zip(out, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)


# ---- autograd


@pytest.mark.parametrize("factor", [3.0, 0.0, -0.125])
def test_upstream_gradients_scale(factor, device):
    head = Head(device=device)
    _, expected = head.run(RULES["all"])
    leaves = [x.clone().requires_grad_(True) for x in head.leaves()]
    out = capo.linear_policy_loss(*leaves[:2], rule=RULES["all"], bias=leaves[2], **head.tokens())
    (out.loss * factor).backward()
    for x, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(x.grad, grad * factor, rtol=1e-6, atol=0)


def test_only_what_needs_a_gradient_gets_one(device):
    head = Head(device=device)
    _, full = head.run(RULES["all"])
    for need in itertools.product((True, False), repeat=3):
        out, grads = head.run(RULES["all"], need=need)
        assert out.loss.requires_grad == any(need)
        for grad, whole, wanted in zip(grads, full, need, strict=True):
            assert torch.equal(grad, whole) if wanted else grad is None


def test_a_tied_embedding_gets_the_sum_of_both_gradients(device):
    head = Head(device=device, bias=False)
    weight = head.weight.clone().requires_grad_(True)
    inputs = (head.batch.labels * 7) % len(weight)
    out = capo.linear_policy_loss(torch.nn.functional.embedding(inputs, weight), weight, **head.tokens())
    out.loss.backward()
    other = head.weight.double().requires_grad_(True)
    logits = LinearLogits(torch.nn.functional.embedding(inputs, other), other)
    tokens = head.tokens()
    tokens["advantages"] = tokens.pop("credit")
    capo.reference.policy_loss_terms(logits, rule=LossRule(), **tokens)[0].backward()
    torch.testing.assert_close(weight.grad.double(), other.grad, rtol=1e-5, atol=1e-7)


def test_accumulated_gradients_are_those_of_one_batch(device):
    rule = LossRule(reduce="constant", constant=60.0)
    head = Head(device=device)
    _, expected = head.run(rule)
    leaves = [x.clone().requires_grad_(True) for x in head.leaves()]
    cu = head.batch.cu_seqlens.tolist()
    for a, b in ((0, 2), (2, 5)):
        rows = slice(cu[a], cu[b])
        tokens = {k: x if k == "cu_seqlens" else x[rows] for k, x in head.tokens().items()}
        tokens["cu_seqlens"] = head.batch.cu_seqlens[a : b + 1] - cu[a]
        capo.linear_policy_loss(leaves[0][rows], leaves[1], rule=rule, bias=leaves[2], **tokens).loss.backward()
    if bitwise(device):
        assert torch.equal(leaves[0].grad, expected[0])
    check_gradients(head, rule, [x.grad for x in leaves])


def test_a_second_backward_is_right_or_refused(device):
    head = Head(device=device)
    hidden, weight = head.hidden.clone().requires_grad_(True), head.weight.clone().requires_grad_(True)
    out = capo.linear_policy_loss(hidden, weight, **head.tokens())
    first = torch.autograd.grad(out.loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(out.loss, (hidden, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    (grad,) = torch.autograd.grad(out.loss, hidden, retain_graph=True, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        grad.sum().backward()


def test_activation_checkpointing(device):
    head = Head(device=device)
    results = []
    for checkpointed in (False, True):
        base = head.hidden.clone().requires_grad_(True)
        weight = head.weight.clone().requires_grad_(True)

        def step(x, weight=weight):
            return capo.linear_policy_loss(x.tanh(), weight, rule=RULES["all"], **head.tokens()).loss

        loss = torch.utils.checkpoint.checkpoint(step, base, use_reentrant=False) if checkpointed else step(base)
        loss.backward()
        results.append((loss.detach(), base.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_is_that_of_a_linear_layer(device):
    head = Head(device=device)
    low = Head(device=device)
    low.hidden, low.weight, low.bias = (x.bfloat16() for x in head.leaves())
    expected, grads = low.run(RULES["all"])
    with torch.autocast(device.type, torch.bfloat16):
        out, others = head.run(RULES["all"])
    assert torch.equal(out.loss, expected.loss)
    for x, y in zip(others, grads, strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y.float())


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks_gives_the_same_bits(dynamic, device):
    def step(hidden, weight, bias, tokens, rule):
        return capo.linear_policy_loss(hidden * 2, weight, rule=rule, bias=bias, softcap=20.0, **tokens).loss / 3

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for seed, lengths in enumerate([(5, 3), (4, 4), (2, 9)]):
        head = Head(lengths=lengths, seed=seed, dtype=torch.bfloat16, device=device)
        results = []
        for function in (step, compiled):
            leaves = [x.clone().requires_grad_(True) for x in head.leaves()]
            loss = function(*leaves, head.tokens(), RULES["all"])
            loss.backward()
            results.append((loss.detach(), *(x.grad for x in leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck(device):
    head = Head(lengths=(3, 2), vocab=11, size=4, device=device)
    fields = ("labels", "credit", "old_logprobs", "cu_seqlens", "ref_logprobs", "mask", "rollout_logprobs")
    tokens = [getattr(head.batch, name) for name in fields]
    for need in ([True, True, True], [False, True, False], [False, False, False]):
        leaves = [x.detach().requires_grad_(wanted) for x, wanted in zip(head.leaves(), need, strict=True)]
        args = (*leaves, *tokens, None, need, 5.0, None, 1 << 20, None, None, *capo.ops._fields(LossRule(kl_coef=0.1)))
        torch.library.opcheck(torch.ops.capo.linear_policy_loss.default, args)


def test_a_credit_is_its_advantages(device):
    from batches import random_credit

    credit = random_credit(4)
    head = Head(lengths=credit.cu_seqlens.diff().tolist(), device=device)
    credit = capo.Credit(
        credit.outcomes.to(device), credit.votes.to(device), credit.steps.to(device), head.batch.cu_seqlens,
        credit.groups.to(device),
    )  # fmt: skip
    out, grads = head.run(LossRule(), credit=credit)
    other, others = head.run(LossRule(), credit=credit.advantages())
    assert torch.equal(out.loss, other.loss) and torch.equal(grads[0], others[0])


@pytest.mark.parametrize("name", ["default", "gspo", "all"])
def test_no_tokens_and_no_live_ones(name, device):
    for lengths in ((), (0,), (0, 0)):
        head = Head(lengths=lengths, device=device)
        out, grads = head.run(RULES[name])
        assert float(out.loss) == 0.0 and out.logprobs.shape == (0,) and grads[0].shape == (0, 48)
        assert not grads[1].any() and grads[1].shape == (257, 48)
    head = Head(device=device)
    out, grads = head.run(RULES[name], mask=torch.zeros_like(head.batch.mask))
    assert float(out.loss) == 0.0 and not any(x.any() for x in grads) and not out.logprobs.any()


# ---- memory


MEMORY = """
import sys, torch, capo
torch.set_num_threads(1)
N, H, V = 4096, 64, 32768
def peak():
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmHWM")) * 1024
def step(n, chunk):
    hidden = torch.ones(n, H, dtype=torch.bfloat16).requires_grad_(True)
    labels, cu = torch.zeros(n, dtype=torch.int64), torch.tensor([0, n // 2, n])
    loss = capo.linear_policy_loss(
        hidden, weight, labels, torch.ones(n), None, cu, capo.LossRule(ratio=sys.argv[1]), chunk_bytes=chunk
    ).loss
    loss.backward()
weight = torch.full((V, H), 0.01, dtype=torch.bfloat16).requires_grad_(True)
step(256, 1 << 30)  # what libraries take once
weight.grad = None
before = peak()
step(N, 16 << 20)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_memory_stays_below_the_bound(ratio):
    run = subprocess.run([sys.executable, "-P", "-c", MEMORY, ratio], capture_output=True, text=True, check=True)
    # Beyond the first step, whose chunk was as large: the sum of the gradient of weight in float32 and what libraries take.
    allowed = 32768 * 64 * 4 + (24 << 20)  # all logits have 256 MiB
    assert int(run.stdout) < allowed, f"{int(run.stdout) / 2**20:.0f} MiB where {allowed / 2**20:.0f} MiB are allowed"


# ---- refusals


def refused(message, device, rule=None, **changes):
    head = Head(lengths=(3, 2), vocab=11, size=4, device=device)
    args = {"hidden": head.hidden, "weight": head.weight, "bias": head.bias, **head.tokens(), **changes}
    with pytest.raises(ValueError, match=message):
        capo.linear_policy_loss(rule=rule or LossRule(), **args)


def test_bad_arguments_are_named(device):
    hidden, weight = torch.randn(5, 4, device=device), torch.randn(11, 4, device=device)
    refused(r"hidden must be float32, bfloat16 or float16 \[N, H\], got float64", device, hidden=hidden.double())
    refused(r"hidden must be .* got float32 \[4\]", device, hidden=hidden[0])
    refused(r"weight must be \[V, 4\] with V > 0, got float32 \[11, 3\]", device, weight=weight[:, :3])
    refused(r"weight must be \[V, 4\] with V > 0", device, weight=weight[:0])
    refused(r"weight must have the dtype and device of hidden", device, weight=weight.half())
    refused(r"bias must be \[11\], got float32 \[10\]", device, bias=torch.zeros(10, device=device))
    refused(r"bias must have the dtype and device of hidden", device, bias=torch.zeros(11, device=device).half())
    refused(r"labels must be int64 \[5\]", device, labels=torch.zeros(4, dtype=torch.int64, device=device))
    refused(r"credit \(advantages\) must be float \[5\]", device, credit=torch.zeros(2, device=device))
    refused(r"cu_seqlens must rise from 0 to 5", device, cu_seqlens=torch.tensor([0, 3, 6], device=device))
    refused(r"label 11 in row 2 is outside the vocabulary of 11", device,
            labels=torch.tensor([1, 2, 11, 3, 4], device=device), mask=None)  # fmt: skip
    refused(r"label 10 in row 2 is outside the vocabulary of 10", device,
            labels=torch.tensor([1, 2, 10, 3, 4], device=device), mask=None, vocab_size=10)  # fmt: skip
    refused(r"label -1 in row 0 is outside", device,
            labels=torch.tensor([-1, 2, 1, 3, 4], device=device), mask=None)  # fmt: skip
    refused(r"vocab_size must be 1 to 11, or None, got 12", device, vocab_size=12)
    refused(r"vocab_size must be 1 to 11, or None, got 0", device, vocab_size=0)
    refused(r"softcap must be finite and above 0, or None, got 0.0", device, softcap=0.0)
    refused(r"softcap must be .* got nan", device, softcap=math.nan)
    refused(r"chunk_bytes must be above 0, got 0", device, chunk_bytes=0)
    refused(r"temperature must be float \[5\]", device, temperature=torch.ones(4, device=device))
    refused(r"temperature must be finite and above 0, got 0.0 in row 3", device,
            temperature=torch.tensor([1, 1, 1, 0.0, 1], device=device))  # fmt: skip
    refused(r"rule.temperature=0.5; leave one", device, LossRule(temperature=0.5), temperature=torch.ones(5))
    refused(r"kl_coef=0.1 needs ref_logprobs", device, LossRule(kl_coef=0.1), ref_logprobs=None)
    refused(r"importance_cap needs rollout_logprobs", device, LossRule(importance_cap=2.0), rollout_logprobs=None)


def test_memory_of_chunks_is_kept_and_never_shared():
    from capo import native

    cpu = torch.device("cpu")
    with native.workspace(1 << 20, cpu) as first, native.workspace(1 << 20, cpu) as second:
        assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
        kept = second, first
    with native.workspace(1 << 19, cpu) as again:
        assert again.numel() == 1 << 19
        assert again.data_ptr() in [memory.data_ptr() for memory in kept]
    with torch.inference_mode(), native.workspace(1 << 21, cpu):
        pass
    head = Head(lengths=(5, 3))
    head.run(LossRule())  # in memory that was taken in inference mode


@pytest.fixture
def kept(monkeypatch):
    """The backend ``native``, which keeps memory of any size for the gradient of the weight."""
    native = pytest.importorskip("capo.native")
    monkeypatch.setattr(native, "_LARGE", 0)
    native.forget_memory()
    with capo.use_backend("native"):
        yield native._weight_gradient.pieces
    native.forget_memory()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=IDS[:2])
@pytest.mark.parametrize("chunk", [1, 1 << 30])
def test_memory_of_the_gradient_of_weight_is_taken_again_once_nobody_has_it(chunk, dtype, kept, small_chunks):
    head = Head(dtype=dtype)
    first = head.run(LossRule(), chunk_bytes=chunk)[1][1]
    part, before = first[3:5], first.clone()
    second = head.run(LossRule(), chunk_bytes=chunk)[1][1]
    assert second.data_ptr() != first.data_ptr() and torch.equal(first, second)
    address = second.data_ptr()
    del first, second
    assert head.run(LossRule(), chunk_bytes=chunk)[1][1].data_ptr() == address
    ((memory, _),) = kept
    memory[:] = 255  # NaN
    third = head.run(LossRule(), chunk_bytes=chunk)[1][1]
    assert third.data_ptr() == address and torch.equal(third, before) and torch.equal(part, before[3:5])


def test_kept_memory_has_the_strides_of_the_weight(kept):
    head = Head(bias=False)
    _, (_, expected, _) = head.run(LossRule())
    weight = head.weight.t().contiguous().t().requires_grad_(True)
    loss = capo.linear_policy_loss(head.hidden, weight, **head.tokens()).loss
    (grad,) = torch.autograd.grad(loss, weight)  # as it was made; that of .backward() may be a copy
    assert grad.stride() == (1, 257) and torch.equal(grad, expected)


def test_kept_memory_is_given_back_on_request_and_not_kept_where_it_is_far_too_large(kept):
    small, large = Head(lengths=(5, 3), vocab=11), Head(lengths=(5, 3))
    for head in (large, small):
        head.run(LossRule())
    ((memory, _),) = kept
    assert memory.nbytes == small.weight.nbytes
    capo.native.forget_memory()
    assert not kept
