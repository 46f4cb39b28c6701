"""Uniform allocation: every layer keeps the same fraction of its parameters (SVD-LLM, arXiv 2403.07378)."""

from __future__ import annotations

from collections.abc import Sequence

from ara.allocation.base import Allocator
from ara.config.latency import OBJECTIVES
from ara.masks.context import TuningContext
from ara.solver.problem import Allocation, Budget, Module
from ara.solver.rounding import spend_rest


class Uniform(Allocator):
    """The largest rank within keep · cost of every dense layer; the rest goes to those that lost most by rounding."""

    objectives = OBJECTIVES

    def allocate(self, modules: Sequence[Module], budget: Budget, context: TuningContext | None = None) -> Allocation:
        """Give every module the same fraction of its dense cost, or its least cost if that is more."""
        specs = [module.spec for module in modules]
        choices = [budget.rank_choices(spec) for spec in specs]
        share = _common_share([(options[0].cost, options[-1].cost) for options in choices], budget.limit)
        picks = [
            max((i for i, choice in enumerate(options) if choice.cost <= share * options[-1].cost + 1e-6), default=0)
            for options in choices
        ]
        lost = [
            (share * options[-1].cost - options[pick].cost) / (spec.m + spec.n)
            for spec, options, pick in zip(specs, choices, picks, strict=True)
        ]
        spend_rest(specs, picks, budget, lost)
        return Allocation.from_picks(specs, picks, budget)


def _common_share(costs: Sequence[tuple[int, int]], limit: int) -> float:
    """Return the common share of the dense costs; layers whose least cost is more get that."""
    free = list(costs)  # (least, dense) cost per layer
    while free:
        held = sum(least for least, _ in costs) - sum(least for least, _ in free)
        share = (limit - held) / sum(dense for _, dense in free)
        fitting = [(least, dense) for least, dense in free if least <= share * dense + 1e-6]
        if len(fitting) == len(free):
            return share
        free = fitting
    return 0.0
