"""Perplexity in plain float64 numpy, written without looking at ara.evaluation: slow, obvious, one token at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def window_nlls(logits: NDArray[np.float64], ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (b,) mean negative log-likelihoods, nats per predicted token, of logits (b, t, v) and ids (b, t)."""
    result = []
    for window, tokens in zip(logits, ids, strict=True):
        losses = []
        for scores, target in zip(window[:-1], tokens[1:], strict=True):
            shifted = scores - scores.max()
            losses.append(np.log(np.exp(shifted).sum()) - shifted[target])
        result.append(np.mean(losses))
    return np.array(result)


def perplexity(logits: NDArray[np.float64], ids: NDArray[np.int64]) -> float:
    """Return exp of the mean negative log-likelihood over all predicted tokens of all windows."""
    return float(np.exp(window_nlls(logits, ids).mean()))
