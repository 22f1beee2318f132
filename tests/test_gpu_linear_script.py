"""The benchmark that needs a GPU: that the script itself works, on a CPU under Triton's interpreter."""

import importlib

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU, under Triton's interpreter")


def test_a_dry_run_times_every_part(monkeypatch, capsys):
    script = importlib.import_module("gpu_linear")
    monkeypatch.delitem(script.LOSSES, "torch.compile")  # takes long
    rows = script.main(["--dry-run"])
    left_out = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    for op, names in (
        ("linear_policy_loss", ["three products", "capo", "capo, num_live", "eager, live rows"]),
        ("linear_logprobs", ["one product", "capo", "capo, mask", "eager, chunks"]),
        ("product", [f"{result}, {by}" for result in ("logits", "hidden", "weight") for by in ("cuBLAS", "capo")]),
        ("credit", ["fill_", "capo"]),
    ):
        timed = {row["variant"]: row for row in rows if row["op"] == op}
        assert set(names) <= set(timed), left_out
        assert all(row["median_ms"] > 0 for row in timed.values())
    assert set().union(*rows) <= set(script.COLUMNS)
    errors = {row["variant"]: row["error"] for row in rows if row["op"] == "linear_policy_loss"}
    assert errors["capo"] < 1e-5 and errors["capo, num_live"] < 1e-5


def test_without_a_gpu_it_says_so():
    script = importlib.import_module("gpu_linear")
    with pytest.raises(SystemExit, match="needs a GPU, or --dry-run"):
        script.main([])
