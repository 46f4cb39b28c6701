"""Uniform allocation: every layer keeps the same fraction of its parameters (SVD-LLM, arXiv 2403.07378)."""

from __future__ import annotations

from collections.abc import Sequence

from ara.allocation.base import Allocator
from ara.masks.context import TuningContext
from ara.models.weights import LinearSpec
from ara.solver.budget import Budget, spend_rest
from ara.solver.problem import Allocation, Module


class Uniform(Allocator):
    """The largest rank within keep · mn parameters; what rounding leaves goes to the layers that lost most."""

    def allocate(self, modules: Sequence[Module], budget: Budget, context: TuningContext | None = None) -> Allocation:
        """Give every module the same fraction of its parameters, save those that must have more."""
        specs = [module.spec for module in modules]
        choices = [budget.choices(spec) for spec in specs]
        share = _common_share(specs, [options[0][1] for options in choices], budget)
        picks = []
        for spec, options in zip(specs, choices, strict=True):
            affordable = [i for i, (_, cost) in enumerate(options) if cost <= share * spec.dense_cost + 1e-6]
            picks.append(affordable[-1] if affordable else 0)
        lost = [
            (share * spec.dense_cost - options[pick][1]) / (spec.m + spec.n)
            for spec, options, pick in zip(specs, choices, picks, strict=True)
        ]
        spend_rest(specs, picks, budget, lost)
        return Allocation.from_picks(specs, picks, budget)


def _common_share(specs: Sequence[LinearSpec], least: Sequence[int], budget: Budget) -> float:
    """Return the share that is left for all layers when those whose ``least`` cost is above it have that."""
    free = list(range(len(specs)))
    while free:
        held = sum(least) - sum(least[i] for i in free)
        share = (budget.parameters - held) / sum(specs[i].dense_cost for i in free)
        above = {i for i in free if least[i] > share * specs[i].dense_cost + 1e-6}
        if not above:
            return share
        free = [i for i in free if i not in above]
    return 0.0
