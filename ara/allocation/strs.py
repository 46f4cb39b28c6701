"""Sensitivity-based truncation rank searching, the allocator of ASVD (arXiv 2312.05821).

Each layer alone is cut to a few parameter ratios, which gives a perplexity per ratio. For a threshold on it, each layer
takes its cheapest ratio below it, or stays dense. A larger threshold gives a smaller model. A binary search
over all measured perplexities finds the smallest threshold that meets the budget.

Differences from ASVD:

- Ratios are 0, 1/R, … (R − 1)/R, where 0 means the least rank, so that any budget can be met. ASVD has 0.1, 0.2, … 0.9.
- A dense layer costs mn, and the rest of the budget is spent in single rank steps, most sensitive layer first. ASVD
  stops near the target.
- Ranks respect the rank multiple and the least rank.
- Negative log-likelihoods are compared instead of perplexities; the order is the same.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from ara.allocation.probe_based import ProbeBased
from ara.models.weights import LinearSpec
from ara.solver.problem import Allocation, Budget
from ara.solver.rounding import spend_rest


class Strs(ProbeBased):
    """The cheapest rank of each layer whose single-layer perplexity is below a common threshold."""

    measure = "nll"

    def choose(self, specs: Sequence[LinearSpec], curves: Sequence[Mapping[int, float]], budget: Budget) -> Allocation:
        """Find the threshold on the single-layer perplexity that meets the budget."""
        picks = search(specs, curves, budget)
        spend_rest(specs, picks, budget, [curve.get(pick, 0.0) for curve, pick in zip(curves, picks, strict=True)])
        return Allocation.from_picks(specs, picks, budget)


def search(specs: Sequence[LinearSpec], curves: Sequence[Mapping[int, float]], budget: Budget) -> list[int]:
    """Return each layer's cheapest choice below the smallest threshold that meets the budget.

    Args:
        specs: the layers.
        curves: per layer, index into ``budget.choices(spec)`` → NLL of the model with only this layer cut; includes
            the cheapest choice unless the layer can only be dense.
        budget: the limit; the cheapest choices together must fit.
    """
    choices = [budget.rank_choices(spec) for spec in specs]

    def below(threshold: float) -> list[int]:
        return [
            min((at for at, nll in curve.items() if nll <= threshold), default=len(options) - 1)
            for options, curve in zip(choices, curves, strict=True)
        ]

    def fits(threshold: float) -> bool:
        picks = below(threshold)
        return sum(options[pick].cost for options, pick in zip(choices, picks, strict=True)) <= budget.limit

    # With the first threshold all layers are dense.
    thresholds = [-math.inf, *sorted({nll for curve in curves for nll in curve.values()})]
    return below(thresholds[bisect_left(thresholds, True, key=fits)])
