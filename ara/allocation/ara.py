"""ARA: ranks by training staircase masks (Adaptive Rank Allocation, arXiv 2510.19389); see :mod:`ara.masks`.

With the objective ``priced`` (ours) a training leaves the loss of every rank of every layer, and any budget is met by
the exact knapsack over it. With ``paper`` it leaves ranks, rescaled to its budget.
"""

from __future__ import annotations

from collections.abc import Sequence

from ara.allocation.allocation import Allocation, Module
from ara.allocation.base import Allocator, Context
from ara.allocation.budget import Budget
from ara.allocation.optimum import best_ranks
from ara.config import MaskTrainingOptions
from ara.masks.ara import ara_family, needs_table, sensitivity_table
from ara.masks.learned import nearest
from ara.masks.training import trained_allocation


class Ara(Allocator):
    """Learned ranks."""

    Options = MaskTrainingOptions
    needs_model = True

    def allocate(self, modules: Sequence[Module], budget: Budget, context: Context | None = None) -> Allocation:
        """Meet the budget with what was learned; trains here and now when nothing was."""
        assert context is not None and isinstance(self.options, MaskTrainingOptions)
        if context.learned:
            specs = [module.spec for module in modules]
            total = sum(spec.dense_cost for spec in specs)
            keep = budget.parameters / total
            used = nearest(context.learned, keep)
            # Budgets are whole parameters.
            if abs(used.keep - keep) * total > 1:
                context.report.fact(f"keep {keep:.4g} was not trained: going by what was learned at {used.keep:g}")
            return used.allocation(specs, budget)
        table = sensitivity_table(context).losses if needs_table(self.options) else None
        family = ara_family(self.options, modules, budget, table)
        return trained_allocation(family, context, self.options, "Training masks")

    def starts(self, modules: Sequence[Module], budget: Budget, context: Context) -> dict[str, Allocation]:
        """Return what the sensitivity table alone would give."""
        if context.table is None:
            return {}
        return {"sensitivity": best_ranks([module.spec for module in modules], context.table, budget)}
