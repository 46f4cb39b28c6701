"""Trust region: the local loss model holds down to half of each layer's rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ara.models.weights import LinearSpec
from ara.solver.problem import Allocation

# Least share of its rank that a layer keeps.
_LEAST = 0.5
# Additional loss of rank 0, nats.
_BARRIER = 10.0


def floors_below(specs: Sequence[LinearSpec], around: Allocation) -> torch.Tensor:
    """Return half of the rank of every layer, rounded up: (L) int64.

    A dense layer counts as its highest rank that costs less than dense. With full rank instead, half of it could cost
    as much as dense (rank k of a square layer has k(m + n) parameters), and the layer would always stay dense.
    """
    ranks = (around.ranks[spec.name] for spec in specs)
    # The cut may be from another layout, with ranks that cost more than dense here.
    highest = [
        spec.top_rank if rank is None else min(rank, spec.top_rank) for spec, rank in zip(specs, ranks, strict=True)
    ]
    return (_LEAST * torch.tensor(highest, dtype=torch.float64)).ceil().long()


def above_floors(
    specs: Sequence[LinearSpec], tables: Mapping[str, torch.Tensor], floors: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return tables with a barrier below the floors: rank k < floor loses 10 (1 − k / floor)² nats more than the floor.

    The barrier is finite, because a small budget may require ranks below the floors.

    Args:
        specs: the layers.
        tables: module path → (r + 1) float64, the loss of every rank, nats per token.
        floors: (L) int64.
    """
    guarded = {}
    for spec, floor in zip(specs, floors.tolist(), strict=True):
        table = tables[spec.name].clone()
        below = torch.arange(floor, dtype=torch.float64)
        table[:floor] = torch.maximum(table[:floor], table[floor]) + _BARRIER * (1 - below / max(floor, 1)).square()
        guarded[spec.name] = table
    return guarded
