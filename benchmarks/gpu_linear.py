"""Times the loss from hidden states, its log-probabilities, their matrix products and credit on a GPU, in one run.

    python benchmarks/gpu_linear.py [--rows 4096] [--hidden 4096] [--vocab 128256] [--skip-tests]
    TRITON_INTERPRET=1 python benchmarks/gpu_linear.py --dry-run      # tiny, on a CPU: does the script work?

Beside capo: the bare products of the live rows (the floor), eager PyTorch on them, torch.compile, Liger, TRL, verl, CCE. What
is not installed is left out, and named: `pip install --no-deps trl liger-kernel cut-cross-entropy verl`. Every variant first
has to give the right gradient. Results: results/<gpu>/gpu_linear.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import linear_variants
import torch
from torch.nn import functional as F
from variants import Skip, Timed, clipped_loss

import capo

HERE = Path(__file__).resolve().parent
LIVE = (1.0, 0.5, 0.25, 0.05)
LENGTHS = 20
COLUMNS = [
    "op", "variant", "live", "shape", "dtype", "median_ms", "p20_ms", "p80_ms", "peak_mb", "error", "first_call_ms",
    "new_lengths_ms", "device", "torch",
]  # fmt: skip


def inputs(rows: int, hidden: int, vocab: int, dtype: torch.dtype, live: float, device: str) -> SimpleNamespace:
    """Responses of 64 tokens or one, off-policy; the dead tokens lie at the end, one advantage a response."""
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device=device)

    length = 64 if rows % 64 == 0 else rows
    states = normal(rows, hidden).to(dtype)
    weight = torch.empty(vocab, hidden, dtype=dtype, device=device)
    for part in weight.split(8_192):
        part.copy_(normal(*part.shape) * (2 / hidden**0.5))
    labels = torch.randint(0, vocab, (rows,), generator=g, device=device)
    logp = torch.cat([linear_variants._logprobs(h, weight, y) for h, y in zip(states.split(512), labels.split(512))])  # noqa: B905
    advantages = normal(rows // length).repeat_interleave(length)
    advantages[round(live * len(advantages)) :] = 0.0
    return SimpleNamespace(
        hidden=states, weight=weight, labels=labels, advantages=advantages, length=length, live=round(live * rows),
        old_logprobs=logp + 0.1 * normal(rows), cu_seqlens=torch.arange(0, rows + 1, length, device=device),
    )  # fmt: skip


# ---- variants: each makes a call without arguments from the inputs


def with_gradients(loss: Callable) -> Callable:
    return lambda x: linear_variants._with_gradients(lambda hidden, weight: loss(hidden, weight, x), x).call


def capo_loss(hidden, weight, x, **options):
    return capo.linear_policy_loss(hidden, weight, x.labels, x.advantages, x.old_logprobs, x.cu_seqlens, **options).loss


def capo_given(hidden, weight, x):
    return capo_loss(hidden, weight, x, num_live=x.live)


def products(x, backward: bool = True):
    """The products of the live rows, into memory that is there."""
    hidden, weight = x.hidden[: x.live], x.weight
    logits = torch.mm(hidden, weight.t())
    outputs = torch.empty_like(hidden), torch.empty_like(weight)

    def call():
        torch.mm(hidden, weight.t(), out=logits)
        if backward:
            torch.mm(logits, weight, out=outputs[0])
            torch.mm(logits.t(), hidden, out=outputs[1])

    return call


def from_linear_variants(name: str) -> Callable[[], Callable]:
    """What run.py times on CPUs, of tensors that are on the GPU."""

    def make():
        function = getattr(linear_variants, name)

        def call_of(x):
            with torch.device(x.hidden.device):
                timed: Timed = function(x)
            return timed.call

        return call_of

    return make


def cce():
    """CCE's Triton kernels, which filter no gradients here."""
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def loss(hidden, weight, x):
        nll = function(hidden, weight, x.labels, reduction="none", impl="cce_exact")
        return clipped_loss(-nll, x)

    return with_gradients(loss)


def verl(backend: str):
    def make():
        module = importlib.import_module("verl.utils.experimental.torch_functional")
        if backend == "liger" and module._LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY is None:
            raise ImportError("Liger's fused linear scaled cross entropy does not run here")
        head = module.FusedLinearForPPO(impl_backend=backend)

        def loss(hidden, weight, x):
            return clipped_loss(head(hidden[None], weight, x.labels[None])[0][0].float(), x)

        return with_gradients(loss)

    return make


def verl_kernels():
    function = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return with_gradients(lambda hidden, weight, x: clipped_loss(function(hidden, weight, x.labels)[0].float(), x))


LOSSES: dict[str, Callable[[], Callable]] = {
    "three products": lambda: products,
    "capo": lambda: with_gradients(capo_loss),
    "capo, num_live": lambda: with_gradients(capo_given),
    "eager, live rows": from_linear_variants("_eager_live"),
    "torch.compile": from_linear_variants("_compiled"),
    "Liger": from_linear_variants("_liger"),
    "TRL": from_linear_variants("_trl"),
    "CCE": cce,
    "verl": verl("torch"),
    "verl with Liger's FLSCE": verl("liger"),
    "verl kernels": verl_kernels,
}
LOGPROBS: dict[str, Callable[[], Callable]] = {
    "one product": lambda: lambda x: products(x, backward=False),
    "capo": lambda: lambda x: lambda: capo.linear_logprobs(x.hidden, x.weight, x.labels),
    "capo, mask": lambda: lambda x: lambda: capo.linear_logprobs(x.hidden, x.weight, x.labels, mask=x.advantages != 0),
    "eager, chunks": from_linear_variants("_eager_chunks"),
    "TRL": from_linear_variants("_trl_logprobs"),
}
SAME_WORK_WHATEVER_IS_LIVE = ("torch.compile", "Liger", "TRL", "CCE", "verl", "verl with Liger's FLSCE", "verl kernels")


def matrix_products(x) -> dict[str, Callable]:
    """Each product by cuBLAS of the live rows, by PyTorch's grouped product, and by the kernels that count on the device."""
    hidden, weight, live, device = x.hidden, x.weight, x.live, x.hidden.device
    logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=device)
    count, total = torch.tensor(live, device=device), torch.zeros(weight.shape, device=device)
    offsets, grad = torch.tensor([live], dtype=torch.int32, device=device), torch.empty_like(hidden)
    logits.copy_(hidden @ weight.t())
    calls = {
        "logits, cuBLAS": lambda: torch.mm(hidden[:live], weight.t(), out=logits[:live]),
        "hidden, cuBLAS": lambda: torch.mm(logits[:live], weight, out=grad[:live]),
        "weight, cuBLAS": lambda: torch.mm(logits[:live].t(), hidden[:live]),
    }
    if hasattr(torch, "_grouped_mm"):
        calls["logits, grouped"] = lambda: torch._grouped_mm(hidden, weight.t()[None], offs=offsets)
        calls["hidden, grouped"] = lambda: torch._grouped_mm(logits, weight[None], offs=offsets)
        calls["weight, grouped"] = lambda: torch._grouped_mm(logits.t(), hidden, offs=offsets)
    backend = importlib.import_module("capo.kernels.backend")
    calls["logits, capo"] = lambda: backend.rows_product(hidden, weight.t(), None, logits, count)
    calls["hidden, capo"] = lambda: backend.rows_product(logits, weight, None, grad, count)
    calls["weight, capo"] = lambda: backend.add_product(logits, hidden, total, count)
    return calls


def credit_calls(responses: int, length: int, device: str) -> dict[str, Callable]:
    """Advantages of responses of 32 steps with 8 votes, groups of 8, beside the time that writing them takes."""
    steps = 32
    starts = torch.arange(0, responses * length, length // steps, device=device)
    credit = capo.Credit(
        (torch.arange(responses, device=device) % 3 == 0).float(),
        (torch.arange(responses * steps * 8, device=device) % 5 == 0).view(-1, 8).to(torch.int8),
        capo.Steps(starts, starts + length // steps, torch.arange(0, len(starts) + 1, steps, device=device)),
        torch.arange(0, responses * length + 1, length, device=device),
        torch.arange(responses, device=device) // 8,
    )
    out = torch.empty(responses * length, device=device)
    return {"fill_": lambda: out.fill_(1.0), "capo": lambda: capo.ops.credit(credit, responses * length)}


# ---- timing


class Clock:
    """Milliseconds and bytes of calls; on a CPU, where nothing of it means anything, of one call each."""

    def __init__(self, device: str, repeats: int):
        self.device, self.repeats = device, repeats if device == "cuda" else 1
        self.flush = torch.empty(256 * 2**20 if device == "cuda" else 1, dtype=torch.uint8, device=device)

    def once(self, call: Callable) -> float:
        self.flush.zero_()  # a cold L2 cache
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end)

    def wall(self, call: Callable) -> float:
        start = time.perf_counter()
        call()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def measure(self, call: Callable) -> dict[str, float]:
        first = self.wall(call)
        for _ in range(3 if self.device == "cuda" else 0):
            self.once(call)
        before = 0
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        spent = sorted(self.once(call) for _ in range(self.repeats))
        peak = torch.cuda.max_memory_allocated() - before if self.device == "cuda" else 0
        return {
            "median_ms": round(statistics.median(spent), 4), "p20_ms": round(spent[len(spent) // 5], 4),
            "p80_ms": round(spent[4 * len(spent) // 5], 4), "peak_mb": round(peak / 1e6), "first_call_ms": round(first, 1),
        }  # fmt: skip

    def new_lengths(self, call_of: Callable, options: argparse.Namespace, dtype: torch.dtype) -> float:
        """What 20 numbers of rows cost when they come for the first time, beyond what they cost: compilations."""
        first, number = (512, LENGTHS) if self.device == "cuda" else (3, 2)
        size = min(options.vocab, 4096)
        calls = [
            call_of(inputs(first * (i + 14) // 14, options.hidden, size, dtype, 1.0, self.device))
            for i in range(number)
        ]
        first = sum(map(self.wall, calls))
        return round(max(first - sum(map(self.wall, calls)), 0.0), 1)


def gradient_error(call_of: Callable, dtype: torch.dtype, device: str) -> float:
    """Relative L2 error of the worse gradient on a small batch, against float64."""
    sizes = (256, 128, 4099) if device == "cuda" else (8, 16, 67)
    x, double = inputs(*sizes, dtype, 0.5, device), inputs(*sizes, dtype, 0.5, device)
    for name in ("hidden", "weight", "old_logprobs", "advantages"):
        setattr(double, name, getattr(double, name).double())
    truth = linear_variants._with_gradients(
        lambda hidden, weight: clipped_loss(linear_variants._double_logprobs(hidden, weight, x.labels), double), double
    ).call()[1:]
    mine = call_of(x)()[1:]
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(mine, truth, strict=True))


def logprobs_error(call_of: Callable, dtype: torch.dtype, device: str) -> float:
    """Largest error of the log-probabilities of the first rows, which are live, against float64."""
    x = inputs(128 if device == "cuda" else 8, 64, 515, dtype, 0.5, device)
    logp = F.linear(x.hidden.double(), x.weight.double()).log_softmax(-1).gather(-1, x.labels[:, None])[:, 0]
    return float((call_of(x)()[0].double() - logp)[: x.live].abs().max())


def rows_of(op: str, table: dict, error_of: Callable, floor: str, options, clock: Clock, dtype) -> Iterator[dict]:
    limit = {torch.float32: 1e-4, torch.bfloat16: 0.04, torch.float16: 0.01}[dtype]
    for name, make in table.items():
        try:
            call_of = make()
            error = None if name == floor else error_of(call_of, dtype, options.device)
        except (ImportError, AttributeError, Skip) as missing:
            print(f"{op}, {name}: left out ({missing})")
            continue
        except Exception as broken:
            if not name.startswith("capo"):
                print(f"{op}, {name}: left out, it does not run here ({type(broken).__name__}: {broken})")
                continue
            raise
        if error is not None and not error < limit:
            print(f"{op}, {name}: left out, off by {error:.3g}")
            continue
        lengths = None if name == floor else clock.new_lengths(call_of, options, dtype)
        for live in options.live if name not in SAME_WORK_WHATEVER_IS_LIVE else options.live[:1]:
            x = inputs(options.rows, options.hidden, options.vocab, dtype, live, options.device)
            try:
                measured = clock.measure(call_of(x))
            except torch.cuda.OutOfMemoryError:
                print(f"{op}, {name}, live {live}: out of memory")
                continue
            yield {"op": op, "variant": name, "live": live, **measured, "error": error, "new_lengths_ms": lengths}


def all_rows(options: argparse.Namespace, clock: Clock) -> Iterator[dict]:
    dtype = getattr(torch, options.dtype)
    shape = f"{options.rows} x {options.hidden} x {options.vocab}"
    parts = [
        rows_of("linear_policy_loss", LOSSES, gradient_error, "three products", options, clock, dtype),
        rows_of("linear_logprobs", LOGPROBS, logprobs_error, "one product", options, clock, dtype),
    ]
    for part in parts:
        for row in part:
            yield {**row, "shape": shape}
    for live in options.live:
        x = inputs(options.rows, options.hidden, options.vocab, dtype, live, options.device)
        for name, call in matrix_products(x).items():
            try:
                measured = clock.measure(call)
            except RuntimeError as broken:
                print(f"product, {name}: left out, it does not run here ({broken})")
                continue
            yield {"op": "product", "variant": name, "live": live, "shape": shape, **measured}
        del x
    for name, call in credit_calls(options.responses, options.length, options.device).items():
        row = {"op": "credit", "variant": name, "live": 1.0, "shape": f"{options.responses} x {options.length}"}
        yield {**row, **clock.measure(call)}


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 4096), ("hidden", 4096), ("vocab", 128_256), ("responses", 4096), ("length", 8192)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--skip-tests", action="store_true", help="for a look only: nothing is written")
    parser.add_argument("--dry-run", action="store_true", help="tiny and on the CPU, to see that all of it runs")
    options = parser.parse_args(arguments)
    options.device, options.live = ("cpu", (0.5,)) if options.dry_run else ("cuda", LIVE)
    if options.dry_run:
        options.rows, options.hidden, options.vocab, options.responses, options.length = 8, 16, 67, 8, 64
        options.dtype = "float32"
    elif not torch.cuda.is_available():
        sys.exit("gpu_linear.py: needs a GPU, or --dry-run; gpu_report.py says what is predicted for one")
    if not options.skip_tests and not options.dry_run:
        gate = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-m",
            "gpu",
            "-k",
            "linear or credit",
            "-p",
            "no:cacheprovider",
        ]
        if subprocess.run(gate, cwd=HERE.parent, check=False).returncode:
            sys.exit("gpu_linear.py: the tests fail; nothing is timed")
    device = "a CPU" if options.dry_run else torch.cuda.get_device_name()
    rows, clock = [], Clock(options.device, options.repeats)
    with capo.use_backend("triton") if options.dry_run else contextlib.nullcontext():
        for row in all_rows(options, clock):
            rows.append({**row, "dtype": options.dtype, "device": device, "torch": torch.__version__})
            print("{op:20} {variant:24} live {live:<5} {median_ms:9.3f} ms {peak_mb:7} MB".format(**row), flush=True)
    if options.skip_tests or options.dry_run:
        return rows
    folder = HERE / "results" / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "gpu_linear.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {folder / 'gpu_linear.csv'}")
    return rows


if __name__ == "__main__":
    main()
