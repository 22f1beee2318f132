"""The Triton kernels compiled ahead of time: no spills, wide loads, nothing in float64 where it is hot. Needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PRODUCTS = "rows_times_matrix", "add_rows_by_rows"
# Bytes that a program may share.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TARGETS = tuple(SHARED)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """What the compilers report of the kernels that touch logits, by target. In a process without the interpreter."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    for name in ("TRITON_INTERPRET", "PYTHONSAFEPATH"):  # the script imports a neighbour
        env.pop(name, None)
    command = [sys.executable, ROOT / "benchmarks/gpu_report.py", "--json", "--hot", *TARGETS]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_spilled(target, kernels):
    assert {k["name"] for k in kernels[target]} == {
        "loss_of_rows", "stats_of_rows", "sums_of_parts", "gradient_of_rows", "stats_of_head_rows",
        "gradient_of_head_rows", *PRODUCTS,
    }  # fmt: skip
    assert {k["name"]: k["spilled"] for k in kernels[target] if k["spilled"]} == {}


@pytest.mark.parametrize("target", TARGETS)
def test_two_programs_fit_on_a_multiprocessor(target, kernels):
    # 16 warps each; an AMD SIMD has as many registers for 8 waves of 64.
    limit = 64 if target.startswith("sm") else 128
    assert max(k["registers"] for k in kernels[target] if k["name"] not in PRODUCTS) <= limit


@pytest.mark.parametrize("target", TARGETS)
def test_products_are_made_by_matrix_units_from_tiles_that_are_fetched_ahead(target, kernels):
    products = [k for k in kernels[target] if k["name"] in PRODUCTS]
    assert len(products) == 4  # each of them twice
    for k in products:
        assert k["matrix_units"] >= 4, k
        assert (k["block_loads"] >= 4) == (target in ("sm_90", "sm_100")), k
        # Two blocks of each side at least; some wait in registers: one of the two on AMD's, the left of a sum over rows on sm_80.
        if k["name"] == "add_rows_by_rows" and target == "sm_80":
            elements = 2 * 32 * 128
        else:
            columns = 128 if k["name"] == "add_rows_by_rows" and target == "sm_100" else 256
            elements = (2 if target.startswith("sm") else 1) * 64 * (128 + columns)
        assert 2 * elements <= k["shared"] <= SHARED[target], k


@pytest.mark.parametrize("target", TARGETS)
def test_rows_are_read_and_written_128_bits_at_a_time(target, kernels):
    for k in kernels[target]:
        if k["name"] in PRODUCTS:
            continue
        assert k["wide_loads"] >= 4, k
        assert k["wide_stores"] >= 4 or k["name"] in ("stats_of_rows", "sums_of_parts", "stats_of_head_rows"), k
        if target.startswith("sm") and k["name"] not in ("gradient_of_rows", "gradient_of_head_rows"):
            assert k["evict_last"] >= 4, k


@pytest.mark.parametrize("target", TARGETS)
def test_there_are_no_atomics(target, kernels):
    assert not any(k["atomics"] for k in kernels[target])


@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm")])
def test_the_loops_over_a_row_are_lean(target, kernels):
    for k in kernels[target]:
        if (k["case"], k["name"]) == ("loss, few rows", "stats_of_rows"):
            continue  # adds up parts: it has no such loop but for rows that are read again
        assert {loop["writes"] for loop in k["loops"]} == {
            "loss_of_rows": {False, True}, "stats_of_rows": {False}, "sums_of_parts": {False}, "gradient_of_rows": {True},
            "stats_of_head_rows": {False}, "gradient_of_head_rows": {True},
        }.get(k["name"], set()), k  # fmt: skip
        assert all(loop["instructions"] < 12 and loop["float64"] == 0 for loop in k["loops"]), k
