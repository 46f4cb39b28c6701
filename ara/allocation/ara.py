"""ARA: ranks by training staircase masks (Adaptive Rank Allocation, arXiv 2510.19389); see :mod:`ara.masks`.

With the objective ``priced`` (ours) a training leaves the loss of every rank of every layer, and any budget is met by
the exact knapsack over it. With ``paper`` it leaves ranks, rescaled to its budget.
"""

from __future__ import annotations

from collections.abc import Sequence

from ara.allocation.base import Allocator
from ara.config import MaskTrainingOptions
from ara.masks.ara_family import ara_family, needs_table, sensitivity_table
from ara.masks.context import TuningContext
from ara.masks.loop import trained_allocation
from ara.masks.rank_losses import nearest
from ara.solver.knapsack import best_ranks
from ara.solver.problem import Allocation, Budget, Module


class Ara(Allocator):
    """Learned ranks."""

    Options = MaskTrainingOptions
    needs_model = True

    def allocate(self, modules: Sequence[Module], budget: Budget, context: TuningContext | None = None) -> Allocation:
        """Meet the budget with what was learned; trains here and now when nothing was."""
        assert context is not None and isinstance(self.options, MaskTrainingOptions)
        if context.learned:
            specs = [module.spec for module in modules]
            total = sum(budget.dense_cost(spec) for spec in specs)
            keep = budget.limit / total
            used = nearest(context.learned, keep)
            # Budgets are whole numbers of parameters, or of bytes.
            if abs(used.keep - keep) * total > 1:
                context.report.fact(f"keep {keep:.4g} was not trained: going by what was learned at {used.keep:g}")
            return used.allocation(specs, budget)
        table = sensitivity_table(context).losses if needs_table(self.options) else None
        family = ara_family(self.options, modules, budget, table)
        return trained_allocation(family, context, self.options, "Training masks")

    def starts(self, modules: Sequence[Module], budget: Budget, context: TuningContext) -> dict[str, Allocation]:
        """Return what the sensitivity table alone would give."""
        if context.table is None:
            return {}
        return {"sensitivity": best_ranks([module.spec for module in modules], context.table, budget)}
