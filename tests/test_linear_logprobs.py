"""linear_logprobs: log-probabilities and entropies from hidden states, without gradient; vocabularies split over ranks."""

import math
import socket
import subprocess
import sys

import numerics
import pytest
import torch
from test_policy_loss import REGIMES
from torch.nn.functional import linear

import capo
from capo.reference import LinearLogits, label_logprobs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def head(rows=40, vocab=257, size=24, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(rows, size, generator=g).to(dtype)
    weight = (2 * torch.randn(vocab, size, generator=g) / size**0.5).to(dtype)
    bias = torch.randn(vocab, generator=g).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=g)
    return [x.to(device) for x in (hidden, weight, bias, labels)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6, "per row"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("vocab", [1, 2, 33, 4096])
def test_as_accurate_as_eager(dtype, temperature, softcap, vocab, device):
    hidden, weight, bias, labels = head(vocab=vocab, dtype=dtype)
    if temperature == "per row":
        temperature = 0.5 + torch.rand(len(labels))
    per_row = temperature if isinstance(temperature, torch.Tensor) else torch.full((len(labels),), temperature)
    given = temperature.to(device) if isinstance(temperature, torch.Tensor) else temperature
    moved = [x.to(device) for x in (hidden, weight, labels)]
    actual = capo.linear_logprobs(*moved, given, bias=bias.to(device), softcap=softcap)
    every = torch.arange(len(labels))
    eager = label_logprobs(LinearLogits(hidden, weight, bias, per_row, softcap)[every], labels, 1.0)
    exact = (hidden.double(), weight.double(), bias.double(), per_row.double(), softcap)
    logits = LinearLogits(*exact)[every]
    truth = label_logprobs(logits, labels, 1.0)
    size = logits.abs().amax(-1)
    for mine, theirs, right in zip(actual, eager, truth, strict=True):
        assert mine.dtype == torch.float32 and not mine.requires_grad
        numerics.assert_as_accurate(mine.cpu(), theirs, right, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", REGIMES)
def test_every_regime(name, dtype, device):
    """Hidden states of one 1 each: the logits are the weight."""
    g = torch.Generator().manual_seed(7)
    labels = torch.randint(0, 1031, (38,), generator=g)
    weight = REGIMES[name](38, 1031, labels, g).clamp(min=torch.finfo(dtype).min).to(dtype)  # no 0 times infinity
    actual = capo.linear_logprobs(torch.eye(38, dtype=dtype, device=device), weight.t().to(device), labels.to(device))
    eager, truth = (label_logprobs(x, labels, 1.0) for x in (weight, weight.double()))
    size = weight.double().abs().amax(-1)
    for mine, theirs, right in zip(actual, eager, truth, strict=True):
        numerics.assert_as_accurate(mine.cpu(), theirs, right, size)


def test_it_is_what_the_loss_reports(device):
    hidden, weight, bias, labels = head(device=device)
    cu = torch.tensor([0, 40], device=device)
    out = capo.linear_policy_loss(hidden, weight, labels, torch.ones(40, device=device), None, cu, bias=bias)
    logp, entropy = capo.linear_logprobs(hidden, weight, labels, bias=bias)
    assert torch.equal(out.logprobs, logp) and torch.equal(out.entropy, entropy)


def test_on_policy_the_ratio_is_exactly_one(device):
    hidden, weight, bias, labels = head(dtype=torch.bfloat16, device=device)
    old, _ = capo.linear_logprobs(hidden, weight, labels, bias=bias)
    cu = torch.tensor([0, 7, 40], device=device)
    rule = capo.LossRule(clip_low=0.0, clip_high=0.0)
    for keep in (40, 3):  # however many rows are live
        credit = (torch.arange(40, device=device) < keep).float()
        out = capo.linear_policy_loss(hidden, weight, labels, credit, old, cu, rule, bias=bias)
        assert float(out.clip_fraction) == 0.0
        assert torch.equal(out.logprobs[:keep], old[:keep])


def test_masked_rows_are_not_read(device):
    hidden, weight, bias, labels = head(device=device)
    mask = torch.rand(40, device=device) > 0.4
    expected = capo.linear_logprobs(hidden, weight, labels, bias=bias)
    hidden[~mask] = math.nan
    labels[~mask] = -100
    actual = capo.linear_logprobs(hidden, weight, labels, mask=mask, bias=bias)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a[mask], e[mask], rtol=1e-6, atol=1e-6)
        assert not a[~mask].any()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_chunks_and_company_change_no_bit(dtype, device, monkeypatch):
    monkeypatch.setattr("capo.linear.MIN_CHUNK_ROWS", 32)
    hidden, weight, bias, labels = head(rows=300, dtype=dtype, device=device)
    expected = capo.linear_logprobs(hidden, weight, labels, bias=bias)
    matrices = [x.cpu() for x in (hidden, weight, bias)]
    eager, truth = (label_logprobs(linear(*xs), labels.cpu(), 1.0) for xs in (matrices, [x.double() for x in matrices]))
    size = linear(*(x.double().abs() for x in matrices)).amax(-1)
    for rows in (32, 96, 160):
        for count in (300, 33, 1):
            part = capo.linear_logprobs(
                hidden[:count], weight, labels[:count], bias=bias, chunk_bytes=rows * 257 * dtype.itemsize
            )
            for a, e, theirs, right in zip(part, expected, eager, truth, strict=True):
                if capo.backends.chosen(device.type) == "native":
                    assert torch.equal(a, e[:count])
                else:  # plain PyTorch has other bits where its vectors end
                    every = torch.full((300,), torch.nan).index_copy(0, torch.arange(count), a.cpu())
                    numerics.assert_as_accurate(torch.where(every.isnan(), theirs, every), theirs, right, size)


def test_padded_vocabularies(device):
    hidden, weight, bias, labels = head(vocab=300, device=device)
    labels %= 257
    expected = capo.logprobs(linear(hidden, weight[:257], bias[:257]), labels)
    weight[257:] = math.nan
    actual = capo.linear_logprobs(hidden, weight, labels, bias=bias, vocab_size=257)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_compile_and_opcheck(device):
    hidden, weight, bias, labels = head(rows=5, device=device)
    step = torch.compile(lambda x: capo.linear_logprobs(x, weight, labels, 0.7, bias=bias), fullgraph=True)
    for a, e in zip(step(hidden), capo.linear_logprobs(hidden, weight, labels, 0.7, bias=bias), strict=True):
        assert torch.equal(a, e)
    args = (hidden, weight, bias, labels, None, None, 0.7, 3.0, None, 1 << 20, None, None)
    torch.library.opcheck(torch.ops.capo.linear_logprobs.default, args)


def test_bad_arguments_are_named(device):
    hidden, weight, _, labels = head(rows=3, vocab=5, device=device)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be finite and above 0"):
            capo.linear_logprobs(hidden, weight, labels, temperature)
    with pytest.raises(ValueError, match="temperature must be finite and above 0, got nan in row 1"):
        capo.linear_logprobs(hidden, weight, labels, torch.tensor([1.0, math.nan, 1.0], device=device))
    with pytest.raises(ValueError, match=r"label \d+ in row 0 is outside the vocabulary of 5"):
        capo.linear_logprobs(hidden, weight, labels + 5)
    with pytest.raises(ValueError, match=r"mask must be \[3\]"):
        capo.linear_logprobs(hidden, weight, labels, mask=torch.ones(2, dtype=torch.bool, device=device))


def test_nothing(device):
    hidden, weight, _, labels = head(rows=0, device=device)
    logp, entropy = capo.linear_logprobs(hidden, weight, labels)
    assert logp.shape == entropy.shape == (0,)


# ---- a vocabulary that is split over ranks

RANK = """
import sys
import torch, torch.distributed as dist, torch.distributed.tensor
import capo, capo.linear

def results(group, weight, bias, rule, chunk, vocab, **options):
    leaves = [x.clone().requires_grad_(True) for x in (hidden, weight, bias)]
    out = capo.linear_policy_loss(
        leaves[0], leaves[1], labels, credit, old, cu, rule, old, mask, old, leaves[2], chunk_bytes=chunk,
        vocab_size=vocab, group=group, **options
    )
    out.loss.backward()
    lp = capo.linear_logprobs(
        hidden, weight, labels, bias=bias, mask=mask, vocab_size=vocab, group=group, chunk_bytes=chunk, **options
    )
    return [x.detach() for x in out] + list(lp), [x.grad for x in leaves]

rank, address = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
group = dist.group.WORLD
capo.linear.MIN_CHUNK_ROWS = 32
rules = [
    capo.LossRule(), capo.LossRule(ratio="sequence", clip_low=0.02, clip_high=0.03),
    capo.LossRule(kl_coef=0.1, entropy_coef=0.02, importance_cap=1.5, temperature=0.8),
]
for dtype in (torch.float32, torch.bfloat16):
    for case, rule in enumerate(rules):
        # Shards of different sizes; a rank whose columns are all padding; part of the columns impossible.
        for cut, vocab in ((100, None), (200, 190), (100, 230)):
            g = torch.Generator().manual_seed(case)
            n, size = 130, 16
            hidden = torch.randn(n, size, generator=g).to(dtype)
            weight = torch.randn(257, size, generator=g).to(dtype)
            bias = torch.randn(257, generator=g).to(dtype)
            bias[30:60] = -torch.inf
            labels = torch.randint(60, vocab or 257, (n,), generator=g)
            credit, mask = torch.randn(n, generator=g), torch.rand(n, generator=g) > 0.2
            cu = torch.tensor([0, 90, 90, n])
            logp, _ = capo.linear_logprobs(hidden, weight, labels, rule.temperature, bias=bias, vocab_size=vocab)
            old = logp + torch.tensor([-0.5, -0.1, 0.1, 0.5])[torch.randint(0, 4, (n,), generator=g)]
            hidden[~mask] = torch.nan
            options = {"softcap": 5.0} if case == 0 else {}
            whole, grads = results(None, weight, bias, rule, 1 << 20, vocab, **options)
            mine = slice(0, cut) if rank == 0 else slice(cut, 257)
            split, parts = results(group, weight[mine], bias[mine], rule, 1, vocab, **options)
            low = hidden, weight, bias
            hidden, exact_weight, exact_bias = (x.float() for x in low)
            _, exact = results(None, exact_weight, exact_bias, rule, 1 << 20, vocab, **options)
            hidden = low[0]
            for a, b in zip(split, whole):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
            for k, rows in enumerate((slice(None), mine, mine)):
                if dtype == torch.float32:
                    torch.testing.assert_close(parts[k], grads[k][rows], rtol=1e-4, atol=1e-5)
                    continue
                error, other = ((x - exact[k][rows]).norm() for x in (parts[k], grads[k][rows]))
                assert error <= 2 * other + 1e-6, (k, error, other)
            same = [torch.empty_like(split[0]) for _ in range(2)]
            dist.all_gather(same, split[0])
            assert torch.equal(*same)
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
sharded = dist.tensor.distribute_tensor(weight, mesh, [dist.tensor.Shard(0)])
try:
    capo.linear_logprobs(hidden, sharded, labels)
except ValueError as error:
    assert "weight must be a plain tensor, got DTensor" in str(error)
else:
    raise SystemExit("a DTensor was taken")
hidden = torch.randn(n, size)
broken = weight[mine].float() * (torch.nan if rank == 1 else 1.0)
logp, _ = capo.linear_logprobs(hidden, broken, labels, group=group)
assert bool(logp.isnan().all()), "a shard of NaN went unnoticed"
try:
    capo.linear_logprobs(hidden, weight[mine].float(), labels, group=group, vocab_size=258)
except ValueError as error:
    assert "vocab_size must be 1 to 257, or None, got 258" in str(error)
else:
    raise SystemExit("no error")
del group  # one that outlives its threads may abort the process at its end
dist.destroy_process_group()
print("done")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_vocabulary_over_two_ranks_is_that_of_one(backend, monkeypatch):
    if backend not in capo.backends.available("cpu"):
        pytest.skip(f"no {backend} backend here")
    monkeypatch.setenv("CAPO_BACKEND", backend)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", RANK, str(rank), address],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(x[-3000:] for x in outputs)
