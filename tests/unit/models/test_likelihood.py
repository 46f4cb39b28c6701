"""Likelihoods against NumPy in float64, on vocabularies of real size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ara.models.likelihood import divergence, log_normaliser, softmax, token_nll, wide_sum
from ara.models.losses import token_losses

VOCABULARY = 49_152


def _logits(rows: int, vocabulary: int = VOCABULARY, seed: int = 0) -> torch.Tensor:
    """Return logits as language models have them: a few tokens far above a broad mass."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2.5 * torch.randn(rows, vocabulary, generator=generator) - 4
    logits[:, :20] += 9
    return logits


def _log_softmax(logits: torch.Tensor) -> np.ndarray:
    values = logits.double().numpy()
    shifted = values - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_over_a_text_has_no_bias(dtype: torch.dtype) -> None:
    """1e-7 nats per token, where torch's float32 log-softmax is off by 2e-5 on processors with AVX2."""
    logits = _logits(64).to(dtype)
    targets = torch.randint(VOCABULARY, (64,), generator=torch.Generator().manual_seed(1))
    expected = -_log_softmax(logits)[np.arange(64), targets.numpy()]
    nll = token_nll(logits, targets)
    assert nll.dtype == torch.float64
    assert abs(float(nll.mean()) - expected.mean()) < 1e-7
    np.testing.assert_allclose(nll.numpy(), expected, rtol=0, atol=5e-7)
    np.testing.assert_allclose(log_normaliser(logits).numpy(), softmax(logits)[1].numpy(), rtol=0, atol=0)


@pytest.mark.parametrize("vocabulary", [1, 7, 255, 256, 257, 1000])
def test_any_width(vocabulary: int) -> None:
    logits = _logits(3, vocabulary)
    probabilities, normaliser = softmax(logits)
    np.testing.assert_allclose(np.log(probabilities.double().numpy()), _log_softmax(logits), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(probabilities.double().sum(-1), 1, rtol=1e-6)
    torch.testing.assert_close(normaliser, logits.double().logsumexp(-1), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(wide_sum(logits), logits.double().sum(-1), rtol=1e-5, atol=1e-5)


def test_small_divergences_are_exact() -> None:
    """Of models that hardly differ, and whose logits differ by a constant besides."""
    dense = _logits(16)
    model = dense + 1e-3 * _logits(16, seed=1) + 5
    q, p = _log_softmax(dense), _log_softmax(model)
    expected = (np.exp(q) * (q - p)).sum(-1)
    assert 1e-7 < expected.mean() < 1e-4
    found = divergence(dense, model)[0].numpy()
    # Single logits around 10 are rounded to 5e-7; of the mean a tenth of that is left.
    assert abs(found.mean() - expected.mean()) < 2e-7
    assert not divergence(dense, dense)[0].any()


def test_nan_and_excluded_tokens() -> None:
    logits = _logits(2, 11)
    logits[0, 3] = math.nan
    logits[1, 4] = -math.inf
    nll = token_nll(logits, torch.tensor([5, 5]))
    assert math.isnan(nll[0]) and math.isfinite(nll[1])
    whole = _logits(2, 11)
    assert math.isinf(divergence(whole, logits)[0][1]) and math.isfinite(divergence(logits, whole)[0][1])


def test_training_losses_have_no_bias_either() -> None:
    logits = _logits(33)[None].requires_grad_()
    teacher, ids = _logits(33, seed=2)[None], torch.randint(VOCABULARY, (1, 33))
    p, q = _log_softmax(logits.detach()[0, :-1]), _log_softmax(teacher[0, :-1])
    losses = token_losses(logits, ids)
    assert abs(float(losses.detach().double().mean()) + p[np.arange(32), ids[0, 1:].numpy()].mean()) < 2e-7
    kl = token_losses(logits, ids, teacher)
    assert float(kl.detach().double().mean()) == pytest.approx((np.exp(q) * (q - p)).sum(-1).mean(), abs=1e-6)
    losses.sum().backward()
    gradient = logits.grad
    assert gradient is not None
    # Probabilities add up to 1, so the gradient of every position adds up to 0.
    assert float(gradient[0, :-1].double().sum(-1).abs().max()) < 1e-6
