"""What only the Triton backend promises: bits that do not depend on how a row is divided, and NaN where nothing is checked.

Everything else is in the tests of the ops. On a machine without a GPU the kernels run under Triton's interpreter.
"""

import importlib
import math

import pytest
import torch
from batches import lengths_to_cu, random_batch, random_credit, run

import capo
from capo import LossRule, backends

pytest.importorskip("triton")
launch = importlib.import_module("capo.kernels.launch")


@pytest.fixture
def device():
    name = "cuda" if torch.cuda.is_available() else "cpu"
    with capo.use_backend("triton"):
        yield torch.device(name)


@pytest.fixture
def unchecked(monkeypatch):
    """Values are not looked at before the kernels run, as on a GPU."""
    for op in ("policy_loss", "logprobs", "credit"):
        monkeypatch.setattr(importlib.import_module(f"capo.kernels.{op}"), "checks_values", lambda device_type: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_rows_give_the_same_bits_as_whole_rows(dtype, device, monkeypatch):
    batch = random_batch(lengths=(2, 1), vocab=33_001, dtype=dtype).replace(mask=torch.tensor([True, True, False]))
    batch.credit[:] = torch.tensor([1.0, -0.5, 1.0])
    batch.logits[0, 30_000] += 40.0  # beyond the guess of the largest logit: read again
    batch = batch.to(device)
    rule = LossRule(kl_coef=0.1, entropy_coef=0.01, temperature=0.8)
    results = []
    for programs in (1, 9):
        monkeypatch.setattr(launch, "programs", lambda device, programs=programs: programs)
        assert (launch.splits_of(batch.logits)[0] > 1) == (programs > 1)
        out, grad = run(batch, rule)
        results.append((*out, grad, *capo.logprobs(batch.logits, batch.labels, 0.8, batch.mask)))
    for whole, parts in zip(*results, strict=True):
        assert torch.equal(whole, parts)


def test_a_row_does_not_depend_on_the_others_nor_on_padding(device):
    batch = random_batch(lengths=(3, 2), vocab=1030, dtype=torch.bfloat16).replace(mask=None).to(device)
    together = capo.logprobs(batch.logits, batch.labels)
    wide = torch.full((5, 1061), math.nan, dtype=torch.bfloat16, device=device)
    wide[:, 3:1033] = batch.logits
    apart = capo.logprobs(wide[2:3, 3:1033], batch.labels[2:3])
    assert all(torch.equal(a[2:3], b) for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize("label", [-1, 11, 2**40])
def test_an_unchecked_label_outside_the_vocabulary_gives_nan_in_its_row(label, device, unchecked):
    batch = random_batch(lengths=(3, 2), vocab=11).replace(mask=None)
    batch.credit[:] = 1.0
    batch = batch.to(device)
    _, clean = run(batch, LossRule())
    labels = batch.labels.clone()
    labels[1] = label
    out, grad = run(batch.replace(labels=labels), LossRule())
    others = torch.arange(5, device=device) != 1
    assert bool(out.loss.isnan()) and bool(grad[1].isnan().all()) and torch.equal(grad[others], clean[others])
    assert bool(capo.logprobs(batch.logits, labels)[0].isnan().tolist() == [False, True, False, False, False])


@pytest.mark.parametrize("cu_seqlens", [[0, 3, 6], [1, 3, 5], [0, 4, 3], [-7, 3, 5], [0, 9, 5]])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_unchecked_lengths_that_do_not_fit_give_nan(cu_seqlens, ratio, device, unchecked):
    batch = random_batch(lengths=(3, 2), vocab=11).replace(cu_seqlens=torch.tensor(cu_seqlens)).to(device)
    assert bool(run(batch, LossRule(ratio=ratio))[0].loss.isnan())


@pytest.mark.parametrize(
    "change",
    [
        {"votes": torch.tensor([[0], [2], [0], [0]], dtype=torch.int8)},
        {"outcomes": torch.tensor([math.inf, 0.0])},
        {"ends": [2, 5, 7, 10]},
        {"ends": [2, 4, 7, 11]},
        {"starts": [0, 1, 4, 7]},
        {"starts": [0, 2, 3, 7]},
        {"cu_steps": [0, 9, 4]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_unchecked_credit_that_contradicts_itself_is_nan(change, device, unchecked):
    fields = {"starts": [0, 2, 4, 7], "ends": [2, 4, 7, 10], "cu_steps": [0, 2, 4]}
    steps = capo.Steps(*(torch.tensor(change.get(name, value)).to(device) for name, value in fields.items()))
    votes = change.get("votes", torch.tensor([[0], [1], [0], [0]], dtype=torch.int8)).to(device)
    outcomes = change.get("outcomes", torch.tensor([1.0, 0.0])).to(device)
    credit = capo.Credit(
        outcomes, votes, steps, torch.tensor([0, 4, 10]).to(device), torch.zeros(2, dtype=torch.int32).to(device)
    )
    assert bool(credit.advantages().isnan().all())


@pytest.mark.parametrize("preset", ["capo", "grpo", "papo"])
def test_groups_larger_than_a_block(preset, device):
    credit = random_credit(2, num_responses=75, num_groups=1, rule=capo.CreditRule.preset(preset))
    credit.outcomes[7] = math.nan
    steps = credit.steps
    layout = credit.votes, steps.starts, steps.ends, steps.cu_steps, credit.cu_seqlens, credit.groups, credit.rule
    truth = capo.reference.token_advantages(credit.outcomes, *layout)
    moved = capo.Credit(
        credit.outcomes.to(device), credit.votes.to(device), steps.to(device), credit.cu_seqlens.to(device),
        credit.groups.to(device), credit.rule,
    )  # fmt: skip
    torch.testing.assert_close(moved.advantages().cpu().double(), truth, rtol=1e-6, atol=1e-9)


def test_steps_beyond_a_block(device):
    lengths, steps = (300, 40), 150
    credit = capo.Credit(
        torch.tensor([1.0, 0.0]).to(device),
        (torch.arange(steps * 19).reshape(steps, 19) % 7 % 3 - 1).to(torch.int8).to(device),
        capo.Steps(torch.arange(0, 300, 2), torch.arange(2, 301, 2), torch.tensor([0, steps, steps])).to(device),
        lengths_to_cu(lengths).to(device),
        torch.zeros(2, dtype=torch.int64).to(device),
    )
    steps = credit.steps.to("cpu")
    truth = capo.reference.token_advantages(
        credit.outcomes.cpu(), credit.votes.cpu(), steps.starts, steps.ends, steps.cu_steps, credit.cu_seqlens.cpu(),
        credit.groups.cpu(), credit.rule,
    )  # fmt: skip
    torch.testing.assert_close(credit.advantages().cpu().double(), truth, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("factor", [1.0, -0.3, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_scaled_unless_the_factor_is_one(dtype, factor, device):
    backend = importlib.import_module("capo.kernels.backend")
    x = torch.randn(37, 1001, device=device).to(dtype)
    given, by = x.clone(), torch.tensor(factor, device=device)
    backend.scale_(given, by)
    assert torch.equal(given.nan_to_num(7.0), (x * by).nan_to_num(7.0))


def test_a_vocabulary_beyond_the_sums_is_refused(device):
    logits = torch.zeros(1, device=device, dtype=torch.bfloat16).expand(1, 2**20 + 1)
    with pytest.raises(ValueError, match="a vocabulary of 1048577 is beyond the 1048576 of the triton backend"):
        capo.logprobs(logits.contiguous(), torch.zeros(1, dtype=torch.int64, device=device))


@pytest.mark.parametrize(
    ("device_type", "interpret", "reason"),
    [
        ("cuda", "0", None),
        ("cuda", "1", "TRITON_INTERPRET=1 would run the kernels on the CPU"),
        ("cpu", "1", None),
        ("cpu", "0", "on the CPU only if TRITON_INTERPRET=1"),
        ("mps", "0", "no Triton kernels for mps"),
    ],
)
def test_where_triton_runs(device_type, interpret, reason, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    why = backends.why_not.__wrapped__("triton", device_type)
    assert why is None if reason is None else reason in why


def test_without_triton_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in backends.why_not.__wrapped__("triton", "cuda")


def test_the_interpreter_is_nobodys_default():
    assert backends.available("cpu")[0] != "triton"


def test_a_gpu_is_not_waited_for_unless_asked(monkeypatch):
    monkeypatch.delenv("CAPO_CHECK", raising=False)
    assert backends.checks_values("cpu") and not backends.checks_values("cuda")
    monkeypatch.setenv("CAPO_CHECK", "1")
    assert backends.checks_values("cuda")
