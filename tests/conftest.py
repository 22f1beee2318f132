"""Fixtures of all tests: every device with every backend that runs there, and memory poisoned with NaN."""

import os

import pytest
import torch

from capo import backends

# Python processes that tests start find the installed capo, not the checkout (before 3.11 the variable does nothing).
os.environ["PYTHONSAFEPATH"] = "1"

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
PAIRS = [(device, backend) for device in DEVICES for backend in backends.available(device)]


@pytest.fixture(
    params=[
        pytest.param(pair, id="-".join(pair), marks=[pytest.mark.gpu] if pair[0] == "cuda" else []) for pair in PAIRS
    ]
)
def device(request):
    """Run the test on every device with every backend that runs there."""
    name, backend = request.param
    with backends.use_backend(backend):
        yield torch.device(name)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN, and the largest integer: an element that was left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers for every test, whatever ran before."""
    torch.manual_seed(0)
