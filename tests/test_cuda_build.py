"""The CUDA kernels as nvcc builds them, without a GPU: registers, spills, what the module needs and shows."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_report
import pytest
import torch

from capo import backends

ROOT = Path(__file__).resolve().parents[1]
HOT = ("loss_of_rows_on_chip", "loss_of_rows_in_two_passes", "tiles_of_rows", "gradient_of_rows")
needs_nvcc = pytest.mark.skipif(cuda_report.nvcc() is None, reason="no nvcc")


@pytest.fixture(scope="module")
def kernels():
    command = [sys.executable, ROOT / "benchmarks/cuda_report.py", "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        target: [cuda_report.Kernel(**kernel) for kernel in found] for target, found in json.loads(done.stdout).items()
    }


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("target", cuda_report.TARGETS)
def test_hot_kernels_spill_nothing_and_leave_room_for_others(target, kernels):
    hot = [k for k in kernels[target] if k.name in HOT]
    assert {(k.name, k.dtype) for k in hot} == {(name, dtype) for name in HOT for dtype in cuda_report.TYPES}
    for k in hot:
        assert k.spilled == 0, k
        assert k.blocks() >= (1 if (k.name, k.dtype) in cuda_report.THREADS else 3), k
        # A call for odd ends has a frame; nothing of a row lies in it.
        assert k.stack <= 64, k
    assert all(k.spilled == 0 for k in kernels[target])


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("target", cuda_report.TARGETS)
def test_the_loops_over_a_row_are_lean(target, kernels):
    if cuda_report.nvdisasm() is None:
        pytest.skip("no nvdisasm")
    kinds = [name for name in HOT if target != "sm_80" or "on_chip" not in name]  # that one has no clusters
    loops = {(k.name, k.dtype): k.instructions for k in kernels[target] if k.name in kinds and k.dtype != "float32"}
    assert len(loops) == 2 * len(kinds)
    for (name, dtype), found in loops.items():
        parts = {"gradient": 14, "sums": 14, "sums at odd addresses": 16}  # an odd address costs no more than two
        if name == "gradient_of_rows":
            parts = {"gradient": 14}
        elif name == "tiles_of_rows":
            del parts["gradient"]
        assert found.keys() == parts.keys(), (name, dtype, found)
        assert all(found[part] < most for part, most in parts.items()), (name, dtype, found)


@needs_nvcc
@pytest.mark.slow
def test_nothing_but_a_count_is_added_up_by_atomics(tmp_path):
    for file in cuda_report.FILES:
        ptx = tmp_path / f"{file}.ptx"
        source = ROOT / "csrc/cuda" / f"{file}.cu"
        command = [cuda_report.nvcc(), *cuda_report.FLAGS, f"-I{ROOT / 'csrc'}", "-arch=compute_90a", "-ptx", "-o", ptx]
        subprocess.run([*map(str, command), str(source)], check=True, capture_output=True)
        text = ptx.read_text()
        assert set(re.findall(r"\b(?:atom|red)\.global\S*", text)) <= {"atom.global.add.u64", "red.global.add.u64"}


def installed():
    """File of the native module here, if it was built with CUDA."""
    if backends.why_not("native", "cpu") is not None or not importlib.import_module("capo.cuda").architectures():
        pytest.skip("the native module here was built without CUDA")
    return Path(importlib.import_module("capo._native").__file__)


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_the_module_with_cuda_needs_neither_driver_nor_runtime_and_shows_its_init_function_only():
    module = installed()
    assert module.stat().st_size < 8_000_000
    if shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("no binutils")
    needed = subprocess.run(["readelf", "-d", module], check=True, capture_output=True, text=True).stdout
    names = re.findall(r"NEEDED.*\[(.*)\]", needed)
    assert names and all(
        re.match(r"(libstdc\+\+|libm|libgcc_s|libc|libdl|librt|libpthread|ld-linux.*)\.so", n) for n in names
    )
    exported = subprocess.run(["nm", "-D", "--defined-only", module], check=True, capture_output=True, text=True).stdout
    assert [line.split()[-1] for line in exported.splitlines()] == ["PyInit__native"]


def test_without_a_gpu_the_module_says_what_it_was_built_for():
    installed()
    cuda = importlib.import_module("capo.cuda")
    assert cuda.why_not() is None or torch.cuda.is_available()
    done = subprocess.run([sys.executable, "-m", "capo.cli", "doctor"], check=True, capture_output=True, text=True)
    assert f"CUDA kernels: built for {', '.join(cuda.architectures())}" in " ".join(done.stdout.split())


@pytest.mark.parametrize(("choice", "message"), [("on", "no nvcc was found"), ("maybe", "expected auto, on or off")])
def test_a_build_that_cannot_have_cuda_says_so(choice, message, tmp_path):
    pytest.importorskip("pybind11")
    env = {"PATH": "/nonexistent", "CUDA_HOME": "/nonexistent", "CXX": sys.executable, "CAPO_CUDA": choice}
    command = [sys.executable, "setup.py", "build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr
