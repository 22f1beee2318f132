"""The one tolerance rule: a kernel may err at most twice as much as eager PyTorch of the same dtype errs.

The truth is float64. Errors are taken row by row, relative to the row, and eager's error is that of its worst row: one row of
eager is exact by luck. There is no fixed tolerance but the rounding of the result itself.
"""

import torch
from torch import Tensor


def assert_rows_as_accurate(actual: Tensor, eager: list[Tensor], truth: Tensor, slopes: Tensor, logits: Tensor) -> None:
    """Every row: largest error, relative L2 error and direction.

    A row that is hardly above float32's resolution, because the label's probability is 1 but for that, has few digits to
    compare: its error is taken relative to d loss / d logp instead of itself.

    Args:
        actual: [N, V] of the kernel.
        eager: [N, V] each, of ways to write it in eager PyTorch.
        truth: [N, V] float64.
        slopes: [N], size of d loss / d logp.
        logits: [N], size of the scaled logits.
    """
    assert all(x.dtype == actual.dtype and x.shape == truth.shape for x in (actual, *eager))
    assert truth.dtype == torch.float64 and bool(torch.isfinite(actual).all())
    dead = slopes == 0
    assert not actual[dead].any(), "a row without gradient was written to"
    info = torch.finfo(actual.dtype)
    # Entries below the smallest normal number are rounded to multiples of the smallest subnormal one.
    underflow = info.smallest_normal * info.eps
    size = truth.abs().amax(-1)
    resolved = ~dead & (size > 64 * 2.0**-24 * (1 + logits) * slopes)
    unresolved = ~dead & ~resolved
    directed = resolved & (size > 1e3 * underflow)

    def errors(x: Tensor) -> dict[str, Tensor]:
        error = x.double() - truth
        largest = (error.abs().amax(-1) - underflow).clamp(min=0)
        l2 = (error.norm(dim=-1) - underflow * truth.shape[-1] ** 0.5).clamp(min=0)
        cosine = torch.cosine_similarity(x.double() / size[:, None], truth / size[:, None], dim=-1)
        return {
            "largest error of a row": (largest / size)[resolved],
            "L2 error of a row": (l2 / truth.norm(dim=-1))[resolved],
            "direction of a row": (1 - cosine).clamp(min=0).sqrt()[directed],
            "error of a row that nearly vanishes": (largest / slopes)[unresolved],
        }

    theirs = [errors(x) for x in eager]
    for name, mine in errors(actual).items():
        rounding = info.eps / 2 if "vanishes" not in name else 4 * 2.0**-24
        _assert_below(mine, max([rounding, *(2 * float(x[name].max()) for x in theirs if x[name].numel())]), name)


def assert_as_accurate(actual: Tensor, eager: Tensor, truth: Tensor, size: Tensor | float = 1.0) -> None:
    """Numbers on their own, float32, relative to the size of what they were computed from."""
    assert bool((torch.isfinite(actual) == torch.isfinite(truth)).all()), f"{actual} against {truth}"
    finite = torch.isfinite(truth)
    size = torch.maximum(truth.abs(), torch.as_tensor(size, dtype=torch.float64).expand_as(truth))[finite]
    error, other = ((x[finite].double() - truth[finite]).abs() / size for x in (actual, eager))
    _assert_below(
        error, max(2 * float(other.max()), 2 * torch.finfo(torch.float32).eps) if error.numel() else 0, "error"
    )


def _assert_below(error: Tensor, allowed: float, what: str) -> None:
    assert not error.numel() or bool((error <= allowed).all()), (
        f"{what}: {error.amax():.3e} where {allowed:.3e} is allowed (at {int(error.argmax())})"
    )
