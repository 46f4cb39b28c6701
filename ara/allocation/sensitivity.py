"""Sensitivity allocation: the loss of every rank from one backward pass, then an exact knapsack with dense for choice.

See :mod:`ara.masks.sensitivity_table` for the table. No training: it is ARA's start, and a method of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from ara.allocation.base import Allocator
from ara.masks.context import TuningContext
from ara.masks.sensitivity_table import SensitivityOptions, sensitivity_of
from ara.solver.knapsack import best_ranks
from ara.solver.problem import Allocation, Budget, Module


class Sensitivity(Allocator):
    """Least summed loss by the sensitivity table."""

    Options = SensitivityOptions
    needs_model = True

    def allocate(self, modules: Sequence[Module], budget: Budget, context: TuningContext | None = None) -> Allocation:
        """Read the table off the dense model and solve the knapsack."""
        assert context is not None and isinstance(self.options, SensitivityOptions)
        return best_ranks([m.spec for m in modules], sensitivity_of(context, self.options).losses, budget)
