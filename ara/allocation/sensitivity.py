"""Sensitivity allocation: the exact knapsack over the sensitivity table (:mod:`ara.masks.sensitivity_table`).

It needs no training. ARA starts from it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ara.allocation.base import Allocator
from ara.config.latency import OBJECTIVES
from ara.masks.context import TuningContext
from ara.masks.sensitivity_table import SensitivityOptions, sensitivity_table
from ara.solver.knapsack import best_ranks
from ara.solver.problem import Allocation, Budget, Module


class Sensitivity(Allocator):
    """Least summed loss by the sensitivity table."""

    Options = SensitivityOptions
    needs_model = True
    objectives = OBJECTIVES

    def allocate(self, modules: Sequence[Module], budget: Budget, context: TuningContext | None = None) -> Allocation:
        """Compute the table of the dense model and solve the knapsack."""
        assert context is not None and isinstance(self.options, SensitivityOptions)
        return best_ranks([m.spec for m in modules], sensitivity_table(context, self.options).values, budget)
