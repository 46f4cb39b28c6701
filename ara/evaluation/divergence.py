"""How far a model's predictions are from the dense model's: what perplexity cannot see.

A compressed model may predict the text as well as before and yet say something else (arXiv 2407.09141). Over all
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

from ara.models.likelihood import divergence

# Bytes of float32 logits that one chunk of rows may hold; as for perplexity.
_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Divergence:
    """Distance from the dense model on one text.

    Attributes:
        kl: mean KL(dense ‖ model), nats per token.
        kl_stderr: its standard error over windows; ``None`` for a single window.
        agreement: share of positions with the same most likely token.
    """

    kl: float
    kl_stderr: float | None
    agreement: float


def window_divergence(dense: torch.Tensor, logits: torch.Tensor) -> list[tuple[float, float]]:
    """Return KL and agreement of each window; the last position, whose prediction no perplexity counts, is left out.

    Args:
        dense: (b, t, v) logits of the dense model.
        logits: (b, t, v) of the other one.

    Returns:
        Per window the mean KL (nats per token; NaN where a logit is, infinite where the other model excludes a token
        that the dense one does not) and the share of equal most likely tokens.
    """
    windows, length, vocabulary = dense.shape
    rows = max(1, _CHUNK_BYTES // (4 * vocabulary))
    found = []
    for window in range(windows):
        kl, same = 0.0, 0
        for start in range(0, length - 1, rows):
            end = min(start + rows, length - 1)
            ours, theirs = dense[window, start:end], logits[window, start:end].to(dense.device)
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            kl += float(divergence(ours, theirs)[0].cpu().sum(dtype=torch.float64))
        found.append((kl / (length - 1), same / (length - 1)))
    return found


def summarise_divergence(windows: Sequence[tuple[float, float]]) -> Divergence:
    """Return the mean over windows of one length, of which there is at least one."""
    kls = [kl for kl, _ in windows]
    stderr = statistics.stdev(kls) / math.sqrt(len(kls)) if len(kls) > 1 else None
    return Divergence(statistics.fmean(kls), stderr, statistics.fmean(same for _, same in windows))
