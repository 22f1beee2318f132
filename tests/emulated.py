"""The CUDA kernels on the CPU: csrc/cuda compiled with tests/cuda_emulator.h, a second backend for the tests."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def compiler() -> str | None:
    """A g++ that knows numbers of 16 bits."""
    found = shutil.which(os.environ.get("CXX", "").split(" ")[0] or "g++")
    if found is None or platform.machine() not in ("x86_64", "aarch64"):
        return None
    probe = [found, "-x", "c++", "-std=c++20", "-fsyntax-only", "-"]
    done = subprocess.run(probe, check=False, input="_Float16 x;", text=True, capture_output=True)
    return found if done.returncode == 0 else None


def sources(root: Path) -> list[Path]:
    """What the module of a checkout is made of."""
    return [
        *sorted((root / "csrc/cuda").glob("*.cu")),
        root / "csrc/cuda/bindings.cpp",
        ROOT / "tests/cuda_emulated.cpp",
    ]


def compile_all(root: Path, files: list[Path], folder: Path, flags: tuple[str, ...] = ("-O2",)) -> list[Path]:
    """Object files of some sources of a checkout, made at once."""
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    includes = [root / "csrc", ROOT / "tests", pybind11.get_include(), sysconfig.get_path("include")]
    common = [
        compiler(), "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra",
        "-Wno-unknown-pragmas", "-DCAPO_EMULATED", *(f"-I{path}" for path in includes),
    ]  # fmt: skip
    objects, running = [folder / f"{file.stem}{file.suffix[1:]}.o" for file in files], []
    for file, target in zip(files, objects, strict=True):
        level = flags if file.suffix == ".cu" else ("-O1",)
        command = [*common, *level, "-x", "c++", "-c", str(file), "-o", str(target)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("the emulated CUDA kernels do not compile:\n" + "\n".join(said))
    return objects


def link(objects: list[Path], folder: Path, flags: tuple[str, ...] = ("-O2",)) -> Path:
    """The module of object files, in the folder."""
    target, linked = folder / f"cuda_emulated{SUFFIX}", folder / "linking.so"
    subprocess.run([compiler(), "-shared", *flags, "-o", str(linked), *map(str, objects)], check=True)
    linked.replace(target)
    return target


def build(root: Path, folder: Path, flags: tuple[str, ...] = ("-O2",)) -> Path:
    """Compile the kernels of a checkout into a module in the folder."""
    return link(compile_all(root, sources(root), folder, flags), folder, flags)


def load(path: Path):
    spec = importlib.util.spec_from_file_location("cuda_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def module():
    """The module, built where the sources or the interpreter are new."""
    files = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file()]
    files += [ROOT / "tests/cuda_emulator.h", ROOT / "tests/cuda_emulated.cpp", Path(__file__)]
    content = hashlib.sha256(b"".join(path.read_bytes() for path in files) + SUFFIX.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"capo-emulated-{os.getuid()}-{content}"
    target = folder / f"cuda_emulated{SUFFIX}"
    return load(target if target.exists() else build(ROOT, folder))
