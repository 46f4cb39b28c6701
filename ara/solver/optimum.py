"""From the loss of every rank of every layer to the ranks of least summed loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ara.models.weights import LinearSpec
from ara.solver.budget import Budget
from ara.solver.knapsack import exact_minimise
from ara.solver.problem import Allocation


def best_ranks(specs: Sequence[LinearSpec], tables: Mapping[str, torch.Tensor], budget: Budget) -> Allocation:
    """Return the allocation of least summed loss under the budget.

    Args:
        specs: the layers.
        tables: module path → (r + 1) float64, the loss of keeping k components; the last entry is
            that of dense.
        budget: the limit.
    """
    choices = [budget.choices(spec) for spec in specs]
    losses = [
        tables[spec.name][[spec.full_rank if rank is None else rank for rank, _ in options]]
        for spec, options in zip(specs, choices, strict=True)
    ]
    picks = exact_minimise(specs, losses, budget)
    return Allocation.from_picks(specs, picks, budget)
