"""The variants of run.py at small size, for pytest-benchmark: ``pytest benchmarks --benchmark-only``."""

import pytest
from linear_variants import LinearCase
from table import OPS
from variants import CreditCase, PolicyLossCase, SegmentCase, Skip

CASES = {
    "policy_loss": PolicyLossCase(rows=64, vocab=32_000),
    "credit": CreditCase(responses=64, length=512),
    "segment": SegmentCase(responses=200),
    "linear_policy_loss": LinearCase(rows=64, hidden=64, vocab=8_000),
    "linear_logprobs": LinearCase(rows=64, hidden=64, vocab=8_000),
}
# torch.compile takes longer to compile than all others take to run.
PAIRS = [
    (name, v) for name, op in OPS.items() for v in op.variants if v.backend not in ("inductor", "cut-cross-entropy")
]


@pytest.mark.parametrize(("name", "variant"), PAIRS, ids=[f"{name}: {v.name}" for name, v in PAIRS])
def test_speed(benchmark, name, variant):
    case = CASES[name]
    benchmark.group = f"{name}: {case.shape}"
    try:
        timed = variant.make(case.make())
        if not variant.is_floor:
            benchmark.extra_info["error"] = OPS[name].check(variant, case)
    except Skip as reason:
        pytest.skip(str(reason))

    def reset() -> None:  # pedantic takes what a set-up returns for arguments
        timed.reset()

    benchmark.pedantic(timed.call, setup=reset, rounds=10, warmup_rounds=1)
