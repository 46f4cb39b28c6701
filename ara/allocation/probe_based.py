"""Base class of the methods that use single-layer probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from ara.allocation.base import Allocator
from ara.masks.context import TuningContext
from ara.masks.single_layer_probes import Measure, ProbeOptions, probe_choices
from ara.models.weights import LinearSpec
from ara.solver.problem import Allocation, Budget, Module


class ProbeBased(Allocator):
    """Probes the layers, then chooses without the model.

    Class attributes:
        measure: see :func:`ara.masks.single_layer_probes.probe`.
    """

    Options = ProbeOptions
    needs_model = True
    measure: ClassVar[Measure]

    def allocate(self, modules: Sequence[Module], budget: Budget, context: TuningContext | None = None) -> Allocation:
        """Probe every layer, then choose."""
        assert context is not None
        specs = [module.spec for module in modules]
        return self.choose(specs, self.probes(specs, budget, context), budget)

    def probes(self, specs: Sequence[LinearSpec], budget: Budget, context: TuningContext) -> list[dict[int, float]]:
        """Return, per layer, index into ``budget.choices(spec)`` → loss; ``budget.limit`` has no influence."""
        assert isinstance(self.options, ProbeOptions)
        return probe_choices(context, specs, budget, self.options, self.measure)

    def choose(self, specs: Sequence[LinearSpec], curves: Sequence[Mapping[int, float]], budget: Budget) -> Allocation:
        """Return the allocation for the probed losses."""
        raise NotImplementedError
