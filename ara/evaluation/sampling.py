"""Draws the next token of a text from a model's logits, by temperature and top-p.

The processor draws in float64 for every backend. So the same logits and seed give the same token, wherever the model
runs.
"""

from __future__ import annotations

import numpy as np


class Sampler:
    """Draws tokens; one generator of random numbers for all of them.

    Args:
        temperature: divides the logits; greater than 0. Below 1 likely tokens become more likely.
        top_p: share of the probability, in (0, 1], that may be drawn: the likeliest tokens that together reach it
            (nucleus sampling, arXiv 1904.09751). 1 leaves nothing out.
        seed: of the random numbers.
    """

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        self.temperature, self.top_p = temperature, top_p
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> int:
        """Return a token id drawn by logits (v), of which the greatest is finite; −∞ excludes a token."""
        probabilities = token_probabilities(logits, self.temperature, self.top_p)
        drawable = np.flatnonzero(probabilities)
        reached = probabilities[drawable].cumsum()
        # The sum may be a rounding error below or above 1.
        place = np.searchsorted(reached, self._random.random() * reached[-1], side="right")
        return int(drawable[min(int(place), len(drawable) - 1)])


def token_probabilities(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Return the probabilities (v) float64 by which tokens are drawn; see :class:`Sampler`.

    Tokens of equal probability at the limit of ``top_p`` are taken in the order of their ids.
    """
    shifted = logits.astype(np.float64) - np.float64(logits.max())
    with np.errstate(over="ignore", under="ignore"):  # a tiny temperature gives 0 and −∞
        weights: np.ndarray = np.exp(shifted / temperature)
    probabilities = weights / weights.sum()
    if top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = probabilities[order].cumsum() - probabilities[order]
        probabilities[order[before >= top_p]] = 0
        probabilities /= probabilities.sum()
    return probabilities
