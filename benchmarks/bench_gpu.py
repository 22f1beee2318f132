"""Times the policy loss on a GPU: the tests first, then capo beside its floor and its peers, in one run.

    python benchmarks/bench_gpu.py [--rows 8192] [--vocab 151936] [--dtype bfloat16] [--skip-tests]

Peers that are not installed are left out, and named: `pip install --no-deps trl liger-kernel`. Results: results/<gpu>/gpu.csv.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import capo

HERE = Path(__file__).resolve().parent
LIVE = (1.0, 0.5, 0.25, 0.05)
COLUMNS = [
    "variant",
    "live",
    "rows",
    "vocab",
    "dtype",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "gb_per_s",
    "peak_mb",
    "gradient_error",
    "first_call_ms",
    "gpu",
    "torch",
]


class Inputs:
    """One batch: responses of 512 tokens, off-policy; the dead tokens lie in whole responses at the end."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, live: float):
        g = torch.Generator("cuda").manual_seed(0)
        self.logits = torch.empty(rows, vocab, dtype=dtype, device="cuda").normal_(std=2.0, generator=g)
        self.labels = torch.randint(0, vocab, (rows,), generator=g, device="cuda")
        logp = capo.logprobs(self.logits, self.labels)[0]
        self.old = logp + 0.1 * torch.randn(rows, generator=g, device="cuda")
        self.length = 512 if rows % 512 == 0 else rows
        self.cu_seqlens = torch.arange(0, rows + 1, self.length, device="cuda")
        # One advantage for each response: some peers know no other.
        self.per_response = torch.randn(rows // self.length, generator=g, device="cuda")
        self.per_response[round(live * len(self.per_response)) :] = 0.0
        self.advantages = self.per_response.repeat_interleave(self.length)


def clipped_loss(logp, x: Inputs):
    """The default rule on [N] log-probabilities; responses are of one length, so the mean over tokens is the same."""
    ratio = torch.exp(logp - x.old)
    return -torch.min(ratio * x.advantages, ratio.clamp(0.8, 1.2) * x.advantages).mean()


def eager_loss(logits, x: Inputs):
    return clipped_loss(logits.float().log_softmax(-1).gather(-1, x.labels[:, None])[:, 0], x)


def with_gradient(loss: Callable) -> Callable:
    """A variant that gives the gradient of the logits."""

    def call(x: Inputs):
        logits = x.logits.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(loss(logits, x), logits)
        return grad

    return call


def capo_loss(logits, x: Inputs, **options):
    return capo.policy_loss(logits, x.labels, x.advantages, x.old, x.cu_seqlens, **options).loss


def capo_inplace(x: Inputs):
    logits = x.logits.detach().requires_grad_(True)
    return torch.autograd.grad(capo_loss(logits, x, inplace=True), logits)[0]


def trl_loss():
    """TRL's fused log-probabilities, with the loss in eager PyTorch: how its users run it."""
    kernel = importlib.import_module("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy
    return with_gradient(lambda logits, x: clipped_loss(kernel(logits[None], x.labels[None])[0][0], x))


def liger_loss():
    """One advantage a response; wants one more row than tokens, so the copy that this takes is outside the timing."""
    kernel = importlib.import_module("liger_kernel.transformers.grpo_loss").triton_grpo_loss

    def call(x: Inputs):
        if not hasattr(x, "shifted"):
            responses = len(x.per_response)
            padded = torch.zeros(responses, x.length + 1, x.logits.shape[1], dtype=x.logits.dtype, device="cuda")
            padded[:, :-1] = x.logits.view(responses, x.length, -1)
            x.shifted = padded
        logits = x.shifted.detach().requires_grad_(True)
        shape = len(x.per_response), x.length
        loss, _ = kernel(
            logits, x.old.view(shape), None, x.labels.view(shape), x.per_response, None, temperature=1.0, beta=0.0,
            eps_low=0.2, eps_high=0.2, inplace=False, loss_type="grpo", reduce=True,
        )[:2]  # fmt: skip
        (grad,) = torch.autograd.grad(loss, logits)
        return grad[:, :-1].reshape(x.logits.shape)

    return call


def by(backend: str, make: Callable) -> Callable[[], Callable]:
    """A variant of one backend; it is left out where that cannot run."""

    def variant():
        reason = capo.backends.why_not(backend, "cuda")
        if reason is not None:
            raise ImportError(reason)
        call = make()

        def run(x: Inputs):
            with capo.use_backend(backend):
                return call(x)

        return run

    return variant


def copy(x: Inputs):
    """The ceiling: one read and one write of the logits."""
    if not hasattr(x, "target"):
        x.target = torch.empty_like(x.logits)
    x.target.copy_(x.logits)


VARIANTS: dict[str, Callable[[], Callable]] = {
    "copy_": lambda: copy,
    **{
        f"capo {backend}{what}": by(backend, make)
        for backend in ("native", "triton")
        for what, make in {
            "": lambda: with_gradient(capo_loss),
            ", in place": lambda: capo_inplace,
            ", no gradient": lambda: lambda x: capo.logprobs(x.logits, x.labels),
        }.items()
    },
    "eager": lambda: with_gradient(eager_loss),
    "torch.compile": lambda: with_gradient(torch.compile(eager_loss, dynamic=False)),
    "TRL": trl_loss,
    "Liger": liger_loss,
}
WITHOUT_GRADIENT = ("copy_", "capo native, no gradient", "capo triton, no gradient")


def gradient_error(call: Callable, dtype: torch.dtype) -> float:
    """Relative L2 error of the gradient on a small batch, against float64."""
    x = Inputs(512, 4096, dtype, 0.5)
    truth = Inputs(512, 4096, dtype, 0.5)
    truth.logits, truth.old = truth.logits.double(), truth.old.double()
    logits = truth.logits.requires_grad_(True)
    logp = logits.log_softmax(-1).gather(-1, truth.labels[:, None])[:, 0]
    (expected,) = torch.autograd.grad(clipped_loss(logp, truth), logits)
    return float((call(x).double() - expected).norm() / expected.norm())


def times(call: Callable, x: Inputs, restore: torch.Tensor | None, repeats: int) -> Iterator[float]:
    """Milliseconds of each call, with a cold L2 cache."""
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    for _ in range(repeats):
        if restore is not None:
            x.logits.copy_(restore)
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call(x)
        end.record()
        end.synchronize()
        del result
        yield start.elapsed_time(end)


def measure(name: str, call: Callable, x: Inputs, live: float, repeats: int) -> dict[str, object]:
    restore = x.logits.clone() if "in place" in name else None
    first = next(times(call, x, restore, 1))
    list(times(call, x, restore, 3))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    spent = sorted(times(call, x, restore, repeats))
    peak = torch.cuda.max_memory_allocated() - before - 256 * 2**20
    median = statistics.median(spent)
    moved = x.logits.nbytes * (1 if "no gradient" in name else 2)
    return {
        "variant": name, "live": live, "rows": x.logits.shape[0], "vocab": x.logits.shape[1],
        "dtype": str(x.logits.dtype).removeprefix("torch."), "median_ms": round(median, 4),
        "p20_ms": round(spent[len(spent) // 5], 4), "p80_ms": round(spent[4 * len(spent) // 5], 4),
        "gb_per_s": round(moved / median / 1e6), "peak_mb": round(peak / 1e6), "first_call_ms": round(first, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--skip-tests", action="store_true", help="for a look only: nothing is written")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_gpu.py: needs a GPU; gpu_report.py and cuda_report.py say what is predicted for one")
    if not options.skip_tests:
        gate = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        if subprocess.run(gate, cwd=HERE.parent, check=False).returncode:
            sys.exit("bench_gpu.py: the tests fail; nothing is timed")

    gpu, dtype, rows = torch.cuda.get_device_name(), getattr(torch, options.dtype), []
    for name, make in VARIANTS.items():
        try:
            call = make()
        except (ImportError, AttributeError) as missing:
            print(f"{name}: left out ({missing})")
            continue
        error = None if name in WITHOUT_GRADIENT else gradient_error(call, dtype)
        if error is not None and not error < (0.02 if dtype != torch.float32 else 1e-4):
            print(f"{name}: left out, its gradient is off by {error:.3g} (relative L2)")
            continue
        for live in LIVE if name not in WITHOUT_GRADIENT else LIVE[:1]:
            x = Inputs(options.rows, options.vocab, dtype, live)
            try:
                row = measure(name, call, x, live, options.repeats)
            except torch.cuda.OutOfMemoryError:
                print(f"{name}, live {live}: out of memory")
                continue
            rows.append({**row, "gradient_error": error, "gpu": gpu, "torch": torch.__version__})
            print("{variant:26} live {live:<5} {median_ms:9.3f} ms {gb_per_s:6} GB/s {peak_mb:7} MB".format(**row))
            del x
    if options.skip_tests:
        return
    folder = HERE / "results" / re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "gpu.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {folder / 'gpu.csv'}")


if __name__ == "__main__":
    main()
