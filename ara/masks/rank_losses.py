"""Rank losses: the result of a training, and the allocation that it gives for any budget."""

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
    """The loss of every rank of every layer, as learned by a training.

    Attributes:
        keep: the budget of the training.
        tables: module path → (r + 1) float64; entry k is the loss of keeping k components, the last that of dense.
            ``None`` for the paper's form, which learns only ranks.
        ranks: the best allocation at that budget.
    """

    keep: float
    tables: Mapping[str, torch.Tensor] | None
    ranks: Allocation

    def allocation(self, specs: Sequence[LinearSpec], budget: Budget) -> Allocation:
        """Return the allocation for any budget.

        For the budget of the training it is the training's best one. For another budget it is the exact optimum of the
        losses within the trust region (:mod:`ara.masks.trust_region`). Without losses the ranks are rescaled.
        """
        if self.tables is not None:
            met = budget.met_by(specs, self.ranks.ranks)
            if met is not None:
                return met
            return best_ranks(specs, above_floors(specs, self.tables, floors_below(specs, self.ranks)), budget)
        shares = shares_of(specs, self.ranks.ranks)
        return proportional(specs, [shares[spec.name] for spec in specs], budget, keep_dense=True)


def nearest(learned: Sequence[LearnedLosses], keep: float) -> LearnedLosses:
    """Return the result whose budget is nearest to ``keep``; of two equally near ones that of the larger budget."""
    # Rounded, so that 0.8 and 0.6 are equally near to 0.7 despite binary fractions.
    return min(learned, key=lambda losses: (round(abs(losses.keep - keep), 4), -losses.keep))
