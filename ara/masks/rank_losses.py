"""What a training leaves behind, and how a budget is met with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ara.masks.paper import shares_of
from ara.masks.trust_region import above_floors, floors_below
from ara.models.weights import LinearSpec
from ara.solver.knapsack import best_ranks
from ara.solver.problem import Allocation, Budget
from ara.solver.rounding import proportional


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
        """Return the ranks for any budget.

        Under the budget of the training these are its best ones, under another one the exact optimum for the losses
        within their reach (:mod:`ara.masks.trust_region`); without losses, the ranks are rescaled.
        """
        if self.tables is not None:
            met = budget.met_by(specs, self.ranks.ranks)
            if met is not None:
                return met
            return best_ranks(specs, above_floors(specs, self.tables, floors_below(specs, self.ranks)), budget)
        shares = shares_of(specs, self.ranks.ranks)
        return proportional(specs, [shares[spec.name] for spec in specs], budget, keep_dense=True)


def nearest(learned: Sequence[LearnedLosses], keep: float) -> LearnedLosses:
    """Return the training whose budget is nearest to ``keep``; of two equally near ones that of the larger budget."""
    # 0.8 and 0.6 are equally near to 0.7, whatever binary fractions and whole parameters make of them.
    return min(learned, key=lambda losses: (round(abs(losses.keep - keep), 4), -losses.keep))
