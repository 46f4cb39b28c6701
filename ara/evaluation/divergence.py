"""Divergence of a model's predictions from the dense model's.

A compressed model can have the same perplexity and still make different predictions (arXiv 2407.09141). Over all
positions of a text:

    KL         = mean of KL(dense ‖ model)            nats per token
    agreement  = share of positions with the same most likely token
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ara.models.likelihood import chunk_rows, divergence


@dataclass(frozen=True)
class Divergence:
    """Distance from the dense model on one text, or on the answers of conversations.

    Attributes:
        kl: mean KL(dense ‖ model), nats per token.
        kl_stderr: its standard error over windows or conversations; ``None`` for a single one.
        agreement: share of positions with the same most likely token.
    """

    kl: float
    kl_stderr: float | None
    agreement: float


class DivergenceSum:
    """Sums KL and agreement over positions, chunk by chunk."""

    def __init__(self) -> None:
        self._kl, self._same, self._count = 0.0, 0, 0

    def add(self, dense: torch.Tensor, logits: torch.Tensor) -> None:
        """Add positions.

        Args:
            dense: (t, v) logits of the dense model.
            logits: (t, v) logits of the other model.
        """
        rows = chunk_rows(dense)
        for start in range(0, len(dense), rows):
            ours, theirs = dense[start : start + rows], logits[start : start + rows].to(dense.device)
            self._same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            self._kl += float(divergence(ours, theirs)[0].cpu().sum(dtype=torch.float64))
        self._count += len(dense)

    def mean(self) -> tuple[float, float]:
        """Return the mean KL over at least one position in nats per token, and the share with the same likeliest token.

        KL is NaN if a logit is NaN, and infinite if only the other model gives a token the probability 0.
        """
        return self._kl / self._count, self._same / self._count


def summarise_divergence(windows: Sequence[tuple[float, float]]) -> Divergence:
    """Return the mean over at least one window or conversation; each counts the same."""
    kls = [kl for kl, _ in windows]
    stderr = statistics.stdev(kls) / math.sqrt(len(kls)) if len(kls) > 1 else None
    return Divergence(statistics.fmean(kls), stderr, statistics.fmean(same for _, same in windows))
