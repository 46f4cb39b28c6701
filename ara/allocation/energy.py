"""Energy allocation: spend the budget where it keeps most of each layer's spectrum.

The loss of rank k is the discarded part of the layer's own spectrum, Σ_{j>k} σ_j² / Σ_j σ_j², times the layer's
parameters mn. It is relative to each layer, because absolute energies of different layers are not comparable. The
factor mn makes layers with spectra of the same shape keep the same fraction. Dense costs mn and loses nothing.

The energy of a layer says nothing about the effect of its error on the loss, so uniform ranks can be better: compare
with ``ara eval``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ara.allocation.base import Allocator
from ara.masks.context import TuningContext
from ara.solver.greedy import minimise_loss
from ara.solver.problem import Allocation, Budget, Module


class Energy(Allocator):
    """Least sum over layers of the discarded fraction of energy, weighted by parameters."""

    def allocate(self, modules: Sequence[Module], budget: Budget, context: TuningContext | None = None) -> Allocation:
        """Minimise the summed relative energy loss, weighted by parameters, under the budget."""
        specs = [module.spec for module in modules]
        choices = [budget.rank_choices(spec) for spec in specs]
        losses = [
            module.spec.dense_cost * relative_loss(module.spectrum, [choice.rank for choice in options])
            for module, options in zip(modules, choices, strict=True)
        ]
        picks = minimise_loss(specs, losses, budget)
        return Allocation.from_picks(specs, picks, budget)


def relative_loss(spectrum: torch.Tensor, ranks: Sequence[int | None]) -> torch.Tensor:
    """Return Σ_{j>k} σ_j² / Σ_j σ_j² for each rank k (0 for dense, ``None``); float64."""
    tails = torch.cat([spectrum.flip(0).cumsum(0).flip(0), spectrum.new_zeros(1)])
    total = tails[0].clamp_min(torch.finfo(torch.float64).tiny)
    return torch.stack([tails.new_zeros(()) if rank is None else tails[rank] / total for rank in ranks])
