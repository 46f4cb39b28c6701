"""The priced form with a second-order step: re-linearise the loss at the present cut, and solve the knapsack anew.

Around a cut with ranks k⁰ the loss of other ranks is, to second order in the masks and layer by layer,

    L_i(k) ≈ Σ_j (1[j ≤ k] − 1[j ≤ k⁰_i]) ∂L/∂p_ij  +  κ |T_i(k) − T_i(k⁰_i)|

The first term is the straight-through gradient, which sees all that the other layers' errors do to this one. The
second is the Gauss-Newton curvature, read off the sensitivity table T (:mod:`ara.masks.sensitivity`): T_i(k) is half
the mean square of a tail sum whose terms are nearly uncorrelated, so the components between k and k⁰ have the
difference. Gradients that agree with the table give the table again.

Every step averages the new model into the old ones, V ← (1 − η) V + η L, and takes the ranks that are optimal for V
under the budget, so the noise of a batch moves few ranks. The model holds near the cut alone: a step that would move
more than a given share of the parameters is shortened (a trust region, by way of η), and one after which the loss
is far higher is taken back, the next ones being half as long. What stays is a cut that is
optimal for its own linearisation: all layers pay the same price for their last component. Adam on θ
(:mod:`ara.masks.priced`) needs many more steps for this, for it has no idea of the scale of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ara.allocation.base import Allocation, cost
from ara.allocation.budget import Budget
from ara.allocation.sensitivity import best_ranks
from ara.masks.family import Cut, MaskFamily
from ara.masks.model import MaskGradients
from ara.models.linears import LinearSpec

# A step was bad when the next batch's loss is this many times the one before, and more by this many standard errors.
_BAD = 1.3
_BAD_STDERRS = 3.0
# In front of the names of what a bad step goes back to.
_ACCEPTED = "accepted:"
# Halvings of the rate's interval on the way to a step of the right length.
_BISECTIONS = 6


class NewtonMasks(MaskFamily):
    """Tables of losses that are re-linearised in every step; see the module's docstring."""

    own_step = True

    def __init__(
        self,
        specs: Sequence[LinearSpec],
        budget: Budget,
        start: Mapping[str, torch.Tensor],
        curvature: Mapping[str, torch.Tensor],
        rate: float = 0.3,
        trust: float = 0.02,
        damping: float = 1.0,
    ) -> None:
        """Start from the losses of ranks.

        Args:
            specs: the layers.
            budget: the limit.
            start: module path → (r + 1), V at the beginning, nats per token.
            curvature: module path → (r + 1), the sensitivity table T, nats per token.
            rate: η, at most.
            trust: share of the layers' dense parameters that the first step may move at most, counting what is taken
                and what is given; falls linearly to a quarter. A step that would move more gets a smaller η.
            damping: κ; more than 1 moves less.
        """
        self.specs, self.budget, self.rate, self.damping = list(specs), budget, rate, damping
        self.curvature = {name: table.double() for name, table in curvature.items()}
        tables = {spec.name: start[spec.name].double().clone() for spec in self.specs}
        self.parameters = {
            **tables,
            **{f"{_ACCEPTED}{name}": table.clone() for name, table in tables.items()},
            f"{_ACCEPTED}loss": torch.full((2,), torch.inf, dtype=torch.float64),
            "trust": torch.tensor(trust, dtype=torch.float64),
        }
        self.latest: Allocation | None = None

    def cut(self, progress: float, generator: torch.Generator) -> Cut:
        """Return the ranks that are optimal for the present tables; the masks only say which layers there are."""
        self.latest = self.allocation()
        return Cut({}, self.latest.ranks)

    def update(self, found: MaskGradients, progress: float) -> None:
        """Average the model around the latest cut into the tables, or go back to the cut before."""
        assert self.latest is not None
        trust, accepted = self.parameters["trust"], self.parameters[f"{_ACCEPTED}loss"]
        noise = math.hypot(found.stderr, float(accepted[1]))
        if found.loss > max(_BAD * float(accepted[0]), float(accepted[0]) + _BAD_STDERRS * noise):
            for spec in self.specs:
                self.parameters[spec.name].copy_(self.parameters[f"{_ACCEPTED}{spec.name}"])
            trust /= 2
            return
        accepted.copy_(torch.tensor([found.loss, found.stderr]))
        old, new = {}, {}
        for spec in self.specs:
            rank = self.latest.ranks[spec.name]
            at = spec.full_rank if rank is None else rank
            first = torch.cat([torch.zeros(1, dtype=torch.float64), found.masks[spec.name].double().cumsum(0)])
            curve, table = self.curvature[spec.name], self.parameters[spec.name]
            self.parameters[f"{_ACCEPTED}{spec.name}"].copy_(table)
            old[spec.name] = table - table[at]
            new[spec.name] = first - first[at] + self.damping * (curve - curve[at]).abs()
        mixed = self._within(self.latest, old, new, float(trust) * (1 - 0.75 * progress))
        for name, table in mixed.items():
            self.parameters[name].copy_(table)

    def _within(
        self, latest: Allocation, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor], limit: float
    ) -> dict[str, torch.Tensor]:
        """Return (1 − η) old + η new for the largest η up to the rate whose optimum is not too far away."""

        def mixed(rate: float) -> dict[str, torch.Tensor]:
            return {name: (1 - rate) * old[name] + rate * new[name] for name in old}

        def moved(rate: float) -> float:
            ranks = best_ranks(self.specs, mixed(rate), self.budget).ranks
            each = (abs(cost(s, ranks[s.name]) - cost(s, latest.ranks[s.name])) for s in self.specs)
            return sum(each) / sum(spec.dense_cost for spec in self.specs)

        if moved(self.rate) <= limit:
            return mixed(self.rate)
        low, high = 0.0, self.rate
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if moved(middle) <= limit else (low, middle)
        return mixed(low)

    def tables(self, parameters: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Return V, by default the present one: module path → (r + 1) float64, nats per token."""
        found = parameters or self.parameters
        return {spec.name: found[spec.name].clone() for spec in self.specs}

    def allocation(self) -> Allocation:
        """Return the exact optimum for the present tables."""
        return best_ranks(self.specs, self.parameters, self.budget)
