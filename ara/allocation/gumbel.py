"""Gumbel-sigmoid masks, one logit per component (ARS: Gao et al., "Adaptive Rank Selections for Low-Rank Approximation
of Language Models", NAACL 2024, https://aclanthology.org/2024.naacl-long.13).

    m_j = 1[z_j > 0],  z_j = (θ_j + ln u_j − ln(1 − u_j)) / τ,  u_j uniform        so that P(m_j = 1) = sigmoid(θ_j)

In the backward pass m_j is sigmoid(z_j) (straight-through). Minimised is

    L = L_LM + λ ln(max(T, limit) / limit) + γ mean_i Σ_j (m_ij − 1[j ≤ k_i])² σ_ij² / Σ_j σ_ij²

with T = Σ_i (m_i + n_i) Σ_j m_ij the cost and k_i = Σ_j m_ij: the alignment wants the kept components to be the first
ones, for that is what the final ranks keep. They come from the expected counts Σ_j sigmoid(θ_ij). All θ start at the
same positive number: nearly everything is kept, and T falls to the budget in the course of the training.

What differs from ARS, as far as we know it (its abstract, and an unofficial implementation,
https://github.com/sidhantls/adaptive-rank-selection-svd):

- ARS does not train logits but a hypernetwork per layer, a bidirectional GRU over fixed noise, whose weights feel the
  gradients of all components together. A free logit feels its own alone, which is small and noisy, so that more steps
  are needed for the same differences between layers, and only the alignment makes neighbours move alike.
- The alignment is relative to each layer's energy: absolute energies of different layers are not comparable.
- Layers go dense where the rescaled rank reaches break-even (ARA, Eq. 8). The masks do not know that: all ranks are
  charged k(m + n) while they train, as in ARS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from ara import bounds
from ara.allocation.base import Allocator
from ara.decomposition.base import MethodOptions
from ara.masks.context import TuningContext
from ara.masks.loop import trained_allocation
from ara.masks.mask_family import Cut, MaskFamily
from ara.solver.problem import Allocation, Budget, Module
from ara.solver.rounding import proportional, without_choice

# Noise stays finite: the smallest and the largest uniform number, as distances from 0 and 1.
_EDGE = 1e-7


class GumbelOptions(MethodOptions):
    """Options of Gumbel-sigmoid masks; λ, γ, τ and the bias as in the unofficial implementation, for Llama-2-7B."""

    steps: int = Field(60, ge=1, le=bounds.MAX_STEPS, description="optimiser steps")
    batch: int = Field(4, ge=1, le=bounds.MAX_WINDOWS, description="windows per step")
    learning_rate: float = Field(
        0.3,
        ge=bounds.MIN_RATE,
        le=bounds.MAX_RATE,
        description="of Adam, in logits per step; falls along a cosine to a tenth",
    )
    loss: Literal["ce", "kl"] = Field(
        "ce", description="ce: cross-entropy against the text (as in the paper); kl: divergence from the dense model"
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


class Gumbel(Allocator):
    """Learns a binary mask per component, and keeps as many as the masks do."""

    Options = GumbelOptions
    needs_model = True
    layouts = ("factors",)

    def allocate(self, modules: Sequence[Module], budget: Budget, context: TuningContext | None = None) -> Allocation:
        """Train masks; return the best allocation seen on held-out text, the start's included."""
        assert context is not None and isinstance(self.options, GumbelOptions)
        family = GumbelMasks(modules, budget, self.options)
        return trained_allocation(family, context, self.options, "Training Gumbel-sigmoid masks")


class GumbelMasks(MaskFamily):
    """One free logit per component, all layers in one vector."""

    def __init__(self, modules: Sequence[Module], budget: Budget, options: GumbelOptions) -> None:
        """Start from equal logits.

        Args:
            modules: the layers.
            budget: the limit.
            options: start, weights and temperature.
        """
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
        """Draw binary masks; the forward pass multiplies by them."""
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
        """Return the expected counts, scaled to the budget; dense where that reaches break-even."""
        logits = self.parameters["logits"].detach().double()
        counts = [float(part.sum()) for part in torch.sigmoid(logits).split(self.sizes)]
        shares = [spec.cost(count) / spec.dense_cost for spec, count in zip(self.specs, counts, strict=True)]
        return proportional(self.specs, shares, self.budget, keep_dense=False)


def _prefix(mask: torch.Tensor) -> torch.Tensor:
    """Return the mask (r) of as many components as ``mask`` has, the first ones."""
    return (torch.arange(len(mask)) < mask.detach().sum().round()).to(mask.dtype)
