"""What a training leaves behind, and how a budget is met with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ara.allocation.allocation import Allocation
from ara.allocation.budget import Budget
from ara.allocation.optimum import best_ranks
from ara.allocation.rounding import proportional
from ara.masks.paper import shares_of
from ara.models.linears import LinearSpec


@dataclass(frozen=True, eq=False)
class LearnedLosses:
    """The loss of every rank of every layer, as a training has found it.

    Attributes:
        keep: the budget that it was trained at.
        tables: module path → (r + 1) float64; entry k is the loss of keeping k components, the last that of dense.
            ``None`` after a training of the paper's form, which leaves only ranks.
        ranks: the best allocation at that budget.
    """

    keep: float
    tables: Mapping[str, torch.Tensor] | None
    ranks: Allocation

    def allocation(self, specs: Sequence[LinearSpec], budget: Budget) -> Allocation:
        """Return the exact optimum for these losses under any budget; without losses, rescale the ranks to it."""
        if self.tables is not None:
            return best_ranks(specs, self.tables, budget)
        shares = shares_of(specs, self.ranks.ranks)
        return proportional(specs, [shares[spec.name] for spec in specs], budget, keep_dense=True)


def nearest(learned: Sequence[LearnedLosses], keep: float) -> LearnedLosses:
    """Return the training whose budget is nearest to ``keep``; of two equally near ones that of the larger budget."""
    return min(learned, key=lambda losses: (abs(losses.keep - keep), -losses.keep))
