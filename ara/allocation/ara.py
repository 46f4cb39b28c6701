"""ARA: ranks by training staircase masks (Adaptive Rank Allocation, arXiv 2510.19389); see :mod:`ara.masks`.

With the objective ``priced`` (ours) a training learns the loss of every rank of every layer. For any budget the exact
knapsack over these losses gives the ranks. With ``paper`` it learns ranks, which are rescaled to the budget.
"""

from __future__ import annotations

from collections.abc import Sequence

from ara.allocation.base import Allocator
from ara.config import MaskTrainingOptions
from ara.config.latency import OBJECTIVES
from ara.errors import UsageError
from ara.masks.ara_family import ara_family, needs_table
from ara.masks.context import TuningContext
from ara.masks.loop import trained_allocation
from ara.masks.rank_losses import nearest
from ara.masks.sensitivity_table import sensitivity_table
from ara.solver.knapsack import best_ranks
from ara.solver.problem import Allocation, Budget, Module


class Ara(Allocator):
    """Learned ranks."""

    Options = MaskTrainingOptions
    needs_model = True
    objectives = OBJECTIVES

    def allocate(self, modules: Sequence[Module], budget: Budget, context: TuningContext | None = None) -> Allocation:
        """Allocate by the learned losses; without any, train first."""
        assert context is not None and isinstance(self.options, MaskTrainingOptions)
        if context.learned:
            specs = [module.spec for module in modules]
            total = sum(budget.dense_cost(spec) for spec in specs)
            keep = budget.limit / total
            used = nearest(context.learned, keep)
            if used.tables is None and budget.unit == "nanoseconds":
                raise UsageError(
                    "a training of the paper's form has no losses of ranks, which --objective latency needs",
                    "train with --objective priced, or use --method sensitivity",
                )
            # Budgets are whole numbers of parameters, bytes or nanoseconds.
            if abs(used.keep - keep) * total > 1:
                context.report.fact(f"there is no training at keep {keep:.4g}: the one at {used.keep:g} is used")
            return used.allocation(specs, budget)
        table = sensitivity_table(context).values if needs_table(self.options) else None
        family = ara_family(self.options, modules, budget, table)
        return trained_allocation(family, context, self.options, "Training masks")

    def starts(self, modules: Sequence[Module], budget: Budget, context: TuningContext) -> dict[str, Allocation]:
        """Return the allocation by the sensitivity table alone."""
        if context.table is None:
            return {}
        return {"sensitivity": best_ranks([module.spec for module in modules], context.table, budget)}
