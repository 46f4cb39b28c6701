"""How far from a cut its model of the loss is believed: no layer falls below half of the rank that it has there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ara.models.weights import LinearSpec
from ara.solver.problem import Allocation

# Share of its rank that a layer keeps at least.
_LEAST = 0.5
# Loss, nats, of rank 0 beside what the table says, where a rank below the floor is all that a budget can pay.
_BARRIER = 10.0


def floors_below(specs: Sequence[LinearSpec], around: Allocation) -> torch.Tensor:
    """Return half of the rank of every layer, rounded up: (L) int64.

    A dense layer counts as one of the highest rank that costs less: else, with k(m + n) parameters for rank k and a
    square layer, half of its rank would cost as much as dense, and it could never leave it.
    """
    ranks = (around.ranks[spec.name] for spec in specs)
    # Also above what pays: the cut may be one of another layout.
    highest = [
        spec.top_rank if rank is None else min(rank, spec.top_rank) for spec, rank in zip(specs, ranks, strict=True)
    ]
    return (_LEAST * torch.tensor(highest, dtype=torch.float64)).ceil().long()


def above_floors(
    specs: Sequence[LinearSpec], tables: Mapping[str, torch.Tensor], floors: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return tables with a barrier in front of ranks below the floors: 10 (1 − k / floor)² nats on the floor's own.

    The barrier is finite: a budget may leave no other choice.

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
