"""The one tolerance rule: a kernel may err at most twice as much as eager PyTorch of the same dtype errs.

The truth is float64. Errors are taken row by row, relative to the row, and eager's error is that of its worst row: one row of
eager is exact by luck. There is no fixed tolerance but the rounding of the result itself.
"""

import torch
from torch import Tensor


def assert_rows_as_accurate(
    actual: Tensor, eager: list[Tensor], truth: Tensor, slopes: Tensor, logits: Tensor, terms: Tensor | None = None
) -> None:
    """Every row: largest error, relative L2 error and direction.

    A row that is hardly above float32's resolution, because the label's probability is 1 but for that, has few digits to
    compare: its error is taken relative to d loss / d logp instead of itself. A row whose terms cancel has lost the digits
    that they share, in any arithmetic: with ``terms`` its error is taken relative to these. All other rows are measured
    as without, and eager on the same scale, so that its errors in rows that cancel allow none elsewhere.

    Args:
        actual: [N, V] of the kernel.
        eager: [N, V] each, of ways to write it in eager PyTorch.
        truth: [N, V] float64.
        slopes: [N], size of d loss / d logp.
        logits: [N], size of the scaled logits.
        terms: [N, V] float64, root of the sum of squares of what each number is the sum of; None: of no interest.
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
    norm = truth.norm(dim=-1)
    of_size, of_norm = torch.ones_like(size), torch.ones_like(norm)
    if terms is not None:
        assert terms.dtype == torch.float64 and terms.shape == truth.shape
        of_size, of_norm = (size / terms.amax(-1)).clamp(max=1), (norm / terms.norm(dim=-1)).clamp(max=1)
    # A row is its own scale, or this part of it.
    shares = {
        "largest error of a row": of_size[resolved],
        "L2 error of a row": of_norm[resolved],
        "direction of a row": of_norm[directed],
        "error of a row that nearly vanishes": of_size[unresolved],
    }

    def errors(x: Tensor) -> dict[str, Tensor]:
        error = x.double() - truth
        largest = (error.abs().amax(-1) - underflow).clamp(min=0)
        l2 = (error.norm(dim=-1) - underflow * truth.shape[-1] ** 0.5).clamp(min=0)
        cosine = torch.cosine_similarity(x.double() / size[:, None], truth / size[:, None], dim=-1)
        found = {
            "largest error of a row": (largest / size)[resolved],
            "L2 error of a row": (l2 / norm)[resolved],
            "direction of a row": (1 - cosine).clamp(min=0).sqrt()[directed],
            "error of a row that nearly vanishes": (largest / slopes)[unresolved],
        }
        return {name: error * shares[name] for name, error in found.items()}

    theirs = [errors(x) for x in eager]
    for name, mine in errors(actual).items():
        rounding = info.eps / 2 if "vanishes" not in name else 4 * 2.0**-24
        worst = max([0.0, *(2 * float(x[name].max()) for x in theirs if x[name].numel())])
        _assert_below(mine, (rounding * shares[name]).clamp(min=worst), name)


def assert_as_accurate(actual: Tensor, eager: Tensor, truth: Tensor, size: Tensor | float = 1.0) -> None:
    """Numbers on their own, float32, relative to the size of what they were computed from."""
    assert bool((torch.isfinite(actual) == torch.isfinite(truth)).all()), f"{actual} against {truth}"
    finite = torch.isfinite(truth)
    size = torch.maximum(truth.abs(), torch.as_tensor(size, dtype=torch.float64).expand_as(truth))[finite]
    error, other = ((x[finite].double() - truth[finite]).abs() / size for x in (actual, eager))
    if error.numel():
        allowed = max(2 * float(other.max()), 2 * torch.finfo(torch.float32).eps)
        _assert_below(error, torch.full_like(error, allowed), "error")


def _assert_below(error: Tensor, allowed: Tensor, what: str) -> None:
    if not bool((error <= allowed).all()):
        at = int(torch.where(error <= allowed, 0.0, error / allowed).argmax())
        raise AssertionError(f"{what}: {error[at]:.3e} where {allowed[at]:.3e} is allowed (at {at})")
