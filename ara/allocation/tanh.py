"""One trainable truncation position per layer (Dobi-SVD: Wang et al., ICLR 2025, arXiv 2502.02723).

    p_j = ½ tanh(β (k_i − j)) + ½,  j = 1 … r          L = L_LM + λ |Σ_i min(R_i, 1) m_i n_i / Σ mn − keep|

with R_i = k_i (m_i + n_i) / (m_i n_i). The forward pass multiplies the components by p, so the gradient of k_i comes
from the few components within about 1/β of the cut. All layers start from the same R. At the end layers with R ≥ 1 are
dense, which the penalty counts as R = 1, and the others are scaled to the budget.

Differences from Dobi-SVD and its code (https://github.com/wangqinsi1/Dobi-SVD):

- Dobi-SVD truncates the activations of each sequence by an SVD inside the forward pass, differentiates through it, and
  computes weights from the result (incremental PCA) afterwards. Here the components of the given factors are cut, as in
  all allocators, and no SVD is differentiated.
- R_i is trained instead of k_i, so that one learning rate suits all shapes. A projection keeps k_i within 1 … r,
  instead of a quadratic penalty.
- The loss is in nats. Dobi-SVD minimises perplexity with λ = 200, which is λ / perplexity in nats.
- Its remapped storage, where rank k costs k max(m, n) at mixed precision, is left out: it suits any method.
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


class TanhOptions(TrainedOptions):
    """Options of tanh masks."""

    learning_rate: float = Field(
        0.01,
        ge=bounds.MIN_RATE,
        le=bounds.MAX_RATE,
        description="of Adam, in R = k(m+n)/mn per step; falls along a cosine to a tenth",
    )
    beta: float = Field(
        10,
        ge=bounds.MIN_SLOPE,
        le=bounds.MAX_SLOPE,
        description="β, steepness of the mask, per rank (10 in the paper's code)",
    )
    budget_weight: float = Field(
        20,
        ge=0,
        le=bounds.MAX_WEIGHT,
        description="λ, nats per unit of keep; must exceed the loss saved per unit of keep",
    )


class Tanh(Trained):
    """Learns where to cut each layer."""

    Options = TanhOptions
    label = "Training tanh masks"

    def family(self, modules: Sequence[Module], budget: Budget) -> TanhMasks:
        """Return masks that keep the same share of every layer."""
        assert isinstance(self.options, TanhOptions)
        return TanhMasks(modules, budget, self.options)


class TanhMasks(MaskFamily):
    """One position per layer, as a share R of its dense parameters; all start equal."""

    def __init__(self, modules: Sequence[Module], budget: Budget, options: TanhOptions) -> None:
        self.specs, self.budget, self.options = [module.spec for module in modules], budget, options
        self.dense_costs = torch.tensor([spec.dense_cost for spec in self.specs], dtype=torch.float64)
        self.fixed = torch.tensor(without_choice(self.specs, budget))
        # R of rank 1, and of full rank.
        self.least = torch.tensor([(spec.m + spec.n) / spec.dense_cost for spec in self.specs], dtype=torch.float64)
        self.most = self.least * torch.tensor([spec.full_rank for spec in self.specs])
        self.keep = budget.in_parameters(self.specs) / float(self.dense_costs.sum())
        self.parameters = {"shares": torch.full_like(self.least, self.keep).requires_grad_()}

    def cut(self, progress: float, generator: torch.Generator) -> Cut:
        """Return soft masks at the current positions, by which the forward pass multiplies."""
        shares = self.parameters["shares"]
        with torch.no_grad():
            shares.copy_(self._within(shares))
        positions = (shares / self.least).float()
        masks = {}
        for spec, position, fixed in zip(self.specs, positions, self.fixed.tolist(), strict=True):
            ahead = position - torch.arange(1, spec.full_rank + 1)
            masks[spec.name] = torch.ones_like(ahead) if fixed else 0.5 * torch.tanh(self.options.beta * ahead) + 0.5
        return Cut(masks, None)

    def penalty(self) -> torch.Tensor:
        """Return λ |kept − keep|, nats; float64 scalar."""
        shares = self.parameters["shares"]
        # At 1 and above the gradient is 0: the cost of a dense layer is constant.
        charged = torch.where((shares < 1) & ~self.fixed, shares, 1)
        kept = (charged * self.dense_costs).sum() / self.dense_costs.sum()
        return self.options.budget_weight * (kept - self.keep).abs()

    def allocation(self) -> Allocation:
        """Return the positions as ranks: dense from break-even on, the others scaled to the budget."""
        shares = self._within(self.parameters["shares"].detach())
        return proportional(self.specs, shares.tolist(), self.budget, keep_dense=True)

    def _within(self, shares: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.maximum(shares, self.least), self.most)
