"""What only a GPU can show of the loss from hidden states: that nothing waits, graphs, repeats, memory, compilations."""

import importlib

import pytest
import torch
from batches import lengths_to_cu

import capo
from capo import LossRule

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
ROWS, SIZE, VOCAB = 700, 512, 32_000
RULES = {"token": LossRule(), "sequence": LossRule(ratio="sequence", clip_low=0.02, clip_high=0.03)}


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    monkeypatch.delenv("CAPO_CHECK", raising=False)
    torch.use_deterministic_algorithms(False)  # poisoning memory takes as long as the kernels
    with capo.use_backend("triton"):
        yield


def arguments(rows=ROWS, vocab=VOCAB, live=0.4, dtype=torch.bfloat16) -> dict:
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device="cuda")

    hidden, weight = normal(rows, SIZE).to(dtype), (normal(vocab, SIZE) * (2 / SIZE**0.5)).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=g, device="cuda")
    logp, _ = capo.linear_logprobs(hidden, weight, labels)
    return {
        "hidden": hidden, "weight": weight, "labels": labels, "credit": normal(rows), "mask": normal(rows) > 0.25,
        "old_logprobs": logp + 0.1 * normal(rows), "cu_seqlens": lengths_to_cu([rows // 3, rows - rows // 3]).cuda(),
    }  # fmt: skip


def run(values: dict, rule: LossRule, **options) -> list[torch.Tensor]:
    leaves = [values[name].detach().requires_grad_(True) for name in ("hidden", "weight")]
    rest = {name: value for name, value in values.items() if name not in ("hidden", "weight")}
    out = capo.linear_policy_loss(*leaves, rule=rule, **rest, **options)
    return [x.detach() for x in out] + list(torch.autograd.grad(out.loss, leaves))


@pytest.mark.parametrize("chunk", [1, 1 << 30])
@pytest.mark.parametrize("rule", RULES)
def test_nothing_waits_for_the_device(rule, chunk):
    values = arguments()
    live = int(values["mask"].sum())
    for options in ({}, {"num_live": live}, {"num_live": live + 9}):
        run(values, RULES[rule], chunk_bytes=chunk, **options)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(values, RULES[rule], chunk_bytes=chunk, **options)
            capo.linear_logprobs(values["hidden"], values["weight"], values["labels"], mask=values["mask"], **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", RULES)
def test_repeats_give_the_same_bits(rule):
    values = arguments()
    first = run(values, RULES[rule], chunk_bytes=1)
    for _ in range(250):
        assert all(map(torch.equal, run(values, RULES[rule], chunk_bytes=1), first))


def test_a_graph_replays_with_another_number_of_live_rows():
    values = arguments()
    run(values, LossRule())  # compiles
    other = {**values, "mask": ~values["mask"]}
    expected = run(other, LossRule())
    static = {name: value.clone() for name, value in values.items()}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(static, LossRule())
    static["mask"].copy_(other["mask"])
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("more", [0, 9])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_given_number_gives_the_same_but_for_the_products(rule, dtype, more):
    values = arguments(dtype=dtype)
    number = int(values["mask"].sum()) + more
    mine, given = (run(values, RULES[rule], chunk_bytes=1, **options) for options in ({}, {"num_live": number}))
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-4}
    for a, b in zip(mine, given, strict=True):
        assert float((a.double() - b.double()).norm()) <= close["rtol"] * float(b.double().norm()) + close["atol"]


def test_memory_is_a_chunk_and_the_gradients():
    values = arguments(rows=8192)
    run(values, LossRule(), chunk_bytes=64 << 20)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(values, LossRule(), chunk_bytes=64 << 20)
    weight = VOCAB * SIZE
    allowed = (64 << 20) + weight * (4 + 2) + 4 * 8192 * SIZE * 2 + (16 << 20)
    assert torch.cuda.max_memory_allocated() - before < allowed  # all logits have 500 MiB


def test_lengths_and_rules_do_not_compile_again():
    kernels = [
        getattr(importlib.import_module(f"capo.kernels.{module}"), name)
        for module, name in (
            ("product", "rows_times_matrix"), ("product", "add_rows_by_rows"), ("linear", "stats_of_head_rows"),
            ("linear", "gradient_of_head_rows"),
        )
    ]  # fmt: skip

    def compiled():
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    values = [arguments(rows=300 + 37 * i, vocab=1024) for i in range(20)]
    run(values[0], LossRule())
    before = compiled()
    for i, value in enumerate(values):
        run(value, LossRule(clip_low=0.1 + 0.01 * i, temperature=1.0 + 0.1 * i))
    assert compiled() == before
