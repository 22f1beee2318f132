"""Step-level credit assignment for LLM reinforcement learning (CAPO, arXiv 2508.02298).

The names below are the public API; each is imported on first use, so that ``import capo`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "Credit": "capo.credit",
    "CreditRule": "capo.credit",
    "LossRule": "capo.losses",
    "PolicyLoss": "capo.losses",
    "Steps": "capo.steps",
    "TokenBytes": "capo.steps",
    "logprobs": "capo.losses",
    "policy_loss": "capo.losses",
    "segment": "capo.steps",
    "use_backend": "capo.backends",
}
_MODULES = ("critique", "reference", "verify")
__all__ = [*_EXPORTS, *_MODULES]

if TYPE_CHECKING:
    from capo import critique, reference, verify
    from capo.backends import use_backend
    from capo.credit import Credit, CreditRule
    from capo.losses import LossRule, PolicyLoss, logprobs, policy_loss
    from capo.steps import Steps, TokenBytes, segment


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"capo.{name}")
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'capo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
