"""A knapsack over the KL divergences of single-layer probes.

Each layer alone is cut to a few parameter ratios, which gives the divergence KL(dense ‖ cut) of the next-token
distributions (Duo-SVD, arXiv 2510.19385). The losses of the layers are assumed to add up. The least sum under the
budget is a multiple-choice knapsack (ROCKET, arXiv 2602.11008) with dense as one of the choices.

Differences:

- Duo-SVD's code (github.com/Pupu792/CPSVD) probes the compressed model: all other layers are at the target ratio
  instead of dense. ROCKET's losses are errors of the weights, not KL.
- Both choose only among the probed ratios, and round costs to 1/10,000 (Duo-SVD) or 1/30,000 (ROCKET) of all
  parameters. Here every rank is a choice, its loss is interpolated, and costs are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ara.allocation.probe_based import ProbeBased
from ara.models.weights import LinearSpec
from ara.solver.knapsack import exact_minimise
from ara.solver.problem import Allocation, Budget


class DpKl(ProbeBased):
    """Least sum over layers of the KL divergence of each single-layer cut."""

    measure = "kl"

    def choose(self, specs: Sequence[LinearSpec], curves: Sequence[Mapping[int, float]], budget: Budget) -> Allocation:
        """Minimise the summed KL divergence under the budget."""
        losses = [interpolate(spec, curve, budget) for spec, curve in zip(specs, curves, strict=True)]
        return Allocation.from_picks(specs, exact_minimise(specs, losses, budget), budget)


def interpolate(spec: LinearSpec, curve: Mapping[int, float], budget: Budget) -> torch.Tensor:
    """Return the loss of every choice of a layer: linear in the rank between the probes.

    The last segment ends with loss 0 at *full* rank, where the factors equal the weight, not at break-even: the largest
    ranks offered lose something, unlike dense.

    Args:
        spec: the layer.
        curve: index into ``budget.choices(spec)`` → KL divergence, cheapest choice first. A value above that of a
            smaller rank is noise and is lowered to it.
        budget: of one bit width.

    Returns:
        (choices) float64, non-increasing, nats per predicted token; 0 for dense.
    """
    ranks = [spec.full_rank if choice.rank is None else choice.rank for choice in budget.rank_choices(spec)]
    falling = np.minimum.accumulate([max(loss, 0.0) for loss in curve.values()] + [0.0])
    return torch.from_numpy(np.interp(ranks, [*(ranks[at] for at in curve), spec.full_rank], falling))
