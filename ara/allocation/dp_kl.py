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
from pydantic import Field

from ara.allocation.base import Allocation, Allocator, Context, Module
from ara.allocation.budget import Budget
from ara.allocation.knapsack import exact_minimise
from ara.decomposition.base import MethodOptions
from ara.masks.probing import probe_choices
from ara.models.linears import LinearSpec


class DpKlOptions(MethodOptions):
    """Options of the knapsack over probed KL divergences."""

    ratios: int = Field(
        5, ge=1, le=64, description="parameter ratios probed per layer, evenly spaced from the least rank"
    )
    windows: int = Field(2, ge=1, le=64, description="calibration windows per probe, read in one batch")


class DpKl(Allocator):
    """Least sum over layers of the KL divergence that each one's cut alone causes."""

    Options = DpKlOptions
    needs_model = True

    def allocate(self, modules: Sequence[Module], budget: Budget, context: Context | None = None) -> Allocation:
        """Minimise the summed KL divergence under the budget."""
        assert context is not None and isinstance(self.options, DpKlOptions)
        specs = [module.spec for module in modules]
        curves = probe_choices(
            context, specs, budget, ratios=self.options.ratios, windows=self.options.windows, measure="kl"
        )
        losses = [interpolate(spec, curve, budget) for spec, curve in zip(specs, curves, strict=True)]
        picks = exact_minimise(specs, losses, budget)
        return Allocation({spec.name: budget.choices(spec)[pick][0] for spec, pick in zip(specs, picks, strict=True)})


def interpolate(spec: LinearSpec, curve: Mapping[int, float], budget: Budget) -> torch.Tensor:
    """Return the loss of every choice of a layer: linear in the rank between the probes.

    The last segment runs to loss 0 at *full* rank, where the factors are the weight, and not at break-even: the largest
    ranks on offer do lose something, and dense does not.

    Args:
        spec: the layer.
        curve: index into ``budget.choices(spec)`` → KL divergence, from the cheapest choice up. A value above that of a
            smaller rank is noise and lowered to it.
        budget: offers the choices.

    Returns:
        (choices) float64, non-increasing, nats per predicted token; 0 for dense.
    """
    ranks = [spec.full_rank if rank is None else rank for rank, _ in budget.choices(spec)]
    falling = np.minimum.accumulate([max(loss, 0.0) for loss in curve.values()] + [0.0])
    return torch.from_numpy(np.interp(ranks, [*(ranks[at] for at in curve), spec.full_rank], falling))
