"""The priced form: dense is an atom, and one global price keeps the hard allocation within the budget in every step.

    α_i(d) ∝ exp((θ_id − μ c_id) / τ)        hard choice d_i = argmax_d θ_id − μ c_id

with c the cost of an atom and μ found by bisection so that Σ_i c_i(d_i) just fits the budget. This is the Lagrangian of
the multiple-choice knapsack with −θ as the loss of every rank. There is no budget penalty and no rescaling: the trained
allocation is the deployed one. There are no atoms between break-even and full rank, so the search space does not
contain the jump of the gain at R = 1, for which the paper's form needs a guidance loss.

The price depends on θ: raising θ of all expensive atoms raises μ. Without this term all layers would ask for more rank
at once, which would hide the differences between layers. With the expected cost Σ α c fixed,

    ∂L/∂θ_id = α_id [(G_id − ν c_id) − Σ_e α_ie (G_ie − ν c_ie)] / τ,    ν = Σ_i Cov_αi(G_i, c_i) / Σ_i Var_αi(c_i)

where G_id = ∂L/∂α_id is the loss gradient summed over the mask up to s_d. This follows from the implicit function
theorem on μ(θ), which removes the component along the cost from the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ara.masks.mask_family import Cut, MaskFamily
from ara.masks.staircase import Atoms
from ara.solver.knapsack import best_ranks
from ara.solver.problem import Allocation, Budget

_BISECTIONS = 100


class PricedStaircase(MaskFamily):
    """θ over atoms with one price.

    Attributes:
        price: μ of the latest :meth:`cut`, in units of θ per unit of cost.
        unit: loss per unit of θ, in the unit of the starting tables.
    """

    def __init__(
        self, atoms: Atoms, budget: Budget, tables: Mapping[str, torch.Tensor], temperature: float = 1.0
    ) -> None:
        """Start from the losses of ranks.

        Args:
            atoms: of :func:`ara.masks.staircase.priced_atoms`.
            budget: the limit.
            tables: module path → (r + 1), the loss of every rank, in any unit; the last entry is the dense layer.
            temperature: τ. One unit of θ is the starting price of 1 % of the mean layer. At τ = 1 the softmax mixes
                atoms that differ by about this much.
        """
        self.specs, self.atoms, self.budget, self.temperature = atoms.specs, atoms, budget, temperature
        theta = -atoms.expand(tables)
        price = hard_price(theta, atoms, budget.limit)[0]
        dense_cost = sum(budget.dense_cost(spec) for spec in atoms.specs)
        self.unit = max(price, 1e-30) * 0.01 * dense_cost / len(atoms.specs)
        self.parameters = {"theta": (theta / self.unit).requires_grad_()}
        self.price = 0.0

    def cut(self, progress: float, generator: torch.Generator) -> Cut:
        """Return the priced masks, and the hard ranks within the budget."""
        theta = self.parameters["theta"]
        self.price, picks = hard_price(theta.detach(), self.atoms, self.budget.limit)
        scores = _at_fixed_cost(theta, self.atoms, self.price, self.temperature)
        return Cut(self.atoms.masks(self.atoms.alpha(scores)), self.atoms.hard_ranks(picks))

    def tables(self, parameters: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Return −θ as the loss of every rank, in the unit of the starting tables."""
        theta, result = (parameters or self.parameters)["theta"].detach(), {}
        for i, spec in enumerate(self.specs):
            real = self.atoms.real[i]
            result[spec.name] = _interpolated(self.atoms.ranks[i][real], -theta[i][real] * self.unit, spec.full_rank)
        return result

    def allocation(self) -> Allocation:
        """Return the exact knapsack optimum for the losses −θ."""
        return best_ranks(self.specs, self.tables(), self.budget)


def hard_price(theta: torch.Tensor, atoms: Atoms, limit: int) -> tuple[float, torch.Tensor]:
    """Return the least price at which the hard choices fit ``limit``, and the chosen columns (L) int64.

    Args:
        theta: (L, D) float64.
        atoms: their costs.
        limit: on the summed cost; the cheapest atoms together must fit.
    """

    def choose(price: float) -> tuple[torch.Tensor, float]:
        scores = (theta - price * atoms.costs).masked_fill(~atoms.real, -torch.inf)
        picks = scores.argmax(1)
        return picks, float(atoms.costs.gather(1, picks[:, None]).sum())

    # The price may be negative: if θ rewards small ranks and the budget is large.
    low, high = -1e-12, 1e-12
    while choose(high)[1] > limit:
        high *= 2
    while choose(low)[1] <= limit and low > -1e12:
        low *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if choose(middle)[1] > limit:
            low = middle
        else:
            high = middle
    return high, choose(high)[0]


def _at_fixed_cost(theta: torch.Tensor, atoms: Atoms, price: float, temperature: float) -> torch.Tensor:
    """Return (θ − μ c) / τ with μ as the function of θ that keeps the expected cost Σ α c fixed."""
    with torch.no_grad():
        alpha = atoms.alpha((theta - price * atoms.costs) / temperature)
        centred = (atoms.costs - (alpha * atoms.costs).sum(1, keepdim=True)) * atoms.real
        spread = (alpha * centred.square()).sum().clamp_min(1e-30)
        # ∂μ/∂θ_id = α_id (c_id − E_αi c_i) / Σ_i Var_αi(c_i)
        slope = alpha * centred / spread
    moving = price + ((theta - theta.detach()) * slope).sum()
    return (theta - moving * atoms.costs) / temperature


def _interpolated(ranks: torch.Tensor, values: torch.Tensor, full: int) -> torch.Tensor:
    """Return the piecewise linear function through (rank, value) at 0 … full, extended linearly at both ends."""
    if len(ranks) == 1:
        return values.expand(full + 1).clone()
    at = torch.arange(full + 1)
    right = torch.searchsorted(ranks, at).clamp(1, len(ranks) - 1)
    left = right - 1
    share = (at - ranks[left]).double() / (ranks[right] - ranks[left])
    return values[left] + share * (values[right] - values[left])
