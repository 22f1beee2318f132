"""Two processes, micro-batches, sharded weights: the same loss and gradients as one process on the whole batch."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from batches import lengths_to_cu, random_batch, run
from ranks import RULES, SCENARIOS, compute
from safetensors.torch import load_file

import capo

WORLD = 2
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What two processes computed for every scenario."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, HERE / "ranks.py"]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    processes = [
        subprocess.Popen([*command, str(rank), str(WORLD), folder], stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(WORLD)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {name: load_file(folder / f"{name}.safetensors") for name in SCENARIOS}


def error(actual, expected):
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, x in SCENARIOS.items() if x.precision == "float32"])
def test_two_processes_equal_one(name, results):
    expected = compute(SCENARIOS[name], None, None)
    actual = results[name]
    assert actual.keys() - expected.keys() == set()
    torch.testing.assert_close(actual["loss"], expected["loss"], rtol=1e-5, atol=1e-6)
    for key, grad in actual.items():
        assert error(grad, expected[key]) < 1e-5, key


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, x in SCENARIOS.items() if x.precision != "float32"])
def test_low_precision_errs_no_more_than_in_one_process(name, results):
    """bfloat16 matrices: at most twice the error of one process under autocast, against float32."""
    scenario = SCENARIOS[name]
    plain = {**vars(scenario), "precision": "float32"}
    truth = compute(type(scenario)(**plain), None, None)
    alone = compute(type(scenario)(**{**plain, "precision": "autocast"}), None, None)
    for key, grad in results[name].items():
        assert grad.dtype == torch.float32
        if key != "loss":
            assert error(grad, truth[key]) <= 2 * max(error(alone[key], truth[key]), 2**-8), key


# ---- the shares on their own


@pytest.mark.parametrize("reduce", RULES)
@pytest.mark.parametrize("cuts", [(), (1,), (2, 4), (1, 2, 3, 4, 5)])
def test_micro_batches_add_up_to_the_batch(reduce, cuts, device):
    rule = RULES[reduce]
    lengths = [5, 1, 0, 9, 4, 2]
    batch = random_batch(lengths=lengths).to(device)
    whole, expected = run(batch, rule)
    parts = []
    for first, last in itertools.pairwise([0, *cuts, len(lengths)]):
        tokens = slice(sum(lengths[:first]), sum(lengths[:last]))
        changes = {k: None if v is None else v[tokens] for k, v in vars(batch).items() if k != "cu_seqlens"}
        parts.append(batch.replace(**changes, cu_seqlens=lengths_to_cu(lengths[first:last]).to(device)))
    shares = capo.loss_shares(rule, [(part.cu_seqlens, part.mask) for part in parts])
    outs, grads = zip(*(run(part, rule) for part in parts), strict=True)
    total = sum(out.loss * share for out, share in zip(outs, shares, strict=True))
    torch.testing.assert_close(total, whole.loss, rtol=1e-6, atol=1e-6)
    together = torch.cat([grad * share for grad, share in zip(grads, shares, strict=True)])
    torch.testing.assert_close(together, expected, rtol=2e-6, atol=1e-9)


def test_shares():
    rule = capo.LossRule(reduce="token_mean")
    mask = torch.tensor([True, False, True])
    shares = capo.loss_shares(rule, [(torch.tensor([0, 3]), mask), (torch.tensor([0, 2, 6]), None)])
    assert shares.tolist() == [0.25, 0.75]
    shares = capo.loss_shares(capo.LossRule(), [(torch.tensor([0, 3]), mask), (torch.tensor([0, 2, 2, 6]), None)])
    assert shares.tolist() == [0.25, 0.75]
    assert capo.loss_shares(capo.LossRule(reduce="constant", constant=2.0), [(torch.tensor([0, 3]), None)]) == 1
    with pytest.raises(ValueError, match="no micro-batch"):
        capo.loss_shares(rule, [])
    assert capo.loss_shares(rule, [(torch.tensor([0, 3]), ~mask & mask)]).tolist() == [0.0]
