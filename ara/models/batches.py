"""The order of training windows: a function of seed and step, so that a resumed training reads the same batches."""

from __future__ import annotations

import torch

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
