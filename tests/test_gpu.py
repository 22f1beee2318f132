"""What only a GPU can show of the backends there: repeats, streams, graphs, memory, compilations, more than 2^31 elements."""

import importlib

import pytest
import torch
from batches import Batch, lengths_to_cu, run

import capo
from capo import LossRule, backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
RULE = LossRule(clip_dual=2.0, kl_coef=0.1, entropy_coef=0.01, reduce="token_mean", temperature=0.9)


@pytest.fixture(autouse=True, params=["native", "triton"])
def backend(request, monkeypatch):
    monkeypatch.delenv("CAPO_CHECK", raising=False)
    torch.use_deterministic_algorithms(False)  # poisoning memory takes as long as the kernels
    reason = backends.why_not(request.param, "cuda")
    if reason is not None:
        pytest.skip(reason)
    with capo.use_backend(request.param):
        yield request.param


@pytest.fixture
def launch(backend):
    if backend != "triton":
        pytest.skip("of the Triton backend; tests/test_cuda.py has the same of the other")
    return importlib.import_module("capo.kernels.launch")


def gpu_batch(rows, vocab, dtype=torch.bfloat16, live=1.0) -> Batch:
    g = torch.Generator("cuda").manual_seed(0)
    logits = torch.empty(rows, vocab, dtype=dtype, device="cuda").normal_(std=2.0, generator=g)
    labels = torch.randint(0, vocab, (rows,), generator=g, device="cuda")
    logp = capo.logprobs(logits, labels)[0]

    def near():
        return logp + 0.3 * torch.randn(rows, generator=g, device="cuda")

    advantages = torch.randn(rows, generator=g, device="cuda") * (torch.rand(rows, generator=g, device="cuda") < live)
    lengths = [rows // 4, rows - rows // 4]
    mask = torch.rand(rows, generator=g, device="cuda") > 0.1
    return Batch(logits, labels, advantages, near(), lengths_to_cu(lengths).cuda(), near(), mask, near())


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("rows", [7, 700])
def test_repeats_give_the_same_bits(ratio, rows):
    batch = gpu_batch(rows, 32_003 if rows > 100 else 151_936)
    rule = LossRule(ratio=ratio, kl_coef=0.1, entropy_coef=0.01)
    first, first_grad = run(batch, rule)
    for _ in range(250):
        out, grad = run(batch, rule)
        assert all(torch.equal(a, b) for a, b in zip(out, first, strict=True)) and torch.equal(grad, first_grad)


def test_parts_of_rows_give_the_same_bits_as_whole_rows(launch, monkeypatch):
    batch = gpu_batch(5, 151_936)
    assert launch.splits_of(batch.logits)[0] > 1
    parts, parts_grad = run(batch, RULE)
    monkeypatch.setattr(launch, "programs", lambda device: 1)
    whole, whole_grad = run(batch, RULE)
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True)) and torch.equal(parts_grad, whole_grad)


def test_alignment_does_not_change_a_bit():
    batch = gpu_batch(600, 32_000)
    expected, expected_grad = run(batch, RULE)
    wide = torch.empty(600, 32_011, dtype=torch.bfloat16, device="cuda")
    view = wide[:, 3:32_003]
    view.copy_(batch.logits)
    leaf = view.requires_grad_(True)
    out = capo.policy_loss(rule=RULE, **{**vars(batch), "logits": leaf})
    (grad,) = torch.autograd.grad(out.loss, leaf)
    assert torch.equal(out.loss, expected.loss) and torch.equal(grad, expected_grad)


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB")
    rows, vocab = 15_000, 151_936  # 2.28e9
    batch = gpu_batch(rows, vocab)
    tail = slice(rows - 600, rows)
    rest = {"old_logprobs": batch.old_logprobs, "cu_seqlens": torch.tensor([0, rows]).cuda()}
    rule = LossRule(reduce="constant", constant=100.0)
    some = {
        name: value[tail] if name != "cu_seqlens" else torch.tensor([0, 600]).cuda() for name, value in rest.items()
    }
    part = batch.logits[tail].clone().requires_grad_(True)
    expected = capo.policy_loss(part, batch.labels[tail], batch.credit[tail], rule=rule, **some)
    expected.loss.backward()
    logits = batch.logits.requires_grad_(True)
    out = capo.policy_loss(logits, batch.labels, batch.credit, rule=rule, inplace=True, **rest)
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert torch.equal(grad[tail], part.grad) and torch.equal(out.logprobs[tail], expected.logprobs)


def test_any_stream():
    batch = gpu_batch(500, 32_003)
    expected, expected_grad = run(batch, RULE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the default stream is idle meanwhile
        late = batch.replace(logits=batch.logits.clone())
        out, grad = run(late, RULE)
    stream.synchronize()
    assert torch.equal(out.loss, expected.loss) and torch.equal(grad, expected_grad)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_graph_replays_with_new_values_and_nothing_waits(ratio):
    rule = LossRule(ratio=ratio, kl_coef=0.1, reduce="token_mean")
    batch, other = gpu_batch(300, 32_000), gpu_batch(300, 32_000)
    other.logits.mul_(0.7)
    expected, expected_grad = run(other, rule)
    run(batch, rule)  # compiles
    static = batch.replace(logits=batch.logits.clone().requires_grad_(True))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = capo.policy_loss(rule=rule, **vars(static))
        (grad,) = torch.autograd.grad(out.loss, static.logits)
    with torch.no_grad():
        for mine, new in zip(static.values(), other.values(), strict=True):
            mine.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out.loss, expected.loss) and torch.equal(grad, expected_grad)


def test_nothing_waits_for_the_device():
    batch = gpu_batch(300, 32_000)
    run(batch, RULE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(batch, RULE)
        capo.logprobs(batch.logits, batch.labels, mask=batch.mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_the_gradient_and_little_more():
    batch = gpu_batch(1000, 151_936)
    run(batch, RULE)
    logits = batch.logits.requires_grad_(True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = capo.policy_loss(rule=RULE, **{**vars(batch), "logits": logits}, inplace=True)
    torch.autograd.grad(out.loss, logits)
    assert torch.cuda.max_memory_allocated() - before < 2**20
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = capo.policy_loss(rule=RULE, **{**vars(batch), "logits": logits})
    torch.autograd.grad(out.loss, logits)
    assert torch.cuda.max_memory_allocated() - before < logits.nbytes + 2**20


def test_lengths_and_rules_do_not_compile_again(launch):
    kernels = importlib.import_module("capo.kernels.policy_loss").loss_of_rows

    def compiled():
        return sum(len(cache[0]) for cache in kernels.device_caches.values())

    rows = 4 * launch.programs(torch.device("cuda", torch.cuda.current_device()))
    run(gpu_batch(rows, 1024), LossRule())
    before = compiled()
    for i in range(20):
        run(gpu_batch(rows + 37 * i, 1024 + 64 * i), LossRule(clip_low=0.1 + 0.01 * i, temperature=1.0 + 0.1 * i))
    assert compiled() == before


def test_a_dead_row_is_not_read():
    batch = gpu_batch(600, 32_000, live=0.3)
    dead = (batch.credit == 0) | ~batch.mask
    expected, expected_grad = run(batch, LossRule())
    batch.logits[dead] = float("nan")
    out, grad = run(batch, LossRule())
    assert torch.equal(out.loss, expected.loss) and torch.equal(grad, expected_grad) and not grad[dead].any()
