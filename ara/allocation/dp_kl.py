"""A knapsack over probed KL divergences.

Every layer is cut alone at a few parameter ratios, and the divergence KL(dense ‖ cut) of the next-token distributions
noted (Duo-SVD, arXiv 2510.19385). The losses of single layers are taken to add up; the least sum under the budget is
then a multiple-choice knapsack (ROCKET, arXiv 2602.11008), dense being one of the choices.

Other than there:

- Duo-SVD's code (github.com/Pupu792/CPSVD) probes around the compressed model: all other layers are at the target
  ratio instead of dense. ROCKET's losses are errors of the weights, not KL;
- both choose among the probed ratios alone, and round costs to 1/10,000 (Duo-SVD) or 1/30,000 (ROCKET) of all
  parameters. Here every rank is a choice, its loss is interpolated, and costs are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ara.allocation.single_layer_probes import Probed
from ara.models.weights import LinearSpec
from ara.solver.knapsack import exact_minimise
from ara.solver.problem import Allocation, Budget


class DpKl(Probed):
    """Least sum over layers of the KL divergence that each one's cut alone causes."""

    measure = "kl"

    def choose(self, specs: Sequence[LinearSpec], curves: Sequence[Mapping[int, float]], budget: Budget) -> Allocation:
        """Minimise the summed KL divergence under the budget."""
        losses = [interpolate(spec, curve, budget) for spec, curve in zip(specs, curves, strict=True)]
        return Allocation.from_picks(specs, exact_minimise(specs, losses, budget), budget)


def interpolate(spec: LinearSpec, curve: Mapping[int, float], budget: Budget) -> torch.Tensor:
    """Return the loss of every choice of a layer: linear in the rank between the probes.

    The last segment runs to loss 0 at *full* rank, where the factors are the weight, and not at break-even: the largest
    ranks on offer do lose something, and dense does not.

    Args:
        spec: the layer.
        curve: index into ``budget.choices(spec)`` → KL divergence, from the cheapest choice up. A value above that of a
            smaller rank is noise and lowered to it.
        budget: offers the choices; of one bit width.

    Returns:
        (choices) float64, non-increasing, nats per predicted token; 0 for dense.
    """
    ranks = [spec.full_rank if choice.rank is None else choice.rank for choice in budget.rank_choices(spec)]
    falling = np.minimum.accumulate([max(loss, 0.0) for loss in curve.values()] + [0.0])
    return torch.from_numpy(np.interp(ranks, [*(ranks[at] for at in curve), spec.full_rank], falling))
