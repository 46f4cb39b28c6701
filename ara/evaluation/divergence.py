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


def mean_divergence(dense: torch.Tensor, logits: torch.Tensor) -> tuple[float, float]:
    """Return the mean KL over positions in nats per token, and the share of positions with the same most likely token.

    Args:
        dense: (t, v) logits of the dense model, at least one position.
        logits: (t, v) logits of the other model.

    Returns:
        KL is NaN if a logit is NaN, and infinite if only the other model gives a token the probability 0.
    """
    length, rows = len(dense), chunk_rows(dense)
    kl, same = 0.0, 0
    for start in range(0, length, rows):
        ours, theirs = dense[start : start + rows], logits[start : start + rows].to(dense.device)
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        kl += float(divergence(ours, theirs)[0].cpu().sum(dtype=torch.float64))
    return kl / length, same / length


def window_divergence(dense: torch.Tensor, logits: torch.Tensor) -> list[tuple[float, float]]:
    """Return KL and agreement of each window, without the last position, which perplexity does not count either.

    Args:
        dense: (b, t, v) logits of the dense model.
        logits: (b, t, v) logits of the other model.

    Returns:
        Per window the figures of :func:`mean_divergence`.
    """
    return [mean_divergence(ours[:-1], theirs[:-1]) for ours, theirs in zip(dense, logits, strict=True)]


def summarise_divergence(windows: Sequence[tuple[float, float]]) -> Divergence:
    """Return the mean over at least one window or conversation; each counts the same."""
    kls = [kl for kl, _ in windows]
    stderr = statistics.stdev(kls) / math.sqrt(len(kls)) if len(kls) > 1 else None
    return Divergence(statistics.fmean(kls), stderr, statistics.fmean(same for _, same in windows))
