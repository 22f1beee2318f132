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
    "OutsideFences": "capo.steps",
    "PolicyInputs": "capo.patch",
    "PolicyLoss": "capo.losses",
    "StepCredit": "capo.shaping",
    "Steps": "capo.steps",
    "TokenBytes": "capo.steps",
    "linear_logprobs": "capo.losses",
    "linear_policy_loss": "capo.losses",
    "live_rows": "capo.losses",
    "logprobs": "capo.losses",
    "loss_shares": "capo.distributed",
    "patch_causal_lm": "capo.patch",
    "policy_loss": "capo.losses",
    "segment": "capo.steps",
    "shape": "capo.shaping",
    "use_backend": "capo.backends",
}
_MODULES = ("critique", "reference", "score", "verify")

if TYPE_CHECKING:
    from capo import critique as critique
    from capo import reference as reference
    from capo import score as score
    from capo import verify as verify
    from capo.backends import use_backend as use_backend
    from capo.credit import Credit as Credit
    from capo.credit import CreditRule as CreditRule
    from capo.distributed import loss_shares as loss_shares
    from capo.losses import LossRule as LossRule
    from capo.losses import PolicyLoss as PolicyLoss
    from capo.losses import linear_logprobs as linear_logprobs
    from capo.losses import linear_policy_loss as linear_policy_loss
    from capo.losses import live_rows as live_rows
    from capo.losses import logprobs as logprobs
    from capo.losses import policy_loss as policy_loss
    from capo.patch import PolicyInputs as PolicyInputs
    from capo.patch import patch_causal_lm as patch_causal_lm
    from capo.shaping import StepCredit as StepCredit
    from capo.shaping import shape as shape
    from capo.steps import OutsideFences as OutsideFences
    from capo.steps import Steps as Steps
    from capo.steps import TokenBytes as TokenBytes
    from capo.steps import segment as segment


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"capo.{name}")
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'capo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS, *_MODULES])
