"""The loss from hidden states where only the device knows how many rows are live. Under Triton's interpreter without a GPU."""

import dataclasses
import importlib
import math
import os
import socket
import subprocess
import sys

import pytest
import torch
from batches import Batch, lengths_to_cu
from hypothesis import given, settings
from hypothesis import strategies as st
from test_linear_policy_loss import Head
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import capo
from capo import LossRule, linear

pytest.importorskip("triton")
backend = importlib.import_module("capo.kernels.backend")
product = importlib.import_module("capo.kernels.product")


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(linear, "MIN_CHUNK_ROWS", 32)
    with capo.use_backend("triton"):
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def unchecked(monkeypatch):
    """Values are not looked at before the kernels run, as on a GPU."""
    monkeypatch.setattr(linear, "checks_values", lambda device_type: False)


def head_of(live: torch.Tensor, device, dtype=torch.float32, vocab=37, **options) -> Head:
    """Responses of a third of the tokens each, of which these are live."""
    n = len(live)
    head = Head(lengths=(n // 3, 0, n - n // 3), vocab=vocab, size=9, dtype=dtype, device=device, **options)
    head.batch.mask = live.to(device)
    head.batch.credit[:] = 0.5 - (torch.arange(n, device=device) % 2).float()
    return head


def assert_equals_the_reference(head: Head, rule: LossRule, **options) -> None:
    out, grads = head.run(rule, **options)
    truth, truth_grads = head.eager(rule, torch.float64)
    for mine, exact in zip(out, truth, strict=True):
        torch.testing.assert_close(mine.detach().cpu().double(), exact, rtol=5e-6, atol=5e-6)
    for mine, exact in zip(grads, truth_grads, strict=True):
        torch.testing.assert_close(mine.cpu().double(), exact, rtol=3e-5, atol=1e-6)


ROWS = torch.arange(100)
LIVE = {
    "none": ROWS < 0, "one": ROWS == 57, "few": ROWS % 31 == 30, "a chunk": (ROWS >= 8) & (ROWS < 40), "all": ROWS >= 0,
}  # fmt: skip


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize(
    "rule", [LossRule(), LossRule(ratio="sequence", clip_low=0.02, clip_high=0.03)], ids=["token", "sequence"]
)
def test_any_number_of_live_rows_in_any_number_of_chunks(live, rule, device):
    head = head_of(LIVE[live], device)
    for rows in (32, 128):
        assert_equals_the_reference(head, rule, chunk_bytes=rows * 37 * 4)


def test_rows_that_are_clipped_leave_the_other_products(device, monkeypatch):
    head = head_of(ROWS[:40] >= 0, device)
    logp, _ = capo.linear_logprobs(head.hidden, head.weight, head.batch.labels, bias=head.bias)
    # Advantages are 0.5 in even rows, which are clipped from 1.2 on.
    head.batch.old_logprobs = logp - (torch.arange(40, device=device) < 30).float()
    sums, kept = [], backend.add_product
    monkeypatch.setattr(backend, "add_product", lambda *args: (sums.append(int(args[3])), kept(*args)))
    assert_equals_the_reference(head, LossRule())
    assert sums == [25]


def test_chunks_and_the_company_of_dead_rows_change_no_bit(device):
    rule = LossRule(reduce="constant", constant=9.0, entropy_coef=0.01)
    head = head_of(ROWS[:70] % 3 != 0, device, torch.bfloat16)
    expected, (grad, *_) = head.run(rule)
    for rows in (32, 64):
        out, (other, *_) = head.run(rule, chunk_bytes=rows * 37 * 2)
        assert torch.equal(other, grad) and all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    keep = head.batch.mask.nonzero()[:, 0]
    alone = head_of(torch.ones(len(keep), dtype=torch.bool), device, torch.bfloat16)
    alone.hidden, alone.weight, alone.bias = head.hidden[keep], head.weight, head.bias
    rows = (x[keep] if x is not None and len(x) == 70 else x for x in head.batch.values())
    alone.batch = Batch(*rows).replace(cu_seqlens=lengths_to_cu([len(keep)]).to(device))
    out, (other, *_) = alone.run(rule)
    assert torch.equal(out.logprobs, expected.logprobs[keep]) and torch.equal(other, grad[keep])


def test_dead_rows_are_not_read(device, monkeypatch):
    head = head_of(ROWS[:50] % 4 == 1, device)
    read, kept = [], backend.row_stats
    monkeypatch.setattr(
        backend, "row_stats", lambda *args: (read.append(int((args[1] != linear.ABSENT).sum())), kept(*args))[1]
    )
    out, grads = head.run(LossRule(), chunk_bytes=1)
    assert read == [13, 0]
    dead = ~head.batch.mask
    for x in (head.hidden, head.batch.credit, head.batch.old_logprobs):
        x[dead] = math.nan
    head.batch.labels[dead] = -100
    other, others = head.run(LossRule(), chunk_bytes=1)
    assert torch.equal(out.loss, other.loss) and all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))
    assert not grads[0][dead].any()


# ---- nothing waits


class NoWaiting(TorchDispatchMode):
    """Fails where a result has to come from the device, or a tensor goes there. (Meta tensors have no values to give.)"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs or {}, result)) if isinstance(x, torch.Tensor) and x.dim() > 0]
        assert all(x.device.type == "meta" for x in tensors), f"{func} brings a tensor from the host"
        return result


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that are launched for meta tensors; none runs."""
    names = []
    interpreter = importlib.import_module("triton.runtime.interpreter")
    monkeypatch.setattr(
        interpreter.InterpretedFunction,
        "run",
        lambda self, *args, grid, warmup, **kwargs: names.append(self.fn.__name__),
    )
    monkeypatch.setattr(linear, "_products", lambda device: backend)
    return names


def arguments(rule, mask=True, rows=700, vocab=1000, size=64):
    """Of ``capo.linear.policy_loss``: 700 rows, without values."""

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    values = new(rows)
    return [
        new(rows, size, dtype=torch.bfloat16), new(vocab, size, dtype=torch.bfloat16), new(vocab, dtype=torch.bfloat16),
        new(rows, dtype=torch.int64), values, values, new(6, dtype=torch.int64), values if rule.kl_coef else None,
        new(rows, dtype=torch.bool) if mask else None, values if rule.importance_cap else None, values,
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_linear_gpu.py asks the GPU itself")
@pytest.mark.parametrize("num_live", [None, 100])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize("mask", [True, False])
def test_nothing_waits_for_the_device(mask, ratio, softcap, num_live, launches):
    for rule in (LossRule(ratio=ratio), LossRule(ratio=ratio, kl_coef=0.1, importance_cap=2.0, reduce="token_mean")):
        tokens = arguments(rule, mask)
        head, labels = tokens[:3], tokens[3]
        for chunk in (1, 1 << 30):
            options = softcap, 990, chunk, None, num_live
            with NoWaiting():
                linear.policy_loss(*tokens, [True] * 3, *options, *capo.ops._fields(rule))
                linear.logprobs(*head, labels, tokens[8], None, 0.7, *options)
    assert launches


@pytest.mark.skipif(torch.cuda.is_available(), reason="of meta tensors on the CPU")
def test_what_is_launched_follows_from_shapes_and_is_little(launches):
    rule = LossRule()
    args = *arguments(rule), [True, True, False], None, None, 1 << 30, None
    linear.policy_loss(*args, None, *capo.ops._fields(rule))
    forward, backward = ["rows_times_matrix", "stats_of_head_rows", "terms_of_tokens"], ["gradient_of_head_rows"]
    assert launches == forward + backward + ["rows_times_matrix", "add_rows_by_rows"]
    launches.clear()
    linear.policy_loss(*args, 100, *capo.ops._fields(rule))  # the products are PyTorch's
    assert launches == forward[1:] + backward
    launches.clear()
    always = LossRule(kl_coef=0.1)
    args = *arguments(always, mask=False), [True, True, False], None, None, 1 << 30, None
    linear.policy_loss(*args, None, *capo.ops._fields(always))  # no row can be dead
    assert launches == forward[1:] + backward


# ---- a number of live rows that is given


@pytest.mark.parametrize("more", [0, 1, 40])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_given_number_changes_nothing_but_the_products(ratio, more, device):
    """Also if it is larger than that of live rows, whatever stands in the others."""
    rule = LossRule(ratio=ratio, clip_low=0.02, clip_high=0.03)
    softcap = 5.0 if more == 1 else None
    head = head_of(ROWS % 3 == 0, device)
    head.batch.credit[:9] = 0.0
    live = head.batch.mask & (head.batch.credit != 0) if ratio == "token" else head.batch.mask
    head.hidden[~live] = math.nan
    head.batch.labels[~head.batch.mask] = -100
    for chunk in (1, 1 << 30):
        out, grads = head.run(rule, num_live=int(live.sum()) + more, chunk_bytes=chunk, softcap=softcap)
        expected, others = head.run(rule, chunk_bytes=chunk, softcap=softcap)
        torch.testing.assert_close([*out], [*expected], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grads, others, rtol=1e-5, atol=1e-7)
        assert bool(torch.stack([x.isfinite().all() for x in (*out, *grads)]).all())


@pytest.mark.parametrize("name", ["triton", "native", "torch"])
def test_a_wrong_number_is_an_error(name):
    if name not in capo.backends.available("cpu"):
        pytest.skip(f"no {name} backend here")
    head = head_of(ROWS[:6] != 2, "cpu")
    with capo.use_backend(name):
        with pytest.raises(ValueError, match="linear_policy_loss: num_live=4, but 5 of 6 tokens are live"):
            head.run(LossRule(), num_live=4)
        with pytest.raises(ValueError, match="linear_logprobs: num_live=0, but 5 of 6 tokens are live"):
            capo.linear_logprobs(head.hidden, head.weight, head.batch.labels, mask=head.batch.mask, num_live=0)
        for number in (-1, 7):
            with pytest.raises(ValueError, match=f"num_live must be 0 to 6, or None, got {number}"):
                head.run(LossRule(), num_live=number)


@pytest.mark.parametrize("number", [0, 4])
def test_a_wrong_number_that_nobody_checks_gives_nan(number, device, unchecked):
    head = head_of(ROWS[:6] != 2, device)
    out, grads = head.run(LossRule(), num_live=number)
    assert bool(out.loss.isnan()) and bool(out.logprobs.isnan().all()) and (number == 0 or bool(grads[1].isnan().all()))
    args = head.hidden, head.weight, head.batch.labels
    assert bool(capo.linear_logprobs(*args, mask=head.batch.mask, num_live=number)[0].isnan().all())
    out, grads = head.run(LossRule(), num_live=number + 2 if number else 5)
    assert bool(out.loss.isfinite()) and all(bool(x.isfinite().all()) for x in grads)


# ---- a vocabulary that is split over ranks

RANK = """
import sys
import torch, torch.distributed as dist
import interpreter, capo, capo.linear

rank, address = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
torch.use_deterministic_algorithms(True)
g = torch.Generator().manual_seed(0)
hidden, weight = torch.randn(40, 7, generator=g), torch.randn(50, 7, generator=g)
labels, credit = torch.randint(0, 45, (40,), generator=g), torch.randn(40, generator=g)
mask, cu = torch.rand(40, generator=g) > 0.5, torch.tensor([0, 30, 30, 40])
capo.linear.MIN_CHUNK_ROWS = 32

def results(weight, group, rule):
    leaves = [x.clone().requires_grad_(True) for x in (hidden, weight)]
    options = {"vocab_size": 45, "softcap": 4.0, "group": group, "chunk_bytes": 1}
    out = capo.linear_policy_loss(*leaves, labels, credit, None, cu, rule, mask=mask, **options)
    out.loss.backward()
    return [x.detach() for x in out] + [x.grad for x in leaves]

rule = capo.LossRule(ratio="sequence", entropy_coef=0.1)
expected = results(weight, None, rule)
mine = (slice(0, 20), slice(20, 50))[rank]
expected[-1] = expected[-1][mine]
with capo.use_backend("triton"):
    torch.testing.assert_close(results(weight[mine], dist.group.WORLD, rule), expected, rtol=1e-4, atol=1e-5)
dist.destroy_process_group()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU, under Triton's interpreter")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_a_vocabulary_over_two_ranks_is_that_of_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    env = {**os.environ, "PYTHONPATH": os.path.dirname(__file__), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", RANK, str(rank), address],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(x[-3000:] for x in outputs)


# ---- what nobody checks


@pytest.mark.parametrize("label", [-1, 11, 2**40])
def test_an_unchecked_label_outside_the_vocabulary_gives_nan_in_its_row(label, device, unchecked):
    head = head_of(ROWS[:5] >= 0, device, vocab=11)
    _, (clean, *_) = head.run(LossRule())
    head.batch.labels[1] = label
    out, (grad, weight, _) = head.run(LossRule())
    others = torch.arange(5, device=device) != 1
    assert bool(out.loss.isnan()) and bool(grad[1].isnan().all()) and torch.equal(grad[others], clean[others])
    assert bool(weight.isnan().any())
    logp = capo.linear_logprobs(head.hidden, head.weight, head.batch.labels)[0]
    assert logp.isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("cu_seqlens", [[0, 3, 6], [1, 3, 5], [0, 4, 3], [-7, 3, 5], [0, 9, 5], [0, 3, 2, 5]])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_unchecked_lengths_that_do_not_fit_give_nan(cu_seqlens, ratio, device, unchecked):
    head = head_of(ROWS[:5] >= 0, device)
    head.batch.cu_seqlens = torch.tensor(cu_seqlens, device=device)
    assert bool(head.run(LossRule(ratio=ratio))[0].loss.isnan())


def test_tokens_without_any_response_are_an_error(device, unchecked):
    head = head_of(ROWS[:5] >= 0, device)
    head.batch.cu_seqlens = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 5"):
        head.run(LossRule())


# ---- the parts


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), max_size=40))
def test_moves_bring_the_kept_rows_together_and_overwrite_none(kept):
    kept = torch.tensor(kept, dtype=torch.bool)
    moves, count = linear._moves_on_device(kept)
    assert int(count) == int(kept.sum())
    assert torch.equal(moves[: int(count)], linear._moves(kept)) and bool((moves[int(count) :] == -1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (130, 257, 65), (5, 300, 136)])
def test_products_of_the_first_rows_only(sizes, dtype, device):
    rows, columns, depth = sizes
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=g).to(dtype).to(device) for shape in ((rows, depth), (columns, depth)))
    bias = torch.randn(columns, generator=g).to(dtype).to(device)
    exact = a.double() @ b.double().t()
    close = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0.05}
    )
    for number, first in ((rows, 0), (max(rows - 2, 1), 1), (1, 0), (0, 0), (rows, 3), (1, 4)):
        count, there = torch.tensor(number, device=device), max(min(number - first, rows), 0)
        targets = torch.arange(rows - 1, -1, -1, device=device)
        for matrix in (b.t(), b.t().contiguous()):
            out = torch.full((rows, columns), 7.0, dtype=dtype, device=device)
            backend.rows_product(a, matrix, bias, out, count, first)
            torch.testing.assert_close(out[:there].double(), (exact + bias.double())[:there], **close)
            assert bool((out[there:] == 7.0).all())
        out = torch.full((rows, columns), 7.0, device=device)
        backend.rows_product(a, b.t(), None, out, count, first, targets)
        torch.testing.assert_close(out.flip(0)[:there].double(), exact[:there], **close)
        assert bool((out.flip(0)[there:] == 7.0).all())
        broken = a.clone()
        broken[min(number, rows) :] = math.nan
        total, sums = torch.full((depth, depth), 3.0, device=device), torch.full((depth,), 3.0, device=device)
        backend.add_product(broken, broken, total, count)
        new = torch.full_like(total, math.nan)
        backend.add_product(broken, broken, new, count, written=False)
        backend.add_sum(broken, sums, count)
        some = a[:number].double()
        torch.testing.assert_close(total.double() - 3, some.t() @ some, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(new.double(), some.t() @ some, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(sums.double() - 3, some.sum(0), rtol=1e-5, atol=1e-5)


def test_a_matrix_is_copied_only_where_its_rows_are_at_odd_places(device):
    matrix = torch.arange(80.0, device=device).to(torch.bfloat16).view(5, 16)
    assert all(product.aligned(x) is x for x in (matrix, matrix[:, 8:13], matrix[2:]))
    for odd in (matrix[:, 1:9], matrix[:, :6].contiguous(), matrix.t(), matrix.view(-1)[1:76].view(5, 15)):
        copy = product.aligned(odd)
        assert copy is not odd and torch.equal(copy, odd)
        assert copy.stride(1) == 1 and copy.stride(0) % 8 == 0 and copy.data_ptr() % 16 == 0


def test_a_softcap_and_its_slope_are_those_of_tanh(device):
    z = torch.tensor([[-math.inf, -200.0, -3.0, -1e-4, 0.0, 1e-4, 3.0, 200.0, math.inf, math.nan]], device=device)
    z = torch.cat([z, z.flip(1), z.roll(3, 1)])
    out, grad = torch.full_like(z, 7.0), torch.full_like(z, 7.0)
    count = torch.tensor(2, device=device)
    backend.cap_rows(z, out, 5.0, count)
    backend.cap_rows(z, grad, 5.0, count, rows=torch.tensor([2, 0, -1], device=device))
    exact = z.double()
    torch.testing.assert_close(out[:2].double(), 5 * torch.tanh(exact / 5)[:2], rtol=3e-7, atol=0, equal_nan=True)
    slope = 7 / torch.cosh(exact / 5) ** 2
    torch.testing.assert_close(grad[:2].double(), slope[[2, 0]], rtol=1e-5, atol=1e-30, equal_nan=True)
    assert bool((out[2] == 7.0).all()) and bool((grad[2] == 7.0).all())


def test_rows_that_are_not_there_are_neither_read_nor_written(device):
    logits = torch.full((3, 5), math.nan, device=device)
    logits[1] = torch.arange(5.0)
    labels = torch.tensor([linear.ABSENT, 2, linear.ABSENT], device=device)
    stats = backend.row_stats(logits, labels, 1.0)
    assert bool((stats[[0, 2]] == 0).all()) and bool(stats[1].isfinite().all())
    slopes = torch.ones(3, dtype=torch.float64, device=device)
    out = torch.full_like(logits, 7.0)
    moves = torch.tensor([1, -1, -1], device=device)
    backend.row_grads(logits, out, moves, labels, stats, slopes, torch.zeros_like(slopes), 1.0)
    expected = -torch.softmax(logits[1], 0)
    expected[2] += 1
    torch.testing.assert_close(out[0], expected, rtol=1e-6, atol=1e-7)
    assert bool((out[1:] == 7.0).all())


@pytest.mark.parametrize("temperature", [0.7, "per row"])
def test_stats_of_parts_of_a_vocabulary_say_what_is_nan_and_what_is_empty(temperature, device):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=g)
    logits[0], logits[1], logits[2, 7], logits[3, 7], logits[4, :] = -math.inf, math.inf, math.nan, math.inf, math.nan
    labels = torch.tensor([3, 3, 3, 3, 3, -1])
    if temperature == "per row":
        temperature = torch.linspace(0.5, 2.0, 6)
    given = temperature.to(device) if isinstance(temperature, torch.Tensor) else temperature
    stats = backend.row_stats(logits.to(device), labels.to(device), given).cpu()
    assert stats[0, 0] == -math.inf and bool(stats[[2, 4], 0].isnan().all()) and bool(stats[:5, 1].isnan().all())
    last = temperature[5:] if isinstance(temperature, torch.Tensor) else temperature
    exact = capo.reference.row_stats(logits[5:], labels[5:], last)
    torch.testing.assert_close(stats[5:, [0, 1, 2, 4]], exact[:, [0, 1, 2, 4]], rtol=1e-6, atol=0)


def test_a_vocabulary_beyond_the_sums_is_refused(device):
    logits = torch.zeros(1, dtype=torch.bfloat16, device=device).expand(1, 2**20 + 1)
    with pytest.raises(ValueError, match="a vocabulary of 1048577 is beyond the 1048576 of the triton backend"):
        backend.row_stats(logits, torch.zeros(1, dtype=torch.int64, device=device), 1.0)


def test_float32_is_multiplied_as_pytorch_is_told():
    before = torch.get_float32_matmul_precision()
    try:
        assert product.precision() == ("ieee" if before == "highest" else "tf32")
        torch.set_float32_matmul_precision("high")
        assert product.precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_terms_of_tokens_without_weight_are_zero(device):
    n = 5
    values = torch.full((n,), math.nan, device=device)
    values[0] = -1.0
    weights = torch.zeros(n, dtype=torch.float64, device=device)
    weights[0] = 0.5
    for ratio in ("token", "sequence", "sequence_token"):
        rule = dataclasses.replace(LossRule(), ratio=ratio)
        cu = torch.tensor([0, 1, 1], device=device)
        terms = backend.loss_terms(values, values, values, values, None, None, weights, cu, *capo.ops._fields(rule))
        assert all(not x[1:].any() for x in terms) and float(terms[0][0]) == 1.0 and float(terms[3][0]) == 0.5
