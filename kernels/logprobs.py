"""logprobs: log-probabilities and entropies without gradient."""

import torch
from capo.kernels.launch import check_vocab, on_device
from capo.kernels.stats import row_stats

from capo import reference
from capo.backends import checks_values


def logprobs(logits, labels, temperature, mask):
    """Log-probability of each label and entropy of each row."""
    rows, vocab = logits.shape
    check_vocab("logprobs", vocab)
    if checks_values(logits.device.type):
        reference.check_rows("logprobs", logits, labels, mask)
    values, entropy = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    if rows:
        with on_device(logits):
            row_stats(logits, labels, mask, values, entropy, None, temperature)
    return values, entropy
