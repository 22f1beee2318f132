"""The one tolerance rule: a kernel may err at most twice as much as eager PyTorch of the same dtype errs.

The truth is float64. There is no fixed tolerance: where eager is exact by luck, half a unit in the last place of the row's
largest value is allowed.
"""

import torch
from torch import Tensor


def assert_rows_as_accurate(actual: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Every row: largest error, relative L2 error and direction. [N, V] each, truth in float64."""
    assert actual.dtype == eager.dtype and truth.dtype == torch.float64
    assert actual.shape == eager.shape == truth.shape
    assert bool(torch.isfinite(actual).all()), "not finite"
    half_ulp = torch.finfo(actual.dtype).eps / 2
    smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    scale = truth.abs().amax(-1)
    error, allowed = ((x.double() - truth).abs().amax(-1) for x in (actual, eager))
    _assert_below(error, torch.maximum(2 * allowed, 1.01 * half_ulp * scale + smallest), "largest error of a row")
    norm = truth.norm(dim=-1)
    error, allowed = ((x.double() - truth).norm(dim=-1) for x in (actual, eager))
    _assert_below(error, torch.maximum(2 * allowed, half_ulp * norm + smallest), "L2 error of a row")
    live = norm > 1e4 * smallest * actual.shape[-1] ** 0.5
    cosine, reference = (torch.cosine_similarity(x.double(), truth, dim=-1)[live] for x in (actual, eager))
    _assert_below(
        1 - cosine, torch.maximum(2 * (1 - reference), torch.tensor(half_ulp**2 + 1e-15)), "direction of a row"
    )
    _assert_zero_where_zero(actual, truth)


def assert_as_accurate(actual: Tensor, eager: Tensor, truth: Tensor, scale: Tensor | float = 0.0) -> None:
    """Numbers on their own, float32: error at most twice eager's, or one unit in the last place of the number.

    ``scale``: size of the numbers it was computed from, where that is larger.
    """
    assert bool((torch.isfinite(actual) == torch.isfinite(truth)).all()), f"{actual} against {truth}"
    finite = torch.isfinite(truth)
    actual, eager, truth = actual[finite].double(), eager[finite].double(), truth[finite]
    ulp = torch.finfo(torch.float32).eps * torch.maximum(truth.abs(), torch.as_tensor(scale, dtype=torch.float64))
    _assert_below((actual - truth).abs(), torch.maximum(2 * (eager - truth).abs(), ulp + 1e-12), "error")


def _assert_below(error: Tensor, allowed: Tensor, what: str) -> None:
    worst = (error / allowed.clamp(min=1e-300)).argmax() if error.numel() else None
    assert worst is None or bool((error <= allowed).all()), (
        f"{what}: {error[worst]:.3e} where {allowed[worst]:.3e} is allowed (index {int(worst)})"
    )


def _assert_zero_where_zero(actual: Tensor, truth: Tensor) -> None:
    dead = (truth == 0).all(-1)
    assert not actual[dead].any(), "a row without gradient was written to"
