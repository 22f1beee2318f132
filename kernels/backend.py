"""The functions of the Triton backend."""

from capo.kernels.credit import credit
from capo.kernels.logprobs import logprobs
from capo.kernels.policy_loss import new_gradient, policy_loss

__all__ = ["credit", "logprobs", "new_gradient", "policy_loss"]
