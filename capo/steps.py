"""Steps of packed responses: the type, and how steps are found in token ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Steps:
    """Half-open token ranges of the steps of B packed responses.

    The steps of response ``i`` are ``cu_steps[i]:cu_steps[i + 1]``; within a response they are in order and do not
    overlap. A token in no range belongs to no step (weight 0).

    Args:
        starts: [M] integer, first token of each step, in packed coordinates.
        ends: [M] integer, one past the last token of each step.
        cu_steps: [B + 1] integer, cumulative number of steps per response.
    """

    starts: Tensor
    ends: Tensor
    cu_steps: Tensor

    def __post_init__(self) -> None:
        for name in ("starts", "ends", "cu_steps"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"Steps: {name} must be a 1-D int32 or int64 tensor, got {_describe(value)}")
            object.__setattr__(self, name, value.to(torch.int64).contiguous())
        if self.starts.shape != self.ends.shape:
            raise ValueError(
                f"Steps: starts {list(self.starts.shape)} and ends {list(self.ends.shape)} differ in length"
            )
        if self.cu_steps.numel() == 0:
            raise ValueError("Steps: cu_steps is empty; for B responses it has B + 1 entries, the first of them 0")

    def to(self, device: torch.device | str) -> Steps:
        """The same steps on another device."""
        return Steps(self.starts.to(device), self.ends.to(device), self.cu_steps.to(device))


def _describe(value: object) -> str:
    return (
        f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r:.80}"
    )
