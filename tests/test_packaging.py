"""What is shipped: sdist, wheel, installation with and without the native module, start-up, instruction sets, bans."""

import ast
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import cuda_report
import pytest

from capo import backends

ROOT = Path(__file__).resolve().parents[1]
NATIVE = backends.why_not("native", "cpu") is None
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
CLEAN = {name: value for name, value in os.environ.items() if not re.match("CAPO_|PYTEST_|PYTHON", name)}
CLEAN["CAPO_CUDA"] = "off"  # takes minutes; one test builds with it

TINY_STEP = """
import torch, capo
from capo import backends
credit = capo.Credit(
    torch.tensor([1.0, 0.0]), torch.tensor([[0], [1], [0], [0]], dtype=torch.int8),
    capo.Steps(torch.tensor([0, 2, 4, 7]), torch.tensor([2, 4, 7, 10]), torch.tensor([0, 2, 4])),
    torch.tensor([0, 4, 10]), torch.tensor([0, 0]),
)
assert credit.advantages().tolist() == [1.75, 1.75, 0.5, 0.5] + [-0.75] * 6
logits = torch.randn(10, 7, requires_grad=True)
capo.policy_loss(logits, torch.arange(10) % 7, credit, None, credit.cu_seqlens).loss.backward()
assert logits.grad.abs().sum() > 0
print(capo.__file__, backends.chosen("cpu"))
"""


def run(*command, cwd, check=True, **env):
    done = subprocess.run(
        list(map(str, command)), check=False, cwd=cwd, env=CLEAN | env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    if check:
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def pip(*arguments, cwd, check=True, **env):
    quiet = ("--disable-pip-version-check", "--no-input", "-q")
    return run(sys.executable, "-m", "pip", *quiet, *arguments, cwd=cwd, check=check, **env)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of a copy of the checkout without git, the sdist unpacked, and the wheel built from it."""
    if not NATIVE:
        pytest.skip("no native module here")
    folder = tmp_path_factory.mktemp("packaging")
    copy = folder / "copy"
    copy.mkdir()
    names = ["pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"]
    for name in [*names, "capo", "csrc", "kernels", "tests", "benchmarks"]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "results"))
        else:
            shutil.copy(ROOT / name, copy / name)
    code = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
    sdist = folder / run(sys.executable, "-c", code, folder, cwd=copy).stdout.split()[-1]
    with tarfile.open(sdist) as tar:
        sdist_names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(folder / "unpacked", **({"filter": "data"} if sys.version_info >= (3, 11, 4) else {}))
    (source,) = (folder / "unpacked").iterdir()
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        wheel_names = set(file.namelist())
        file.extractall(folder / "wheel")
    return SimpleNamespace(
        folder=folder, source=source, wheel=wheel, sdist_names=sdist_names, wheel_names=wheel_names,
        module=folder / "wheel" / "capo" / f"_native{SUFFIX}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Make a virtual environment that sees all installed packages but capo."""
    shared = tmp_path_factory.mktemp("shared")
    for folder in [Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]:
        for entry in folder.iterdir():
            ours = entry.name.startswith(("capo", "__editable__")) or entry.suffix == ".pth"
            if not ours and not (shared / entry.name).exists():
                (shared / entry.name).symlink_to(entry)

    def make(folder: Path) -> Path:
        venv.create(folder, with_pip=False, symlinks=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "shared.pth").write_text(f"{shared}\n")
        return folder / "bin" / "python"

    return make


def install(python: Path, *what, **env):
    pip("--python", python, "install", "--no-deps", "--no-index", "--no-build-isolation", *what, cwd="/", **env)


@pytest.fixture(scope="module")
def installed(built, environment):
    """Python of an environment where the wheel is installed."""
    python = environment(built.folder / "installed")
    install(python, built.wheel)
    return python


@pytest.fixture(scope="module")
def without_native(built, environment):
    """Python of an environment where capo is installed editable, without the native module."""
    python = environment(built.folder / "without_native")
    install(python, "-e", built.source, CAPO_NATIVE="off")
    return python


# ---- contents


@pytest.mark.slow
def test_sdist_holds_what_the_build_needs(built):
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "LICENSE", "README.md", "capo/py.typed"):
        assert name in built.sdist_names
    for folder in ("csrc", "kernels", "capo"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".pyc", ".so"):
                assert path.relative_to(ROOT).as_posix() in built.sdist_names


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(built):
    names = built.wheel_names
    folders = {name.split("/")[0] for name in names}
    assert len(folders) == 2 and "capo" in folders and re.search(r"capo-[\d.]+\.dist-info", " ".join(folders))
    for path in [*(ROOT / "capo").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        assert path.relative_to(ROOT).as_posix().replace("kernels/", "capo/kernels/") in names
    assert {"capo/py.typed", f"capo/_native{SUFFIX}"} <= names
    assert any(re.search(r"\.dist-info/(licenses/)?LICENSE$", name) for name in names)
    for name in names:
        assert not re.search(r"\.(cpp|cu|h|pkl|pickle|pt|pyc)$|/tests?/|bench", name)
    assert built.wheel.stat().st_size < 2_000_000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_the_module_needs_no_torch_and_exports_its_init_function_only(built):
    assert str(built.folder).encode() not in built.module.read_bytes()
    if shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("no binutils")
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", built.module, cwd="/").stdout)
    assert needed and all(
        re.match(r"(libstdc\+\+|libm|libgcc_s|libc|libpthread|ld-linux.*)\.so", name) for name in needed
    )
    exported = run("nm", "-D", "--defined-only", built.module, cwd="/").stdout.splitlines()
    assert [line.split()[-1] for line in exported] == ["PyInit__native"]


# ---- installation


@pytest.mark.slow
@pytest.mark.skipif(cuda_report.nvcc() is None, reason="no nvcc")
def test_a_wheel_built_with_cuda_has_its_kernels_and_names_their_architectures(built, environment, tmp_path):
    command = "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", tmp_path, built.source
    pip(*command, cwd=tmp_path, CAPO_CUDA="on", CUDAARCHS="90a-real;100-virtual")
    python = environment(tmp_path / "with_cuda")
    install(python, next(tmp_path.glob("*.whl")))
    code = "from capo._native import cuda; print(cuda.architectures, callable(cuda.policy_loss), callable(cuda.credit))"
    assert run(python, "-c", code, cwd=tmp_path).stdout.split() == ["90a-real,100-virtual", "True", "True"]
    doctor = run(python.parent / "capo", "doctor", cwd=tmp_path, COLUMNS="200").stdout
    assert "built for 90a-real, 100-virtual" in " ".join(doctor.split())


@pytest.mark.slow
def test_an_installed_wheel_works_elsewhere(installed, tmp_path):
    where, backend = run(installed, "-c", TINY_STEP, cwd=tmp_path).stdout.split()
    assert Path(where).is_relative_to(installed.parents[1]) and backend == "native"
    run(installed, "-c", "import capo.kernels, capo._native, sys; assert 'torch' not in sys.modules", cwd=tmp_path)
    doctor = run(installed.parent / "capo", "doctor", cwd=tmp_path, COLUMNS="200").stdout
    assert "ready (default)" in doctor and "triton" in doctor


@pytest.mark.slow
def test_without_the_native_module_everything_runs_through_torch(without_native, tmp_path):
    assert run(without_native, "-c", TINY_STEP, cwd=tmp_path).stdout.split()[1] == "torch"
    reason = "from capo import backends; print(backends.why_not('native', 'cpu'))"
    assert "the native module is not there" in run(without_native, "-c", reason, cwd=tmp_path).stdout
    done = run(without_native, "-c", TINY_STEP, cwd=tmp_path, check=False, CAPO_BACKEND="native")
    assert "backend 'native' cannot run on cpu: the native module is not there" in done.stderr
    assert "available: torch" in done.stderr
    assert (
        "native module is not there"
        in run(without_native.parent / "capo", "doctor", cwd=tmp_path, COLUMNS="200").stdout
    )


@pytest.mark.slow
def test_an_editable_installation_finds_the_kernels(without_native, built, tmp_path):
    code = "import capo, capo.kernels; print(capo.__file__, capo.kernels.__file__)"
    assert run(without_native, "-c", code, cwd=tmp_path).stdout.split() == [
        str(built.source / "capo" / "__init__.py"), str(built.source / "kernels" / "__init__.py"),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["on", "auto", "maybe"])
def test_no_compiler(choice, built, tmp_path):
    done = pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", tmp_path, built.source,
               cwd=tmp_path, check=False, CAPO_NATIVE=choice, CXX="/nonexistent/c++")  # fmt: skip
    if choice == "auto":
        assert done.returncode == 0 and [path.name.endswith("none-any.whl") for path in tmp_path.glob("*.whl")] == [
            True
        ]
    else:
        message = {"on": "CAPO_NATIVE=on, but no C++ compiler was found", "maybe": "expected auto, on or off"}[choice]
        assert done.returncode != 0 and message in done.stdout + done.stderr


# ---- start-up


def seconds(*command, cwd):
    """Processor time of a command, the best of three."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run(*command, cwd=cwd)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times), done.stdout


@pytest.mark.slow
def test_import_is_light(installed, tmp_path):
    heavy = "{'torch', 'numpy', 'transformers', 'pyarrow', 'rich', 'typer', 'pydantic', 'matplotlib', 'triton'}"
    run(installed, "-c", f"import sys, capo; assert not {heavy} & set(sys.modules)", cwd=tmp_path)
    code = f"""
import time, sys, torch
before, start = set(sys.modules), time.process_time()
import capo
capo.policy_loss, capo.Credit, capo.segment, capo.use_backend
assert time.process_time() - start < 0.3, time.process_time() - start
assert not {heavy} & (set(sys.modules) - before)
"""
    run(installed, "-c", code, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_starts_at_once(option, installed, tmp_path):
    time, text = seconds(installed.parent / "capo", option, cwd=tmp_path)
    assert time < 1 and "capo" in text
    code = f"""
import sys
from capo.cli import main
sys.argv = ["capo", {option!r}]
try:
    main()
except SystemExit as done:
    assert not done.code
assert not {{"torch", "numpy", "transformers", "pyarrow"}} & set(sys.modules)
"""
    run(installed, "-c", code, cwd=tmp_path)


# ---- the name `kernels`


def test_our_kernels_step_aside_for_the_package_they_hide(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.11.7'\nfrom . import layer\n")
    (tmp_path / "kernels" / "layer.py").write_text("name = 'hidden'\n")
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]
import kernels, kernels.layer
assert kernels.__version__ == "0.11.7" and kernels.layer.name == "hidden" and {str(tmp_path)!r} in kernels.__file__
import capo.kernels
assert {str(tmp_path)!r} not in capo.kernels.__file__
"""
    run(sys.executable, "-c", code, cwd=tmp_path)


def test_our_kernels_show_a_version_where_they_hide_nothing():
    code = "import kernels; assert kernels.__version__ == '0' and 'capo' not in __import__('sys').modules"
    run(sys.executable, "-S", "-c", code, cwd=ROOT)


@pytest.mark.slow
def test_transformers_builds_a_model_with_the_checkout_on_the_path():
    pytest.importorskip("transformers")
    code = """
import sys
assert sys.path[0] == ""
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import is_kernels_available
is_kernels_available()
config = Qwen2Config(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1)
import torch
print(Qwen2ForCausalLM(config)(torch.zeros(1, 3, dtype=torch.int64)).logits.shape)
import kernels
print(kernels.__version__)
"""
    assert "torch.Size([1, 3, 32])" in run(sys.executable, "-c", code, cwd=ROOT, HF_HUB_OFFLINE="1").stdout


# ---- instruction sets

SETS = ("baseline", "avx2", "avx512")


def isas():
    """The instruction sets of this machine, as the error for an unknown one lists them."""
    code = "from capo import _native; _native.isa()"
    done = run(sys.executable, "-c", code, cwd="/", check=False, CAPO_ISA="mmx")
    return re.search("ValueError: CAPO_ISA=mmx: this machine has (.*)", done.stderr)[1].split(", ")


@pytest.mark.skipif(not NATIVE, reason="no native module here")
def test_capo_isa_chooses_the_row_kernels():
    assert set(isas()) <= set(SETS) and isas()[-1] == "baseline"
    code = "from capo import _native; print(_native.isa())"
    for name in isas():
        assert run(sys.executable, "-c", code, cwd="/", CAPO_ISA=name).stdout.strip() == name
    for env in ({}, {"CAPO_ISA": ""}):
        assert run(sys.executable, "-c", code, cwd="/", **env).stdout.strip() == isas()[0]


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE, reason="no native module here")
def test_an_instruction_set_that_is_not_there_is_an_error_also_under_auto():
    done = run(sys.executable, "-c", TINY_STEP, cwd="/", check=False, CAPO_ISA="avx1024")
    assert done.returncode == 1 and "ValueError: CAPO_ISA=avx1024: this machine has" in done.stderr
    run(sys.executable, "-c", TINY_STEP, cwd="/", CAPO_ISA="avx1024", CAPO_BACKEND="torch")
    done = run(sys.executable, "-m", "capo.cli", "doctor", cwd="/", check=False, CAPO_ISA="avx1024")
    assert done.returncode == 2 and "error: CAPO_ISA=avx1024" in done.stderr and "Traceback" not in done.stderr


FORKS = """
import os, signal, torch, capo
from capo import critique
torch.set_num_threads(4)
logits, labels = torch.randn(64, 3001), torch.randint(0, 3001, (64,))
table = capo.TokenBytes([b"a", b".\\n\\n"])
ids, cu = torch.randint(0, 2, (200_000,)), torch.arange(0, 200_001, 1000)

def work():
    steps = capo.segment(ids, cu, table)
    return [capo.logprobs(logits, labels)[0], steps.starts, steps.ends]

before = work()  # threads have run in this process
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(not all(map(torch.equal, work(), before)))
assert os.waitpid(child, 0)[1] == 0
assert all(map(torch.equal, work(), before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE or not hasattr(os, "fork"), reason="no native module or no fork here")
def test_kernels_run_after_a_fork():
    run(sys.executable, "-c", FORKS, cwd="/", CAPO_BACKEND="native")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_memory_that_runs_out_is_an_error_and_the_next_call_works():
    code = """
import resource, torch, capo
def step(rows):
    logits = torch.zeros(rows, 100_000, requires_grad=True)
    out = capo.policy_loss(logits, torch.zeros(rows, dtype=torch.int64), torch.ones(rows), None, torch.tensor([0, rows]))
    out.loss.backward()
    return logits.grad
expected = step(3)
big = torch.zeros(2_000, 100_000, requires_grad=True)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, limits[1]))
try:
    capo.policy_loss(big, torch.zeros(2_000, dtype=torch.int64), torch.ones(2_000), None, torch.tensor([0, 2_000]))
except (RuntimeError, MemoryError) as error:
    assert "allocate" in str(error), error
else:
    raise SystemExit("800 MB fitted into 200")
assert torch.equal(step(3), expected)
resource.setrlimit(resource.RLIMIT_AS, limits)
assert not big.any() and big.grad is None
"""
    run(sys.executable, "-c", code, cwd="/")


@pytest.mark.slow
def test_two_versions_in_a_process_are_an_error():
    """The second one cannot register the operators again."""
    code = """
import sys, capo, torch
capo.policy_loss
for name in [name for name in sys.modules if name.split(".")[0] == "capo"]:
    del sys.modules[name]
import capo
try:
    capo.policy_loss
except RuntimeError as error:
    assert "capo::" in str(error) and "register" in str(error).lower(), error
else:
    raise SystemExit("registered twice")
"""
    run(sys.executable, "-c", code, cwd="/")


def run_tests(*arguments, **env):
    done = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, cwd=ROOT, **env)
    assert re.search(r"\d+ passed", done.stdout), done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE, reason="no native module here")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_row_kernels_of_every_instruction_set(isa):
    if isa not in isas():
        pytest.skip(f"this machine lacks {isa}")
    regimes = "every_regime and (all-bfloat16 or all-float16 or default-float32)"
    sizes = "every_size_of_vocabulary and not 151643 and not 262145 and not bfloat16"
    run_tests("tests/test_policy_loss.py", "-k", f"native and (every_option or {regimes} or {sizes})", CAPO_ISA=isa)


# ---- rules of the source


@pytest.mark.slow
def test_arguments_are_checked_under_python_o():
    wanted = "named or bad or refuse"
    run_tests("tests/test_policy_loss.py", "tests/test_logprobs.py", "tests/test_credit.py",
              "-k", wanted, PYTHONOPTIMIZE="1")  # fmt: skip


def banned(tree: ast.AST):
    """What must not be in the package: checks that python -O removes, code from data, pickles, shells."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node, "assert"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node, "bare except"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                if module.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"):
                    yield node, f"import {module}"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save",
                        "yaml.load", "numpy.load", "np.load"):  # fmt: skip
                yield node, f"{name}()"
            for key in node.keywords:
                if key.arg in ("shell", "trust_remote_code") and not (
                    isinstance(key.value, ast.Constant) and not key.value.value
                ):
                    yield node, f"{key.arg}=True"


def test_the_tests_that_docs_faults_names_are_there():
    defined = {
        path.name: set(re.findall(r"^def (\w+)", path.read_text(), re.MULTILINE))
        for path in (ROOT / "tests").glob("*.py")
    }
    everywhere = set().union(*defined.values())
    named = re.findall(
        r"`(?:(\w+\.py)(?:::)?)?((?:test|poisoned)_\w+(?:\.\.\.)?)?`", (ROOT / "docs" / "faults.md").read_text()
    )
    assert len(named) > 100
    for file, name in named:
        there = everywhere if not file else defined[file]
        prefix = name.removesuffix("...")
        assert not name or name in there or (prefix != name and any(one.startswith(prefix) for one in there)), (
            file,
            name,
        )


def test_no_file_has_marks_of_a_merge():
    suffixes = {".py", ".md", ".cpp", ".h", ".cu", ".cuh", ".toml", ".yaml", ".txt", ".in", ".csv", ""}
    for folder in (
        ROOT,
        *(ROOT / name for name in (".ci", "benchmarks", "capo", "csrc", "docs", "examples", "kernels", "tests")),
    ):
        for path in folder.glob("*") if folder == ROOT else folder.rglob("*"):
            if path.is_file() and path.suffix in suffixes:
                assert not re.search(rb"^(<{7}|>{7}) ", path.read_bytes(), re.MULTILINE), path


def test_the_bans_are_noticed():
    planted = {
        "assert x": "assert", "try:\n  f()\nexcept:\n  pass": "bare except", "import pickle": "import pickle",
        "from pickle import loads": "import pickle", "eval(x)": "eval()", "exec(x)": "exec()",
        "torch.load(f)": "torch.load()", "torch.save(x, f)": "torch.save()", "yaml.load(f)": "yaml.load()",
        "os.system(x)": "os.system()", "subprocess.run(x, shell=True)": "shell=True", "compile(x, y, z)": "compile()",
        "load(x, trust_remote_code=True)": "trust_remote_code=True", "load(x, trust_remote_code=y)": "trust_remote_code=True",
    }  # fmt: skip
    for source, what in planted.items():
        assert [found for _, found in banned(ast.parse(source))] == [what]
    harmless = (
        "model.eval(); torch.compile(f); re.compile(x); subprocess.run(x, shell=False); safetensors.torch.load(f); "
        "load(x, trust_remote_code=False)"
    )
    assert not list(banned(ast.parse(harmless)))


@pytest.mark.parametrize("folder", ["capo", "kernels"])
def test_bans(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {what}"
        for path in files
        for node, what in banned(ast.parse(path.read_text()))
    ]
    assert not found, "\n".join(found)
