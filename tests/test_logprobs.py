"""logprobs: log-probabilities and entropies without gradient."""

import math

import numerics
import pytest
import torch

import capo
from capo.reference import label_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("vocab", [1, 2, 33, 4096, 32_003])
def test_as_accurate_as_eager(dtype, temperature, vocab, device):
    logits = (3 * torch.randn(9, vocab)).to(dtype)
    logits[3, vocab // 2] += 30.0
    labels = torch.randint(0, vocab, (9,))
    actual = [x.cpu() for x in capo.logprobs(logits.to(device), labels.to(device), temperature)]
    eager = label_logprobs(logits, labels, temperature)
    truth = label_logprobs(logits.double(), labels, temperature)
    size = logits.double().abs().amax(-1) / temperature
    for mine, theirs, exact in zip(actual, eager, truth, strict=True):
        assert mine.dtype == torch.float32 and not mine.requires_grad
        numerics.assert_as_accurate(mine, theirs, exact, size)


def test_masked_rows_are_not_read(device):
    logits = torch.randn(6, 100)
    labels = torch.randint(0, 100, (6,))
    mask = torch.tensor([True, False, True, True, False, True])
    expected = capo.logprobs(logits.to(device), labels.to(device))
    logits[~mask] = math.nan
    labels[~mask] = -100
    actual = capo.logprobs(logits.to(device), labels.to(device), mask=mask.to(device))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.cpu()[mask], e.cpu()[mask]) and not a.cpu()[~mask].any()


def test_strided_and_padded_vocabularies(device):
    logits = torch.randn(7, 130).to(device)
    labels = torch.randint(0, 100, (7,)).to(device)
    expected = capo.logprobs(logits[:, :100].contiguous(), labels)
    assert torch.equal(capo.logprobs(logits[:, :100], labels)[0], expected[0])
    logits[:, 100:] = -math.inf  # ids beyond the tokenizer
    padded = capo.logprobs(logits, labels)
    torch.testing.assert_close(padded[0], expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(padded[1], expected[1], rtol=1e-6, atol=1e-6)


def test_bad_arguments_are_named(device):
    logits, labels = torch.randn(3, 5).to(device), torch.zeros(3, dtype=torch.int64).to(device)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be finite and above 0"):
            capo.logprobs(logits, labels, temperature)
    with pytest.raises(ValueError, match="label 5 in row 0 is outside the vocabulary of 5"):
        capo.logprobs(logits, labels + 5)
    with pytest.raises(ValueError, match=r"mask must be \[3\]"):
        capo.logprobs(logits, labels, mask=torch.ones(2, dtype=torch.bool))


def test_nothing(device):
    logp, entropy = capo.logprobs(torch.empty(0, 4, device=device), torch.empty(0, dtype=torch.int64, device=device))
    assert logp.shape == entropy.shape == (0,)
