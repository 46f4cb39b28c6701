"""Sensitivity-based truncation rank searching, the allocator of ASVD (arXiv 2312.05821).

Every layer is cut alone at a few parameter ratios and the perplexity noted. Under a threshold on that perplexity, each
layer takes its cheapest ratio that stays below it, or stays dense. The larger the threshold, the cheaper the model; a
binary search over all noted perplexities finds the smallest that meets the budget.

Other than in ASVD:

- ratios are 0, 1/R, … (R − 1)/R, where 0 means the least rank, so that any budget can be met; ASVD has 0.1, 0.2, … 0.9;
- a layer that stays dense is charged mn, and what the threshold leaves over is spent in single rank steps, most
  sensitive layer first; ASVD stops near the target;
- the ratios' ranks obey the rank multiple and the least rank;
- negative log-likelihoods are compared, which is the same order.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from ara.allocation.single_layer_probes import Probed
from ara.models.weights import LinearSpec
from ara.solver.problem import Allocation, Budget
from ara.solver.rounding import spend_rest


class Strs(Probed):
    """The cheapest rank per layer that, cut alone, stays below one perplexity."""

    measure = "nll"

    def choose(self, specs: Sequence[LinearSpec], curves: Sequence[Mapping[int, float]], budget: Budget) -> Allocation:
        """Search the threshold on the perplexity of single layers that meets the budget."""
        picks = search(specs, curves, budget)
        spend_rest(specs, picks, budget, [curve.get(pick, 0.0) for curve, pick in zip(curves, picks, strict=True)])
        return Allocation.from_picks(specs, picks, budget)


def search(specs: Sequence[LinearSpec], curves: Sequence[Mapping[int, float]], budget: Budget) -> list[int]:
    """Return each layer's cheapest choice below the smallest threshold that meets the budget.

    Args:
        specs: the layers.
        curves: per layer, index into ``budget.choices(spec)`` → NLL of the model with this layer alone cut there; holds
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

    # Below the first threshold everything stays dense.
    thresholds = [-math.inf, *sorted({nll for curve in curves for nll in curve.values()})]
    return below(thresholds[bisect_left(thresholds, True, key=fits)])
