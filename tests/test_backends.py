"""Choice of the backend: what runs, why others do not, and what a user is told."""

import os
import subprocess
import sys

import pytest
import torch

import capo
from capo import backends


def test_the_torch_backend_is_always_there():
    assert "torch" in backends.available("cpu")
    assert backends.why_not("torch", "cuda") is None


def test_use_backend_is_a_block_and_survives_exceptions():
    before = backends.chosen("cpu")
    with pytest.raises(KeyError), capo.use_backend("torch"):
        assert backends.chosen("cpu") == "torch"
        with capo.use_backend("auto"):
            assert backends.chosen("cpu") == backends.available("cpu")[0]
        raise KeyError
    assert backends.chosen("cpu") == before


def test_an_unknown_backend_is_refused_with_the_names_there_are():
    with (
        pytest.raises(ValueError, match="no backend 'cuda'; there are auto, native, triton, torch"),
        capo.use_backend("cuda"),
    ):
        pass


def test_a_backend_that_cannot_run_says_why_and_names_those_that_can():
    backend, device = "native", "meta"
    why = f"backend '{backend}' cannot run on {device}: .*; available: .*torch"
    with pytest.raises(RuntimeError, match=why), capo.use_backend(backend):
        backends.chosen(device)


@pytest.mark.parametrize("name", ["torch", "nonsense"])
def test_the_environment_sets_the_default(name):
    code = "from capo import backends; print(backends.chosen('cpu'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env={**os.environ, "CAPO_BACKEND": name},
        capture_output=True,
        text=True,
    )
    if name == "torch":
        assert done.stdout.strip() == "torch"
    else:
        assert done.returncode != 0 and "no backend 'nonsense'" in done.stderr


def test_backends_run_the_same_op():
    logits, labels = torch.randn(4, 50), torch.randint(0, 50, (4,))
    results = []
    for name in backends.available("cpu"):
        with capo.use_backend(name):
            results.append(capo.logprobs(logits, labels)[0])
    assert len(results) >= 1
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-6)


def test_public_names_resolve_and_unknown_ones_do_not():
    for name in dir(capo):
        assert getattr(capo, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = capo.nothing
