"""The functions of the Triton backend."""

from capo.kernels.credit import credit
from capo.kernels.linear import cap_rows, loss_terms, row_grads, row_logprobs, row_stats, workspace
from capo.kernels.logprobs import logprobs
from capo.kernels.policy_loss import new_gradient, policy_loss
from capo.kernels.product import add_product, add_sum, rows_product
from capo.kernels.scale import scale_

__all__ = [
    "add_product", "add_sum", "cap_rows", "credit", "logprobs", "loss_terms", "new_gradient", "policy_loss", "row_grads",
    "row_logprobs", "row_stats", "rows_product", "scale_", "workspace",
]  # fmt: skip
