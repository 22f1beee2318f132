"""The benchmark that needs a GPU: that it works, on a CPU under Triton's interpreter."""

import csv
import dataclasses
import importlib

import pytest
import torch
import typer

pytest.importorskip("triton")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU, under Triton's interpreter")


@pytest.fixture
def gpu(monkeypatch):
    script = importlib.import_module("gpu")
    for name, (words, variants, cases) in script.OPS.items():
        quick = tuple(variant for variant in variants if variant.name != "torch.compile")  # compiling takes long
        monkeypatch.setitem(script.OPS, name, (words, quick, cases))
    return script


def test_a_dry_run_times_every_op(gpu, tmp_path):
    gpu.main(dry_run=True, quick=True, op=None, rounds=1, seconds=1.0, skip_tests=False, out=tmp_path)
    products = [
        f"{result}, {maker}" for result in ("logits", "hidden", "weight") for maker in ("cuBLAS", "capo Triton")
    ]
    losses = [f"capo {backend}{place}" for backend in ("CUDA", "Triton") for place in ("", ", in place")]
    for op, names in (
        (
            "policy_loss",
            ["copy_", *losses, "capo CUDA, no gradient", "capo Triton logprobs", "eager", "eager, live rows"],
        ),
        ("linear_policy_loss", ["three products", "capo", "capo, num_live", "eager, live rows"]),
        ("linear_logprobs", ["one product", "capo", "eager, chunks"]),
        ("product", products),
        ("credit", ["fill_", "capo CUDA", "capo Triton"]),
    ):
        with open(tmp_path / "dry-run" / f"{op}.csv", newline="") as file:
            timed = {row["variant"]: row for row in csv.DictReader(file)}
        for name in names:
            assert float(timed[name]["median_ms"]) > 0, timed[name]["note"]
            if name.startswith("capo") and timed[name]["what"] == "loss + gradient":
                assert 0 < float(timed[name]["gradient_error"]) < 1e-4
                assert float(timed[name]["forward_ms"]) > 0 and float(timed[name]["backward_ms"]) > 0
        assert (tmp_path / "dry-run" / f"{op}.png").exists()


def test_a_wrong_variant_of_ours_ends_the_run_and_a_wrong_peer_is_left_out(gpu):
    case = gpu.OPS["policy_loss"][2](gpu.TINY)[0][0]
    case = dataclasses.replace(case, dtype=torch.float32)
    (eager,) = (variant for variant in gpu.OPS["policy_loss"][1] if variant.name == "eager")

    def wrong(x):
        timed = eager.make(x)
        return dataclasses.replace(timed, call=lambda: (0, 1.01 * timed.call()[1]), halves=None)

    peer = dataclasses.replace(eager, make=wrong)
    (row,) = gpu.measure(case, [peer], gpu.Clock("cpu"), 1, 1.0, True)
    assert "off by" in row["note"] and "median_ms" not in row
    with pytest.raises(AssertionError, match="off by"):
        gpu.measure(case, [dataclasses.replace(peer, backend="native")], gpu.Clock("cpu"), 1, 1.0, True)


def test_every_kind_of_input_is_timed(gpu):
    cases = [case for case, _ in gpu.OPS["policy_loss"][2](gpu.Sizes())]
    assert {case.live for case in cases} == {1.0, 0.5, 0.25, 0.05}
    assert {case.sizes["vocab"] for case in cases} == {128_256, 151_936, 151_937, 262_144}
    assert {case.logits for case in cases} == {"gaussian", "peaked"}
    assert {case.dtype for case in cases} == {torch.bfloat16, torch.float16, torch.float32}
    assert all(case.sizes["rows"] * case.sizes["vocab"] * 4 < 6e9 for case in cases if case.dtype == torch.float32)


def test_without_a_gpu_it_says_so(gpu, capsys):
    with pytest.raises(typer.Exit):
        gpu.main(op=None)
    assert "needs a GPU, or --dry-run" in capsys.readouterr().out
