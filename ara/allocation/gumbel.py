"""Gumbel-sigmoid masks, one logit per component (ARS: Gao et al., "Adaptive Rank Selections for Low-Rank Approximation
of Language Models", NAACL 2024, https://aclanthology.org/2024.naacl-long.13).

    m_j = 1[z_j > 0],  z_j = (θ_j + ln u_j − ln(1 − u_j)) / τ,  u_j uniform        so that P(m_j = 1) = sigmoid(θ_j)

In the backward pass m_j is sigmoid(z_j) (straight-through). The loss is

    L = L_LM + λ ln(max(T, limit) / limit) + γ mean_i Σ_j (m_ij − 1[j ≤ k_i])² σ_ij² / Σ_j σ_ij²

with the cost T = Σ_i (m_i + n_i) Σ_j m_ij and k_i = Σ_j m_ij. The last term, the alignment, makes the kept components
the first ones, because those are what the final ranks keep. The final ranks come from the expected counts
Σ_j sigmoid(θ_ij). All θ start at the same positive number, so nearly everything is kept at first, and T decreases to
the budget during the training.

Differences from ARS, of which we know the abstract and an unofficial implementation
(https://github.com/sidhantls/adaptive-rank-selection-svd):

- ARS trains a hypernetwork per layer instead of logits: a bidirectional GRU over fixed noise, whose weights receive the
  gradients of all components. A free logit receives only its own gradient, which is small and noisy. So it needs more
  steps for the same differences between layers, and only the alignment couples neighbouring components.
- The alignment is relative to each layer's energy: absolute energies of different layers are not comparable.
- Layers become dense where the rescaled rank reaches break-even (ARA, Eq. 8). The masks do not include this: during the
  training every rank costs k(m + n), as in ARS.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from ara import bounds
from ara.allocation.trained import Trained, TrainedOptions
from ara.masks.mask_family import Cut, MaskFamily
from ara.solver.problem import Allocation, Budget, Module
from ara.solver.rounding import proportional, without_choice

# Uniform numbers keep this distance from 0 and 1, so that the noise is finite.
_EDGE = 1e-7


class GumbelOptions(TrainedOptions):
    """Options of Gumbel-sigmoid masks; λ, γ, τ and the bias as in the unofficial implementation, for Llama-2-7B."""

    learning_rate: float = Field(
        0.3,
        ge=bounds.MIN_RATE,
        le=bounds.MAX_RATE,
        description="of Adam, in logits per step; falls along a cosine to a tenth",
    )
    temperature: float = Field(
        0.4, ge=bounds.MIN_SLOPE, le=bounds.MAX_SLOPE, description="of the Gumbel-sigmoid, in logits"
    )
    budget_weight: float = Field(16, ge=0, le=bounds.MAX_WEIGHT, description="λ, nats per unit of ln(cost / budget)")
    align_weight: float = Field(
        1, ge=0, le=bounds.MAX_WEIGHT, description="γ, nats per share of a layer's energy out of order"
    )
    bias: float = Field(
        3, ge=-bounds.MAX_LOGIT, le=bounds.MAX_LOGIT, description="logit of every component at the start"
    )


class Gumbel(Trained):
    """Learns a binary mask per component, and keeps as many components as the masks."""

    Options = GumbelOptions
    label = "Training Gumbel-sigmoid masks"

    def family(self, modules: Sequence[Module], budget: Budget) -> GumbelMasks:
        """Return masks with equal logits."""
        assert isinstance(self.options, GumbelOptions)
        return GumbelMasks(modules, budget, self.options)


class GumbelMasks(MaskFamily):
    """One free logit per component, all layers in one vector; they start equal."""

    def __init__(self, modules: Sequence[Module], budget: Budget, options: GumbelOptions) -> None:
        self.specs, self.budget, self.options = [module.spec for module in modules], budget, options
        self.sizes = [spec.full_rank for spec in self.specs]
        self.fixed = without_choice(self.specs, budget)
        self.energies = []
        for module in modules:
            energy = module.spectrum.float()
            self.energies.append(energy / energy.sum().clamp_min(torch.finfo(torch.float32).tiny))
        self.parameters = {"logits": torch.full((sum(self.sizes),), float(options.bias)).requires_grad_()}
        self.drawn: list[torch.Tensor] = []

    def cut(self, progress: float, generator: torch.Generator) -> Cut:
        """Sample binary masks, by which the forward pass multiplies."""
        logits = self.parameters["logits"]
        uniform = torch.rand(logits.shape, generator=generator).clamp(_EDGE, 1 - _EDGE)
        soft = torch.sigmoid((logits + uniform.logit()) / self.options.temperature)
        hard = (soft.detach() > 0.5).float()
        fixed = torch.tensor(self.fixed).repeat_interleave(torch.tensor(self.sizes))
        self.drawn = list(torch.where(fixed, 1, hard + (soft - soft.detach())).split(self.sizes))
        return Cut({spec.name: mask for spec, mask in zip(self.specs, self.drawn, strict=True)}, None)

    def penalty(self) -> torch.Tensor:
        """Return λ · budget term + γ · alignment of the latest :meth:`cut`, nats."""
        costs = [
            torch.tensor(float(spec.dense_cost)) if fixed else spec.cost(mask.sum())
            for spec, mask, fixed in zip(self.specs, self.drawn, self.fixed, strict=True)
        ]
        over = (torch.stack(costs).sum() / self.budget.in_parameters(self.specs)).clamp_min(1).log()
        align = torch.stack(
            [
                ((mask - _prefix(mask)).square() * energy).sum()
                for mask, energy in zip(self.drawn, self.energies, strict=True)
            ]
        )
        return self.options.budget_weight * over + self.options.align_weight * align.mean()

    def allocation(self) -> Allocation:
        """Return the expected counts, scaled to the budget; dense where they reach break-even."""
        logits = self.parameters["logits"].detach().double()
        counts = [float(part.sum()) for part in torch.sigmoid(logits).split(self.sizes)]
        shares = [spec.cost(count) / spec.dense_cost for spec, count in zip(self.specs, counts, strict=True)]
        return proportional(self.specs, shares, self.budget, keep_dense=False)


def _prefix(mask: torch.Tensor) -> torch.Tensor:
    """Return the mask (r) of the first components, as many as ``mask`` has."""
    return (torch.arange(len(mask)) < mask.detach().sum().round()).to(mask.dtype)
