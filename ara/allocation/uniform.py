"""Uniform allocation: every layer keeps the same fraction of its parameters (SVD-LLM, arXiv 2403.07378)."""

from __future__ import annotations

from collections.abc import Sequence

from ara.allocation.base import Allocation, Allocator, Context, Module
from ara.allocation.budget import Budget, spend_rest


class Uniform(Allocator):
    """The largest rank within keep · mn parameters; what rounding leaves goes to the layers that lost most."""

    def allocate(self, modules: Sequence[Module], budget: Budget, context: Context | None = None) -> Allocation:
        """Give every module the same fraction of the budget."""
        specs = [module.spec for module in modules]
        keep = budget.parameters / sum(spec.dense_cost for spec in specs)
        choices = [budget.choices(spec) for spec in specs]
        picks = []
        for spec, options in zip(specs, choices, strict=True):
            affordable = [i for i, (_, cost) in enumerate(options) if cost <= keep * spec.dense_cost + 1e-6]
            picks.append(affordable[-1] if affordable else 0)
        _lower_to_budget(choices, picks, budget)
        lost = [
            (keep * spec.dense_cost - options[pick][1]) / (spec.m + spec.n)
            for spec, options, pick in zip(specs, choices, picks, strict=True)
        ]
        spend_rest(specs, picks, budget, lost)
        return Allocation.from_picks(specs, picks, budget)


def _lower_to_budget(choices: list[list[tuple[int | None, int]]], picks: list[int], budget: Budget) -> None:
    """Take steps back from the dearest layers while least ranks have pushed the sum over the budget."""

    def spent() -> int:
        return sum(options[pick][1] for options, pick in zip(choices, picks, strict=True))

    while spent() > budget.parameters:
        dearest = max((i for i in range(len(picks)) if picks[i] > 0), key=lambda i: choices[i][picks[i]][1])
        picks[dearest] -= 1
