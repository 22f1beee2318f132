"""policy_loss: every option against float64, in every regime of inputs, and the promises of its docstring."""

import dataclasses
import itertools
import math

import numerics
import pytest
import torch
from batches import (
    Batch,
    closed_form_gradient,
    credit_to,
    lengths_to_cu,
    random_batch,
    random_credit,
    reference,
    run,
    slopes,
)

import capo
from capo import LossRule
from capo.reference import label_logprobs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = ["float32", "bfloat16", "float16"]

RULES = {
    "default": LossRule(),
    "paper": LossRule.preset("paper"),
    "dapo": LossRule.preset("dapo"),
    "gspo": LossRule(ratio="sequence", clip_low=0.02, clip_high=0.03),
    "gspo_token": LossRule(ratio="sequence_token", clip_low=0.02, clip_high=0.03, reduce="token_mean"),
    "cispo": LossRule.preset("cispo"),
    "dr_grpo": LossRule(reduce="constant", constant=17.0),
    "dual": LossRule(clip_dual=1.5, clip_low=0.1, clip_high=0.3),
    "entropy": LossRule(entropy_coef=0.01, temperature=0.7),
    "k1": LossRule(kl_coef=0.1, kl="k1"),
    "k2": LossRule(kl_coef=0.1, kl="k2", temperature=1.5),
    "importance": LossRule(importance_cap=1.2),
    "all": LossRule(
        clip_low=0.1, clip_high=0.4, clip_dual=2.0, reduce="token_mean", kl_coef=0.05, kl="k3", entropy_coef=0.003,
        temperature=0.9, importance_cap=2.0,
    ),
}  # fmt: skip


def check(batch: Batch, rule: LossRule, device) -> None:
    """Loss, metrics and gradient of the backend against float64, no worse than twice eager PyTorch."""
    out, grad = run(batch.to(device), rule)
    out, grad = [x.detach().cpu() for x in out], grad.cpu()
    eager, eager_grad = reference(batch, rule)
    truth, truth_grad = reference(batch.double(), rule)
    size = batch.logits.double().abs().nan_to_num(posinf=0).amax(-1) / rule.temperature + 1
    assert grad.dtype == batch.logits.dtype
    closed_form = closed_form_gradient(batch, rule).to(grad.dtype)
    numerics.assert_rows_as_accurate(grad, [eager_grad, closed_form], truth_grad, slopes(batch.double(), rule), size)
    # What log-probability, entropy, loss and KL are computed from has the size of the logits.
    for k, scale in ((0, size.max()), (1, size), (2, size), (3, 1.0), (4, size.max())):
        numerics.assert_as_accurate(out[k], eager[k], truth[k], scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("name", RULES)
def test_every_option(name, dtype, device):
    check(random_batch(lengths=(20, 1, 0, 25, 14), dtype=dtype), RULES[name], device)


def test_importance_on_policy(device):
    check(random_batch().replace(old_logprobs=None), RULES["importance"], device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=IDS[1:])
def test_gradients_are_rounded_to_nearest(dtype, device):
    batch = random_batch(dtype=dtype).replace(mask=None)
    rule = LossRule(reduce="constant", constant=1e-3)
    _, grad = run(batch.to(device), rule)
    _, truth = reference(batch.double(), rule)
    info = torch.finfo(dtype)
    allowed = 0.55 * info.eps * truth.abs() + info.smallest_normal * info.eps
    assert bool(((grad.cpu().double() - truth).abs() <= allowed).all())


@pytest.mark.parametrize(
    ("ratio", "reduce", "kl", "entropy", "objective", "cap", "dual"),
    [
        case
        for case in itertools.product(
            ("token", "sequence", "sequence_token"), ("sequence_mean", "token_mean", "constant"),
            (None, "k1", "k2", "k3"), (0.0, 0.02), ("clip", "cispo"), (None, 1.5), (None, 1.3),
        )
        if not (case[4] == "cispo" and case[6])
    ],
)  # fmt: skip
def test_every_combination_equals_the_reference(ratio, reduce, kl, entropy, objective, cap, dual, device):
    rule = LossRule(
        ratio=ratio, reduce=reduce, constant=7.0 if reduce == "constant" else None, kl_coef=0.1 if kl else 0.0,
        kl=kl or "k3", entropy_coef=entropy, objective=objective, importance_cap=cap, clip_dual=dual, temperature=0.8,
    )  # fmt: skip
    batch = random_batch(lengths=(3, 0, 4, 2), vocab=37)
    out, grad = run(batch.to(device), rule)
    truth, truth_grad = reference(batch.double(), rule)
    for mine, exact in zip(out, truth, strict=True):
        torch.testing.assert_close(mine.detach().cpu().double(), exact, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(grad.cpu().double(), truth_grad, rtol=2e-5, atol=2e-8)


@pytest.mark.parametrize("name", RULES)
def test_closed_form_gradient_of_the_reference_is_that_of_autograd(name):
    batch = random_batch(vocab=53).double()
    _, expected = reference(batch, RULES[name])
    actual = closed_form_gradient(batch, RULES[name])
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-14)


def test_gradcheck_of_the_reference():
    batch = random_batch(lengths=(2, 3), vocab=5).double()
    rest = vars(batch)
    logits = rest.pop("logits").requires_grad_(True)
    rest["advantages"] = rest.pop("credit")
    rule = LossRule(kl_coef=0.1, entropy_coef=0.02, temperature=0.7)
    assert torch.autograd.gradcheck(lambda z: capo.reference.policy_loss_terms(z, rule=rule, **rest)[0], logits)


# ---- regimes of inputs


def confident(p: float):
    def logits(n, vocab, labels, g):
        z = 0.1 * torch.randn(n, vocab, generator=g)
        others = z.scatter(1, labels[:, None], -math.inf).logsumexp(1)
        return z.scatter(1, labels[:, None], (others + math.log(p / (1 - p)))[:, None])

    return logits


def unlikely_label(n, vocab, labels, g):
    z = torch.randn(n, vocab, generator=g)
    return z.scatter(1, labels[:, None], z.amin(1, keepdim=True) - 8)


def mostly_minus_infinity(n, vocab, labels, g):
    z = torch.randn(n, vocab, generator=g)
    z[torch.rand(n, vocab, generator=g) > 0.1] = -math.inf
    return z.scatter(1, labels[:, None], 1.0)


def first_tiles_minus_infinity(n, vocab, labels, g):
    z = torch.randn(n, vocab, generator=g)
    z[:, : vocab // 2] = -math.inf
    return z.scatter(1, labels[:, None], 0.5)


def spike_behind_the_first_tile(n, vocab, labels, g):
    z = torch.randn(n, vocab, generator=g)
    z[:, -3] = 40.0
    return z


REGIMES = {
    "normal": lambda n, vocab, labels, g: torch.randn(n, vocab, generator=g),
    "confident 0.9": confident(0.9),
    "confident 0.99": confident(0.99),
    "confident 0.999": confident(0.999),
    "confident 1-1e-6": confident(1 - 1e-6),
    "uniform": lambda n, vocab, labels, g: torch.zeros(n, vocab),
    "one-hot": lambda n, vocab, labels, g: torch.full((n, vocab), -100.0).scatter(1, labels[:, None], 100.0),
    "unlikely label": unlikely_label,
    "huge": lambda n, vocab, labels, g: 1e4 * torch.randn(n, vocab, generator=g).clamp(-3, 3),
    "far below zero": lambda n, vocab, labels, g: torch.randn(n, vocab, generator=g) - 2e4,
    "near the largest half": lambda n, vocab, labels, g: (
        65504.0 - 64.0 * torch.rand(n, vocab, generator=g).mul(8).round()
    ),
    "mostly -inf": mostly_minus_infinity,
    "first tiles -inf": first_tiles_minus_infinity,
    "spike": spike_behind_the_first_tile,
}


def regime_batch(name, dtype, vocab, lengths=(13, 0, 25)) -> Batch:
    g = torch.Generator().manual_seed(7)
    batch = random_batch(lengths=lengths, vocab=vocab, dtype=dtype, seed=3)
    n = len(batch.labels)
    logits = REGIMES[name](n, vocab, batch.labels, g).to(dtype)
    logp = logits.float().log_softmax(-1).gather(-1, batch.labels[:, None])[:, 0]

    def near():  # away from the edges of the clip range, where the last bit of logp decides
        return logp + torch.tensor([-0.5, -0.05, 0.05, 0.5])[torch.randint(0, 4, (n,), generator=g)]

    return batch.replace(logits=logits, old_logprobs=near(), ref_logprobs=near(), rollout_logprobs=near())


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("rule", ["default", "all"])
@pytest.mark.parametrize("name", REGIMES)
def test_every_regime(name, rule, dtype, device):
    check(regime_batch(name, dtype, vocab=4099), RULES[rule], device)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("vocab", [1, 2, 3, 31, 32, 33, 64, 127, 1000, 8191, 8192, 16384, 16385, 151_643, 262_145])
def test_every_size_of_vocabulary(vocab, dtype, device):
    lengths = (5, 4) if vocab > 10_000 else (25, 14)
    check(random_batch(lengths=lengths, vocab=vocab, dtype=dtype, seed=vocab), RULES["all"], device)
    check(random_batch(lengths=lengths, vocab=vocab, dtype=dtype, seed=vocab), RULES["default"], device)


def test_the_gradient_of_the_true_class_survives_in_confident_rows(device):
    # 1 - p of the label, in the type of the logits: the place where a difference of rounded numbers would be 0.
    for dtype, gap in itertools.product(DTYPES, (3.0, 6.0, 9.0, 12.0)):
        logits = torch.zeros(1, 4096, dtype=dtype)
        logits[0, 5] = gap + math.log(4095)
        batch = Batch(logits, torch.tensor([5]), torch.ones(1), None, torch.tensor([0, 1]), None, None, None)
        _, grad = run(batch.to(device), LossRule())
        rest = 1 / (1 + math.exp(float(logits[0, 5])) / 4095)
        # Eager PyTorch goes through the log of the sum, which is rounded at the size of the logit.
        lost = (1.1e-6 if capo.backends.chosen(device.type) == "native" else 8e-6) / rest
        assert float(grad[0, 5]) == pytest.approx(-rest, rel=2 * torch.finfo(dtype).eps + lost)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("level", [0.0, 777.0, 50_016.0, -60_000.0])
def test_the_entropy_of_a_uniform_row_has_no_gradient_wherever_its_logits_lie(level, dtype, device):
    logits = torch.full((2, 40), level).to(dtype)
    batch = Batch(logits, torch.tensor([3, 5]), torch.zeros(2), None, torch.tensor([0, 2]), None, None, None)
    _, grad = run(batch.to(device), LossRule(entropy_coef=1.0, reduce="constant", constant=0.1))
    # Plain PyTorch rounds the scaled logits at their own size.
    lost = 0.0 if capo.backends.chosen(device.type) == "native" else abs(level) * 2.0**-23
    assert float(grad.abs().max()) <= 1e-6 + lost


# ---- edges of the ratio


def one_token(device, log_ratio=0.0, advantage=1.0, vocab=16):
    logits = torch.zeros(1, vocab, device=device)
    logp, _ = capo.logprobs(logits, torch.zeros(1, dtype=torch.int64, device=device))
    return Batch(
        logits, torch.zeros(1, dtype=torch.int64), torch.tensor([advantage]), logp - log_ratio, torch.tensor([0, 1]),
        None, None, None,
    ).to(device)  # fmt: skip


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_ratio_on_the_edge_is_not_clipped_and_beyond_it_is(sign, device):
    # On-policy the ratio is exactly 1; widths of 0 put both edges there.
    batch = one_token(device, advantage=sign).replace(old_logprobs=None)
    out, grad = run(batch, LossRule(clip_low=0.0, clip_high=0.0))
    assert float(out.clip_fraction) == 0.0 and bool(grad.any())
    beyond = one_token(device, log_ratio=sign * 1e-3, advantage=sign)
    out, grad = run(beyond, LossRule(clip_low=0.0, clip_high=0.0))
    assert float(out.clip_fraction) == 1.0 and not grad.any()
    assert float(out.loss) == -sign
    inside = one_token(device, log_ratio=-sign * 1e-3, advantage=sign)  # the pessimistic side is never clipped
    out, grad = run(inside, LossRule(clip_low=0.0, clip_high=0.0))
    assert float(out.clip_fraction) == 0.0 and bool(grad.any())


def test_the_dual_clip_leaves_good_tokens_alone(device):
    out, grad = run(one_token(device, log_ratio=0.5, advantage=1.0), LossRule(clip_high=1.0, clip_dual=1.1))
    assert float(out.clip_fraction) == 0.0 and bool(grad.any())
    assert float(out.loss) == pytest.approx(-math.exp(0.5), rel=1e-5)


@pytest.mark.parametrize("log_ratio", [200.0, -200.0, math.inf, -math.inf, 20.5, -20.5])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("objective", ["clip", "cispo"])
def test_extreme_ratios_stay_finite(log_ratio, advantage, objective, device):
    out, grad = run(one_token(device, log_ratio, advantage), LossRule(objective=objective))
    assert bool(out.loss.isfinite()) and bool(grad.isfinite().all())
    limited = math.exp(max(min(log_ratio, 20.0), -20.0))
    if objective == "clip":
        assert not grad.any()
        if advantage > 0:
            assert float(out.loss) == pytest.approx(-min(limited, 1.2), rel=1e-5)
        else:
            assert float(out.loss) == pytest.approx(max(limited, 0.8), rel=1e-5)


@pytest.mark.parametrize("advantage", [0.0, -0.0, 1e-38, -1e-45, 1e30])
def test_extreme_advantages(advantage, device):
    out, grad = run(one_token(device, 0.1, advantage), LossRule())
    assert bool(out.loss.isfinite()) and bool(grad.isfinite().all())
    assert bool(grad.any()) == (abs(advantage) > 1e-40) or advantage == -1e-45  # its gradient may round to 0


def test_half_precision_at_its_limits_and_a_small_temperature(device):
    logits = torch.full((2, 300), -65504.0, dtype=torch.float16)
    logits[:, 7] = 65504.0
    batch = random_batch(lengths=(2,), vocab=300)
    batch = batch.replace(logits=logits, labels=torch.tensor([7, 8]), mask=None, credit=torch.ones(2))
    rule = LossRule(temperature=0.01)
    out, grad = run(batch.replace(old_logprobs=None).to(device), rule)
    assert bool(grad.isfinite().all())
    assert float(out.logprobs[0]) == 0.0 and float(out.logprobs[1]) == pytest.approx(-131008 / 0.01, rel=1e-6)


# ---- what masked, dead and broken rows may do


def test_poison_in_masked_rows_changes_nothing(device):
    batch = random_batch()
    clean_out, clean_grad = run(batch.to(device), RULES["all"])
    masked = ~batch.mask
    for poison in (math.nan, math.inf, -math.inf):
        bad = Batch(*(x.clone() if isinstance(x, torch.Tensor) else x for x in batch.values()))
        for x in (bad.logits, bad.credit, bad.old_logprobs, bad.ref_logprobs, bad.rollout_logprobs):
            x[masked] = poison
        bad.labels[masked] = torch.tensor([-1, -100, 257, 2**31, 2**63 - 1])[torch.arange(int(masked.sum())) % 5]
        out, grad = run(bad.to(device), RULES["all"])
        assert all(torch.equal(a, b) for a, b in zip(out, clean_out, strict=True))
        assert torch.equal(grad, clean_grad)


def test_nan_in_one_row_stays_there(device):
    batch = random_batch(vocab=5000)
    row = int(batch.mask.nonzero()[2])
    batch.credit[row] = 1.0
    _, clean = run(batch.to(device), LossRule())
    for where, poison in itertools.product((0, 2500, 4999), (math.nan, math.inf)):
        bad = batch.replace(logits=batch.logits.clone())
        bad.logits[row, where] = poison
        out, grad = run(bad.to(device), LossRule())
        assert bool(out.loss.isnan()) and bool(out.logprobs[row].isnan()) and bool(grad[row].isnan().all())
        others = torch.arange(len(batch.labels), device=device) != row
        assert torch.equal(grad[others], clean[others]) and bool(out.logprobs[others].isfinite().all())


def test_a_row_of_minus_infinity_is_nan_and_harmless_if_masked(device):
    batch = random_batch()
    row = int(batch.mask.nonzero()[0])
    batch.credit[row] = 1.0
    batch.logits[row] = -math.inf
    out, _ = run(batch.to(device), LossRule())
    assert bool(out.loss.isnan()) and bool(out.logprobs[row].isnan())
    mask = batch.mask.clone()
    mask[row] = False
    out, grad = run(batch.replace(mask=mask).to(device), LossRule())
    assert bool(out.loss.isfinite()) and bool(grad.isfinite().all())


@pytest.mark.parametrize("on_policy", [False, True])
def test_a_label_of_probability_zero_has_no_gradient_through_the_ratio(on_policy, device):
    batch = random_batch(lengths=(3,)).replace(mask=None, credit=torch.ones(3))
    batch.logits[1, batch.labels[1]] = -math.inf
    if on_policy:
        batch = batch.replace(old_logprobs=None)
    out, grad = run(batch.to(device), LossRule())
    assert float(out.logprobs[1]) == -math.inf and bool(out.loss.isfinite())
    assert not grad[1].any() and bool(grad[0].any()) and bool(grad.isfinite().all())


@pytest.mark.parametrize("ratio", ["sequence", "sequence_token"])
def test_a_label_of_probability_zero_has_no_gradient_through_the_ratio_of_its_response(ratio, device):
    batch = random_batch(lengths=(3,)).replace(mask=None, credit=torch.ones(3), old_logprobs=None)
    batch.logits[1, batch.labels[1]] = -math.inf
    _, grad = run(batch.to(device), LossRule(ratio=ratio))
    assert not grad[1].any() and bool(grad[0].any()) and bool(grad.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("name", ["default", "entropy"])
def test_logits_of_minus_infinity_have_gradient_zero(name, dtype, device):
    batch = random_batch(vocab=300, dtype=dtype).replace(mask=None, credit=torch.ones(19))
    impossible = torch.rand(19, 300) < 0.3
    impossible[torch.arange(19), batch.labels] = False
    batch.logits[impossible] = -math.inf
    _, grad = run(batch.to(device), RULES[name])
    assert not grad.cpu()[impossible].any() and bool(grad.any())


def test_nan_shows_in_the_loss_on_policy(device):
    batch = random_batch().replace(mask=None, credit=torch.ones(19), old_logprobs=None)
    batch.logits[4, 9] = math.nan
    out, grad = run(batch.to(device), LossRule())
    assert bool(out.loss.isnan()) and bool(grad[4].isnan().all()) and bool(grad[5:].isfinite().all())


@pytest.mark.parametrize("name", RULES)
def test_all_masked(name, device):
    batch = random_batch().replace(mask=torch.zeros(19, dtype=torch.bool))
    out, grad = run(batch.to(device), RULES[name])
    assert all(not x.any() for x in out) and not grad.any()


@pytest.mark.parametrize("name", ["default", "dapo", "dr_grpo"])
def test_dead_tokens_are_not_read_and_still_count_in_the_denominator(name, device):
    batch = random_batch().replace(mask=None)
    dead = batch.credit == 0
    assert 0 < int(dead.sum()) < len(dead)
    expected, expected_grad = reference(batch.double(), RULES[name])
    batch.logits[dead] = math.nan
    out, grad = run(batch.to(device), RULES[name])
    assert float(out.loss) == pytest.approx(float(expected[0]), rel=1e-5)
    assert not grad[dead].any() and not out.logprobs[dead].any() and not out.entropy[dead].any()
    torch.testing.assert_close(grad[~dead].cpu().double(), expected_grad[~dead.cpu()], rtol=1e-4, atol=1e-8)


def test_with_kl_or_entropy_no_unmasked_token_is_dead(device):
    batch = random_batch().replace(credit=torch.zeros(19), mask=None)
    for rule in (LossRule(kl_coef=0.1), LossRule(entropy_coef=0.1)):
        _, grad = run(batch.to(device), rule)
        assert bool(grad.any(-1).all())
    _, grad = run(batch.to(device), LossRule())
    assert not grad.any()


# ---- promises: bits


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_a_row_does_not_depend_on_the_batch(dtype, device):
    batch = random_batch(lengths=(6, 5), vocab=3001, dtype=dtype).replace(mask=None)
    batch.logits[4, 100:] = -math.inf  # other rows must not notice
    batch.labels[4] = 3
    rule = LossRule(reduce="constant", constant=1.0, entropy_coef=0.01)
    batch = batch.to(device)
    out, grad = run(batch, rule)
    for row in range(11):
        alone = Batch(
            *(x[row : row + 1] for x in batch.values()[:4]), torch.tensor([0, 1], device=device), None, None, None
        )
        own, own_grad = run(alone, rule)
        assert torch.equal(own_grad[0], grad[row])
        assert float(own.logprobs) == float(out.logprobs[row]) and float(own.entropy) == float(out.entropy[row])


def test_bits_do_not_depend_on_threads_or_repetition(device):
    batch = random_batch(lengths=(40, 1, 0, 30), vocab=2049, dtype=torch.bfloat16).to(device)
    expected, expected_grad = run(batch, RULES["all"])
    threads = torch.get_num_threads()
    try:
        repeats = 2 if capo.backends.chosen(device.type) == "torch" else 30  # nothing of ours can race in plain PyTorch
        for number in (1, 2, 3, 16, *([2] * repeats)):
            torch.set_num_threads(number)
            out, grad = run(batch, RULES["all"])
            assert torch.equal(grad, expected_grad)
            assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_on_policy_equals_old_logprobs_of_the_same_kernel_bit_for_bit(device):
    batch = random_batch().replace(mask=None).to(device)
    rule = LossRule(temperature=0.8)
    logp, _ = capo.logprobs(batch.logits, batch.labels, temperature=0.8)
    out, grad = run(batch.replace(old_logprobs=None), rule)
    other, other_grad = run(batch.replace(old_logprobs=logp), rule)
    assert torch.equal(out.loss, other.loss) and torch.equal(grad, other_grad)
    assert float(out.clip_fraction) == 0.0


# ---- promises: layout, autograd, compile


def test_strided_logits(device):
    batch = random_batch(vocab=300, dtype=torch.bfloat16).to(device)
    expected, expected_grad = run(batch, RULES["all"])
    wide = torch.full((19, 351), math.nan, dtype=torch.bfloat16, device=device)
    for first in (0, 1, 7, 51):  # misaligned rows
        view = wide[:, first : first + 300]
        view.copy_(batch.logits)
        leaf = wide.clone().requires_grad_(True)
        out = capo.policy_loss(rule=RULES["all"], **{**vars(batch), "logits": leaf[:, first : first + 300]})
        out.loss.backward()
        assert torch.equal(out.loss, expected.loss) and torch.equal(leaf.grad[:, first : first + 300], expected_grad)
        wide.fill_(math.nan)
    expanded = batch.logits[:1].expand(19, 300)
    out, grad = run(batch.replace(logits=expanded), LossRule())
    again, again_grad = run(batch.replace(logits=expanded.contiguous()), LossRule())
    assert torch.equal(out.loss, again.loss) and torch.equal(grad, again_grad)


def test_beyond_two_to_the_31_elements_and_strides(device):
    # Rows lie 2^27 elements apart in memory that is never touched but at the rows: the last one starts beyond 2^31.
    rows, vocab, stride = 20, 50, 2**27
    storage = torch.empty(0, dtype=torch.bfloat16, device=device).set_(
        torch.UntypedStorage(2 * (rows * stride), device=device)
        if device.type == "cuda"
        else _lazy_storage(2 * rows * stride)
    )
    logits = storage.as_strided((rows, vocab), (stride, 1))
    batch = (
        random_batch(lengths=(rows,), vocab=vocab, dtype=torch.bfloat16)
        .replace(mask=None, credit=torch.ones(rows))
        .to(device)
    )
    logits.copy_(batch.logits)
    with torch.no_grad():
        out = capo.policy_loss(**{**vars(batch), "logits": logits})
        expected = capo.policy_loss(**vars(batch))
        pair = capo.logprobs(logits, batch.labels), capo.logprobs(batch.logits, batch.labels)
    assert torch.equal(out.loss, expected.loss) and torch.equal(out.logprobs, expected.logprobs)
    assert torch.equal(pair[0][0], pair[1][0]) and torch.equal(pair[0][1], pair[1][1])
    # The gradient, over the logits; without autograd, which would make a tensor of the same strides.
    rest = batch.labels, batch.credit, batch.old_logprobs, batch.cu_seqlens, batch.ref_logprobs, batch.mask
    torch.ops.capo.policy_loss_(logits, *rest, batch.rollout_logprobs, True, *capo.ops._fields(LossRule()))
    _, grad = run(batch, LossRule())
    assert torch.equal(logits, grad) and bool(grad[-1].any())


@pytest.mark.parametrize("elements", [2**31 - 2**16, 2**31, 2**31 + 2**16])
def test_two_to_the_31_logits(elements, device):
    """Contiguous, in memory that is never touched but at the last rows: all others are masked, and not read."""
    if device.type == "cuda":
        pytest.skip("would take the memory")
    vocab, live = 2**16, 3
    rows = elements // vocab
    logits = torch.empty(0, dtype=torch.bfloat16).set_(_lazy_storage(2 * elements)).view(rows, vocab)
    logits[-live:] = random_batch(lengths=(live,), vocab=vocab, dtype=torch.bfloat16).logits
    labels = torch.full((rows,), -100)
    labels[-live:] = vocab - 1
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[-live:] = True
    with torch.no_grad():
        out = capo.policy_loss(logits, labels, torch.ones(rows), None, torch.tensor([0, rows]), LossRule(), mask=mask)
    rows = logits[-live:].clone(), labels[-live:]
    eager, truth = (label_logprobs(x, rows[1], 1.0)[0] for x in (rows[0], rows[0].double()))
    numerics.assert_as_accurate(out.logprobs[-live:], eager, truth)
    assert not out.logprobs[:-live].any() and bool(out.loss.isfinite())


def _lazy_storage(num_bytes):
    import mmap

    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8).untyped_storage()


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("name", ["default", "all", "gspo"])
def test_inplace_gives_the_same_bits_in_the_memory_of_the_logits(name, dtype, device):
    batch = random_batch(dtype=dtype).to(device)
    expected, expected_grad = run(batch, RULES[name])
    leaf = batch.logits.clone().requires_grad_(True)
    logits = leaf * 1
    address = logits.data_ptr()
    out = capo.policy_loss(rule=RULES[name], inplace=True, **{**vars(batch), "logits": logits})
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert torch.equal(out.loss, expected.loss) and torch.equal(grad, expected_grad)
    assert grad.data_ptr() == address


def test_inplace_is_noticed_by_whoever_saved_the_logits(device):
    batch = random_batch().to(device)
    leaf = batch.logits.clone().requires_grad_(True)
    logits = leaf.exp()  # exp saves its result for its backward
    out = capo.policy_loss(**{**vars(batch), "logits": logits}, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_inplace_refuses_rows_that_share_memory(device):
    batch = random_batch(lengths=(3,)).to(device)
    logits = batch.logits[:1].clone().requires_grad_(True).expand(3, -1)
    with pytest.raises(ValueError, match="inplace.*overlap"):
        capo.policy_loss(**{**vars(batch), "logits": logits}, inplace=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("factor", [3.0, 0.0, -0.125])
def test_upstream_gradients_scale(factor, inplace, device):
    batch = random_batch().to(device)
    _, expected = run(batch, RULES["all"])
    logits = batch.logits.clone().requires_grad_(True)
    out = capo.policy_loss(rule=RULES["all"], **{**vars(batch), "logits": logits * 1}, inplace=inplace)
    (out.loss * factor).backward()
    torch.testing.assert_close(logits.grad, expected * factor, rtol=1e-6, atol=0)


def test_a_second_backward_is_right_or_refused(device):
    batch = random_batch().to(device)
    logits = batch.logits.clone().requires_grad_(True)
    out = capo.policy_loss(**{**vars(batch), "logits": logits})
    out.loss.backward(retain_graph=True)
    first = logits.grad.clone()
    logits.grad = None
    out.loss.backward(retain_graph=True)
    assert torch.equal(logits.grad, first)
    (2 * out.loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (2 * out.loss).backward()


def test_without_grad_mode_there_is_no_gradient_and_the_same_loss(device):
    batch = random_batch().to(device)
    expected, _ = run(batch, RULES["all"])
    before = batch.logits.clone()
    with torch.no_grad():
        out = capo.policy_loss(
            rule=RULES["all"], inplace=True, **{**vars(batch), "logits": batch.logits.requires_grad_()}
        )
    assert torch.equal(out.loss, expected.loss) and not out.loss.requires_grad
    assert torch.equal(batch.logits, before)
    assert not any(x.requires_grad for x in expected[1:])


def test_autocast_changes_nothing(device):
    batch = random_batch().to(device)
    expected, expected_grad = run(batch, RULES["all"])
    with torch.autocast(device.type, torch.bfloat16):
        out, grad = run(batch, RULES["all"])
    assert torch.equal(out.loss, expected.loss) and torch.equal(grad, expected_grad)


# Inductor once: with static shapes it would compile each of them, which takes most of a minute.
@pytest.mark.parametrize(("dynamic", "compiler"), [(False, "aot_eager"), (True, "inductor")])
def test_compile_without_graph_breaks_gives_the_same_bits(dynamic, compiler, device):
    def step(logits, rest, rule):
        return capo.policy_loss(logits, rule=rule, **rest).loss * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for seed, lengths in enumerate([(5, 3), (4, 4), (2, 9)]):
        rest = dict(vars(random_batch(lengths=lengths, seed=seed).to(device)))
        given = rest.pop("logits")
        results = []
        for function in (step, compiled):
            logits = given.clone().requires_grad_(True)
            loss = function(logits, rest, RULES["all"])
            loss.backward()
            results.append((loss.detach(), logits.grad))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_compile_with_a_credit(device):
    credit = random_credit(4)
    n = int(credit.cu_seqlens[-1])
    logits = torch.randn(n, 64, requires_grad=True)
    labels = torch.randint(0, 64, (n,))

    def step(logits):
        return capo.policy_loss(logits, labels, credit, None, credit.cu_seqlens).loss

    expected = torch.autograd.grad(step(logits), logits)[0]
    actual = torch.autograd.grad(torch.compile(step, fullgraph=True)(logits), logits)[0]
    assert torch.equal(actual, expected)


def test_opcheck(device):
    batch = random_batch(lengths=(3, 2), vocab=11).to(device)
    for rule in (LossRule(), RULES["all"]):
        args = (
            batch.logits.requires_grad_(True), batch.labels, batch.credit, batch.old_logprobs, batch.cu_seqlens,
            batch.ref_logprobs, batch.mask, batch.rollout_logprobs, True, *capo.ops._fields(rule),
        )  # fmt: skip
        torch.library.opcheck(torch.ops.capo.policy_loss.default, args)
        torch.library.opcheck(torch.ops.capo.policy_loss_.default, (batch.logits.detach().clone(), *args[1:]))
    batch = credit_batch(4, device)
    args = list(args)
    args[0], args[1], args[3:9] = batch.logits.requires_grad_(True), batch.labels, (*batch.values()[3:], True)
    credit = (*capo.ops._credit_tensors(batch.credit, batch.cu_seqlens), *capo.ops._fields(batch.credit.rule))
    args = (*args[:2], None, *args[3:], None, *credit)
    torch.library.opcheck(torch.ops.capo.policy_loss.default, args)
    torch.library.opcheck(torch.ops.capo.policy_loss_.default, (batch.logits.detach().clone(), *args[1:]))
    rows = capo.live_rows(batch.credit, rule, batch.mask)
    args = (batch.logits[rows].detach().requires_grad_(True), *args[1:21], rows, *args[22:])
    torch.library.opcheck(torch.ops.capo.policy_loss.default, args)
    torch.library.opcheck(torch.ops.capo.policy_loss_.default, (args[0].detach().clone(), *args[1:]))
    torch.library.opcheck(torch.ops.capo.logprobs.default, (batch.logits.detach(), batch.labels, 0.7, batch.mask))


CREDIT_RULES = {
    **{name: capo.CreditRule.preset(name) for name in ("capo", "grpo", "rloo", "grpo_process", "vppo", "fapo", "papo")},
    **{vote: capo.CreditRule(vote=vote) for vote in ("strict_majority", "intersection", "union", "average")},
    "clamped": capo.CreditRule(normalize="group_mean", clamp=0.3),
}


def credit_batch(seed, device, rule=None, **options) -> Batch:
    """A batch with a ``Credit`` of groups in any order, responses without tokens, steps or votes, one undecided."""
    credit = random_credit(seed, rule=rule, **options)
    credit.outcomes[-1] = math.nan
    batch = random_batch(lengths=credit.cu_seqlens.diff().tolist(), vocab=37, seed=seed).to(device)
    return batch.replace(credit=credit_to(credit, device, batch.cu_seqlens))


def assert_same_bits(one, other):
    for a, b in zip((*one[0], one[1]), (*other[0], other[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


CREDIT_CASES = [
    *zip(CREDIT_RULES, itertools.cycle(("default", "all", "gspo", "dr_grpo"))),
    ("capo", "all"),
    ("capo", "gspo"),
]


@pytest.mark.parametrize(("name", "rule"), CREDIT_CASES)
def test_a_credit_has_the_bits_of_its_advantages(name, rule, device):
    batch = credit_batch(4, device, CREDIT_RULES[name], num_responses=8, num_groups=3)
    for given in (batch, batch.replace(mask=None)):
        expected = run(given.replace(credit=given.credit.advantages()), RULES[rule])
        assert bool(expected[1].any())
        assert_same_bits(run(given, RULES[rule]), expected)
        assert_same_bits(run(given, RULES[rule], inplace=True), expected)


def test_lengths_of_the_credit_in_another_tensor_change_nothing(device):
    batch = credit_batch(4, device)
    expected = run(batch, RULES["all"])
    for kind in (torch.int32, torch.int64):
        assert_same_bits(run(batch.replace(cu_seqlens=batch.cu_seqlens.to(kind).clone()), RULES["all"]), expected)
    short = dataclasses.replace(batch.credit, cu_seqlens=batch.cu_seqlens.to(torch.int32))
    assert_same_bits(run(batch.replace(credit=short, cu_seqlens=short.cu_seqlens), RULES["all"]), expected)


@pytest.mark.parametrize("options", [{"num_votes": 0}, {"num_responses": 1}, {"num_groups": 30}], ids=str)
def test_credits_that_say_little(options, device):
    batch = credit_batch(7, device, **options)
    assert_same_bits(run(batch, RULES["all"]), run(batch.replace(credit=batch.credit.advantages()), RULES["all"]))
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    steps = capo.Steps(nothing, nothing, torch.zeros_like(batch.cu_seqlens))
    without = dataclasses.replace(batch.credit, steps=steps, votes=batch.credit.votes[:0])
    assert_same_bits(
        run(batch.replace(credit=without), LossRule()), run(batch.replace(credit=without.advantages()), LossRule())
    )


def test_a_credit_that_does_not_fit_is_named(device):
    batch = credit_batch(4, device)
    votes = batch.credit.votes.clone()
    votes[0] = 2
    for credit, message in (
        (dataclasses.replace(batch.credit, votes=votes), "votes must be -1, 0 or 1, got 2"),
        (dataclasses.replace(batch.credit, cu_seqlens=batch.cu_seqlens + 1), "cu_seqlens must rise from 0 to"),
        (None, "credit is None"),
    ):
        with pytest.raises(ValueError, match=message):
            capo.policy_loss(**vars(batch.replace(credit=credit)))
    longer = batch.replace(**vars(random_batch(lengths=(50,), vocab=37).to(device)) | {"credit": batch.credit})
    with pytest.raises(ValueError, match="credit: cu_seqlens must rise from 0 to 50"):
        capo.policy_loss(**vars(longer))
    elsewhere = credit_to(batch.credit, "meta")
    with pytest.raises(ValueError, match="credit is on meta, logits on"):
        capo.policy_loss(**vars(batch.replace(credit=elsewhere)))


# ---- rows of some tokens only


def run_rows(batch: Batch, rule: LossRule, rows: torch.Tensor, **options):
    """``run`` of the logits of some tokens."""
    return run(batch.replace(logits=batch.logits[rows]), rule, rows=rows, **options)


def assert_same_as_all_rows(batch: Batch, rule: LossRule, rows: torch.Tensor) -> None:
    out, grad = run(batch, rule)
    few, few_grad = run_rows(batch, rule, rows)
    assert_same_bits((few, few_grad), (out, grad[rows]))


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.ratio == "token"])
def test_rows_of_live_tokens_give_the_bits_of_all_rows(name, dtype, device):
    batch = random_batch(dtype=dtype).to(device)
    for given in (batch, batch.replace(mask=None)):
        rows = capo.live_rows(given.credit, RULES[name], given.mask)
        live, *_ = capo.reference.row_weights(given.credit, given.cu_seqlens, given.mask, RULES[name], torch.float64)
        assert 0 < len(rows) and torch.equal(rows, live.nonzero()[:, 0])
        assert_same_as_all_rows(given, RULES[name], rows)


def test_rows_of_dead_tokens_may_be_among_them(device):
    batch = random_batch().to(device)
    live = set(capo.live_rows(batch.credit, LossRule(), batch.mask).tolist())
    assert 0 < len(live) < 18
    dead = next(i for i in range(19) if i not in live)
    rows = torch.tensor(sorted(live | {dead}), device=device)
    assert_same_as_all_rows(batch, LossRule(), rows)
    few = batch.replace(logits=batch.logits[rows])
    few.logits[rows == dead] = math.nan
    assert_same_bits(run(few, LossRule(), rows=rows), run_rows(batch, LossRule(), rows))
    everything = torch.arange(19, device=device)
    assert_same_as_all_rows(batch, RULES["all"], everything)


@pytest.mark.parametrize("name", ["default", "all", "dr_grpo", "dapo"])
def test_a_token_without_a_row_counts_as_one_without_gradient(name, device):
    batch = random_batch().replace(mask=None)
    batch.credit[batch.credit == 0] = 1.0
    rows = torch.tensor([0, 2, 3, 11, 18])
    out, grad = run_rows(batch.to(device), RULES[name], rows.to(device))
    _, truth = reference(batch.double(), RULES[name])
    torch.testing.assert_close(grad.cpu().double(), truth[rows], rtol=2e-5, atol=2e-8)
    others = torch.ones(19, dtype=torch.bool).index_fill(0, rows, False).to(device)
    assert not out.logprobs[others].any() and not out.entropy[others].any() and bool(out.logprobs[~others].all())
    # What the others would have added to the loss is not there, and their share of the denominators is.
    alone = batch.replace(credit=batch.credit.double().masked_fill(others.cpu(), 0.0))
    if name != "all":  # there all tokens have a loss
        assert float(out.loss) == pytest.approx(float(reference(alone.double(), RULES[name])[0][0]), rel=1e-5)


@pytest.mark.parametrize("rule", ["default", "all"])
def test_rows_with_a_credit(rule, device):
    batch = credit_batch(4, device, num_responses=8, num_groups=3)
    assert_same_as_all_rows(batch, RULES[rule], capo.live_rows(batch.credit, RULES[rule], batch.mask))


def test_rows_inplace_strided_and_of_32_bits(device):
    batch = random_batch(dtype=torch.bfloat16).to(device)
    rows = capo.live_rows(batch.credit, LossRule(), batch.mask)
    expected, expected_grad = run_rows(batch, LossRule(), rows)
    wide = torch.full((len(rows), 301), math.nan, dtype=torch.bfloat16, device=device)
    wide[:, 7:264] = batch.logits[rows]
    logits = wide[:, 7:264].detach().requires_grad_(True)
    out = capo.policy_loss(rule=LossRule(), **{**vars(batch), "logits": logits}, rows=rows.int(), inplace=True)
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert_same_bits((out, grad), (expected, expected_grad))
    assert grad.data_ptr() == logits.data_ptr()


def test_rows_of_no_tokens(device):
    batch = random_batch().to(device)
    out, grad = run_rows(batch, RULES["all"], torch.zeros(0, dtype=torch.int64, device=device))
    assert (
        float(out.loss.detach()) == 0.0 and grad.shape == (0, 257) and not out.logprobs.any() and not out.entropy.any()
    )
    empty = random_batch(lengths=(0, 0), vocab=9).to(device)
    out, grad = run_rows(empty, LossRule(), capo.live_rows(empty.credit, LossRule(), empty.mask))
    assert float(out.loss.detach()) == 0.0 and grad.shape == (0, 9)


def test_rows_that_do_not_fit_are_named(device):
    batch = random_batch(lengths=(3, 2), vocab=11).to(device)
    few = {"logits": batch.logits[:3]}

    def rows(*values, dtype=torch.int64):
        return {**few, "rows": torch.tensor(values, dtype=dtype, device=device)}

    refused(r"rows must be int64 \[3\], one for each row of logits, got int64 \[2\]", device, **rows(0, 1))
    refused(r"rows must be int64 \[3\].* got float32", device, **rows(0, 1, 2, dtype=torch.float32))
    refused(r"rows must be int64 \[3\].* got bool", device, **rows(1, 1, 1, dtype=torch.bool))
    refused(r"rows are on meta", device, **few, rows=torch.arange(3, device="meta"))
    for values, value, place in (((0, 1, 5), 5, 2), ((-1, 1, 2), -1, 0), ((0, 2, 2), 2, 2), ((3, 1, 4), 1, 1)):
        refused(rf"rows must be tokens 0 to 4, rising, got {value} at {place}", device, **rows(*values))
    for ratio in ("sequence", "sequence_token"):
        refused(rf"ratio='token'; ratio='{ratio}' reads whole", device, LossRule(ratio=ratio), **rows(0, 1, 2))
        with pytest.raises(ValueError, match="live_rows: .*ratio='token'"):
            capo.live_rows(batch.credit, LossRule(ratio=ratio))
    refused(r"labels must be int64 \[N\]", device, labels=batch.labels[None], **rows(0, 1, 2))
    refused(r"old_logprobs must be float \[5\]", device, old_logprobs=batch.old_logprobs[:3], **rows(0, 1, 2))
    refused(
        r"cu_seqlens must rise from 0 to 5", device, cu_seqlens=torch.tensor([0, 3], device=device), **rows(0, 1, 2)
    )
    with pytest.raises(ValueError, match=r"live_rows: credit \(advantages\) must be float \[N\], got list"):
        capo.live_rows([0.0])
    with pytest.raises(ValueError, match=r"live_rows: mask must be \[5\]"):
        capo.live_rows(batch.credit, mask=batch.mask[:3])


def test_compile_with_rows(device):
    batch = random_batch().to(device)
    rows = capo.live_rows(batch.credit, LossRule(), batch.mask)
    rest = vars(batch.replace(logits=batch.logits[rows]))
    logits = rest.pop("logits").requires_grad_(True)

    def step(logits, rows):
        out = capo.policy_loss(logits, rows=rows, **rest)
        return out.loss * 2, out.logprobs

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        loss, logprobs = function(logits, rows)
        results.append((loss.detach(), logprobs, torch.autograd.grad(loss, logits)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- shapes of nothing


@pytest.mark.parametrize("name", RULES)
def test_no_tokens(name, device):
    for lengths in ((), (0,), (0, 0)):
        batch = random_batch(lengths=lengths, vocab=9).to(device)
        out, grad = run(batch, RULES[name])
        assert float(out.loss) == 0.0 and grad.shape == (0, 9) and out.logprobs.shape == (0,)


def test_one_sequence_masked_leaves_the_rest_bit_for_bit(device):
    batch = random_batch(lengths=(4, 3, 5)).replace(mask=torch.ones(12, dtype=torch.bool)).to(device)
    masked = batch.mask.clone()
    masked[4:7] = False
    for name in ("default", "dr_grpo"):
        _, full = run(batch, RULES[name])
        _, part = run(batch.replace(mask=masked), RULES[name])
        keep = masked
        assert torch.equal(full[keep], part[keep]) and not part[~keep].any()


# ---- refusals


def refused(message, device, rule=None, **changes):
    batch = random_batch(lengths=(3, 2), vocab=11).to(device)
    with pytest.raises(ValueError, match=message):
        capo.policy_loss(**{**vars(batch), **changes}, rule=rule or LossRule())


def test_bad_arguments_are_named(device):
    logits = torch.randn(5, 11, device=device)
    refused(r"logits must be float32, bfloat16 or float16 \[N, V\], got float64", device, logits=logits.double())
    refused(r"logits must be .* got float32 \[5\]", device, logits=logits[:, 0])
    refused(r"last dimension of logits must be contiguous", device, logits=torch.randn(11, 5, device=device).t())
    refused(r"no vocabulary", device, logits=logits[:, :0])
    refused(
        r"labels must be int64 \[5\], got int64 \[4\]", device, labels=torch.zeros(4, dtype=torch.int64, device=device)
    )
    refused(r"labels must be int64", device, labels=torch.zeros(5, device=device))
    refused(
        r"credit \(advantages\) must be float \[5\], got float32 \[2\]", device, credit=torch.zeros(2, device=device)
    )
    refused(r"credit \(advantages\) must be float", device, credit=[0.0] * 5)
    refused(r"old_logprobs must be float \[5\]", device, old_logprobs=torch.zeros(5, dtype=torch.int64, device=device))
    refused(r"mask must be \[5\]", device, mask=torch.ones(6, dtype=torch.bool, device=device))
    refused(r"mask must hold 0 and 1 only, got 2 in row 3", device, mask=torch.tensor([0, 1, 1, 2, 0], device=device))
    refused(
        r"mask must hold 0 and 1 only, got nan in row 0",
        device,
        mask=torch.tensor([math.nan, 1, 1, 1, 0], device=device),
    )
    refused(r"cu_seqlens must rise from 0 to 5", device, cu_seqlens=torch.tensor([0, 3, 6], device=device))
    refused(r"cu_seqlens must rise from 0 to 5", device, cu_seqlens=torch.tensor([0, 4, 3, 5], device=device))
    refused(r"cu_seqlens must be int32 or int64", device, cu_seqlens=torch.tensor([0.0, 5.0], device=device))
    refused(r"kl_coef=0.1 needs ref_logprobs", device, LossRule(kl_coef=0.1), ref_logprobs=None)
    refused(r"importance_cap needs rollout_logprobs", device, LossRule(importance_cap=2.0), rollout_logprobs=None)


@pytest.mark.parametrize("label", [-1, -100, 11, 2**31, 2**63 - 1])
def test_a_label_outside_the_vocabulary_is_named(label, device):
    labels = torch.tensor([1, 2, label, 3, 4], device=device)
    refused(rf"label {label} in row 2 is outside the vocabulary of 11", device, labels=labels, mask=None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"clip_low": -0.1}, "clip_low must be finite and at least 0, got -0.1"),
        ({"clip_high": math.nan}, "clip_high"),
        ({"clip_dual": 1.0}, "clip_dual must be finite and above 1"),
        ({"clip_dual": 3.0, "objective": "cispo"}, "clip_dual has no meaning"),
        ({"ratio": "tokens"}, "ratio must be one of token, sequence, sequence_token, got 'tokens'"),
        ({"reduce": "sum"}, "reduce must be one of"),
        ({"reduce": "constant"}, "belong together"),
        ({"constant": 5.0}, "belong together"),
        ({"reduce": "constant", "constant": 0.0}, "constant must be finite and above 0"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"kl": "k4"}, "kl must be one of k1, k2, k3"),
        ({"entropy_coef": math.inf}, "entropy_coef must be finite"),
        ({"objective": "ppo"}, "objective must be one of clip, cispo"),
        ({"importance_cap": 0.0}, "importance_cap must be finite and above 0"),
    ],
)
def test_bad_rules_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LossRule(**fields)


def test_presets():
    assert LossRule.preset("paper") == LossRule(kl_coef=0.01)
    with pytest.raises(ValueError, match="name must be one of paper"):
        LossRule.preset("ppo")


def test_values_that_the_rule_does_not_use_are_not_read(device):
    batch = random_batch().to(device)
    expected, expected_grad = run(batch, LossRule())
    nan = torch.full((19,), math.nan, device=device)
    out, grad = run(batch.replace(ref_logprobs=nan, rollout_logprobs=nan), LossRule())
    assert torch.equal(out.loss, expected.loss) and torch.equal(grad, expected_grad)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_kinds_of_mask_and_of_advantages(kind, device):
    batch = random_batch().to(device)
    expected, expected_grad = run(batch, LossRule())
    other = batch.replace(mask=batch.mask.to(kind), credit=batch.credit.double(), labels=batch.labels.int())
    out, grad = run(other, LossRule())
    assert torch.equal(out.loss, expected.loss) and torch.equal(grad, expected_grad)


def test_tensors_of_another_device_are_refused(device):
    batch = random_batch().to(device)
    for name in ("labels", "credit", "old_logprobs", "mask"):
        with pytest.raises((ValueError, RuntimeError), match=f"{name}|device"):
            capo.policy_loss(**{**vars(batch), name: getattr(batch, name).to("meta")}, rule=LossRule())


def test_lengths_to_cu():
    assert lengths_to_cu([2, 0, 3]).tolist() == [0, 2, 2, 5]


@pytest.mark.parametrize("ratio", ["sequence", "sequence_token"])
def test_a_label_of_probability_zero_leaves_its_neighbours_their_gradient(ratio, device):
    batch = random_batch(lengths=(4,)).replace(mask=None, credit=torch.tensor([1.0, -0.5, 2.0, 0.3]), old_logprobs=None)
    batch.logits[1, batch.labels[1]] = -math.inf
    rule = LossRule(ratio=ratio)
    _, grad = run(batch.to(device), rule)
    _, expected = reference(batch.double(), rule)
    torch.testing.assert_close(grad.cpu().double(), expected, rtol=1e-5, atol=1e-8)
    assert not grad[1].any() and bool(grad[0].any())
