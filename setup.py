"""Build the native module with CMake; all metadata is in pyproject.toml.

Environment variables read at build time:

    CAPO_NATIVE = auto | on | off   the C++ module: where there is a compiler (default), or an error without one, or never
    CAPO_CUDA   = auto | on | off   the CUDA kernels in it: where there is nvcc (default), or an error without it, or never
    CUDAARCHS                       what they are built for, as CMake has it; default 80-real;90a-real;100-real;100-virtual
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

try:
    from cmake import CMAKE_BIN_DIR
except ImportError:
    CMAKE_BIN_DIR = ""
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def wants_native() -> bool:
    choice = os.environ.get("CAPO_NATIVE", "auto").lower()
    if choice not in ("auto", "on", "off"):
        raise SystemExit(f"CAPO_NATIVE={choice!r}: expected auto, on or off")
    compiler = os.environ.get("CXX", "").split() or ["c++", "g++", "clang++"]
    found = any(shutil.which(name) for name in (compiler[:1] if "CXX" in os.environ else compiler))
    if choice == "on" and not found:
        raise SystemExit("CAPO_NATIVE=on, but no C++ compiler was found: install one (g++ or clang++) or set CXX")
    if choice == "auto" and not found:
        print("capo: no C++ compiler found, installing without the native module", file=sys.stderr)
    return choice != "off" and found


def nvcc() -> str | None:
    """The CUDA compiler: that of CUDACXX, on PATH, or where NVIDIA installs it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which(os.environ.get("CUDACXX") or "nvcc") or shutil.which(os.path.join(home, "bin", "nvcc"))


def wants_cuda() -> str | None:
    """nvcc, if the CUDA kernels are to be built."""
    choice = os.environ.get("CAPO_CUDA", "auto").lower()
    if choice not in ("auto", "on", "off"):
        raise SystemExit(f"CAPO_CUDA={choice!r}: expected auto, on or off")
    found = None if choice == "off" else nvcc()
    if choice == "on" and found is None:
        raise SystemExit("CAPO_CUDA=on, but no nvcc was found: install the CUDA toolkit, or set CUDACXX or CUDA_HOME")
    return found


class CMakeBuild(build_ext):
    """Configure and build CMakeLists.txt; the module lands where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        # An editable installation is made again and again: what did not change stays built.
        editable = getattr(self, "editable_mode", False)
        build = (
            ROOT / "build" / f"editable-{sys.implementation.cache_tag}" if editable else Path(self.build_temp).resolve()
        )
        configure = [
            "-S", str(ROOT), "-B", str(build), "-GNinja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCAPO_OUTPUT={output.parent}",
            f"-DCAPO_MODULE_FILE={output.name}",
        ]  # fmt: skip
        cuda = wants_cuda()
        configure += [f"-DCAPO_CUDA={'ON' if cuda else 'OFF'}", *([f"-DCMAKE_CUDA_COMPILER={cuda}"] if cuda else [])]
        # Python's cmake is new enough; the system's may not be. Without build isolation and outside of an activated
        # environment, its ninja is not on PATH.
        path = filter(None, [CMAKE_BIN_DIR, os.environ.get("PATH"), sysconfig.get_path("scripts")])
        env = os.environ | {"PATH": os.pathsep.join(path)}
        cmake = shutil.which("cmake", path=env["PATH"])
        if cmake is None:
            raise SystemExit("capo: no cmake: pip install cmake ninja pybind11, or build with build isolation")
        ninja = shutil.which("ninja", path=env["PATH"])
        configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        if subprocess.call([cmake, *configure], env=env):
            # Where the compiler is another one than last time, CMake forgets the options, too.
            subprocess.check_call([cmake, *configure, "--fresh"], env=env)
        subprocess.check_call([cmake, "--build", str(build)], env=env)


NATIVE = wants_native()
setup(
    packages=["capo", "capo.integrations", "capo.judges", "capo.kernels"],
    package_dir={"capo": "capo", "capo.kernels": "kernels"},
    package_data={"capo": ["py.typed"]},
    ext_modules=[Extension("capo._native", sources=[])] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild},
)
