"""What all trainings share: the order of their windows, and when they diverge.

The order is a function of seed and step, so that a resumed training reads the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ara.errors import NumericalError

# A training diverges if this many checks in a row exceed the first held-out loss by this much, nats per token.
_DIVERGED_NATS = 2.0
_DIVERGED_CHECKS = 2
# Distance between the seeds of trainings; more than a training has steps or epochs.
SEED_STRIDE = 1_000_003


def batch_indices(count: int, batch: int, step: int, seed: int) -> torch.Tensor:
    """Return the indices of the windows of a step: all ``count`` windows in random order, epoch after epoch."""
    indices = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, count)
        generator = torch.Generator().manual_seed(seed * SEED_STRIDE + epoch)
        indices.append(int(torch.randperm(count, generator=generator)[place]))
    return torch.tensor(indices)


def check_divergence(checks: Sequence[float], hint: str) -> None:
    """Check the held-out losses of a training; losses of batches also differ by their text.

    Args:
        checks: held-out losses, nats per token, the first one from the start.
        hint: what to change.

    Raises:
        NumericalError: the latest ones are far above the first one.
    """
    first, *later = checks
    if len(later) < _DIVERGED_CHECKS:
        return
    grown = min(later[-_DIVERGED_CHECKS:]) - first
    if grown > _DIVERGED_NATS:
        raise NumericalError(
            f"the training diverges: the held-out loss has grown by {grown:.1f} nats per token since the start", hint
        )
