"""The priced form with a second-order step: re-linearise the loss at the present cut, and solve the knapsack anew.

Around a cut with ranks k⁰ the loss of other ranks is, to second order in the masks and layer by layer,

    L_i(k) ≈ Σ_j (1[j ≤ k] − 1[j ≤ k⁰_i]) ∂L/∂p_ij  +  κ |T_i(k) − T_i(k⁰_i)|

The first term is the straight-through gradient, which sees all that the other layers' errors do to this one. The
second is the Gauss-Newton curvature, read off the sensitivity table T (:mod:`ara.masks.sensitivity_table`): T_i(k)
is half the mean square of a tail sum whose terms are nearly uncorrelated, so the components between k and k⁰ have the
difference. Gradients that agree with the table give the table again.

Every step averages the new model into the old ones, V ← (1 − η) V + η L, and takes the ranks that are optimal for V
under the budget, so the noise of a batch moves few ranks. The model holds near the cut alone, hence:

- a step that would move more than a given share of all parameters is shortened, by way of η;
- no layer falls below half of its rank in one step (:mod:`ara.masks.trust_region`); starting from what another
  budget has learned is such a step, too;
- a step after which the loss is far higher has gone over a cliff: one component may hold up the whole model (in
  SmolLM2-135M the value projection of the first block). The gradient behind the cliff points back at it:
  the layers that it wants restored most are pinned at the rank that they had before (those that were dense at the
  highest rank that costs less). Where that does not explain the loss, or does not help, the step is taken back and the
  next ones are half as long.

What stays is a cut that is optimal for its own linearisation: all layers pay the same price for their last component.
Adam on θ (:mod:`ara.masks.priced`) needs many more steps for this, for it has no idea of the scale of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from ara.masks.mask_family import Cut, MaskFamily
from ara.masks.model import MaskGradients
from ara.masks.trust_region import above_floors, floors_below
from ara.models.weights import LinearSpec
from ara.solver.knapsack import best_ranks
from ara.solver.problem import Allocation, Budget

# A step was bad when the next batch's loss is this many times the one before, and more by this many standard errors.
_BAD = 1.3
_BAD_STDERRS = 3.0
# Standard error of the loss of a single window, which has no spread to tell it by, as a share of the loss.
_LONE_SPREAD = 0.25
# In front of the names of what a bad step goes back to.
_ACCEPTED = "accepted:"
# Halvings of an interval on the way to a step of the right length.
_BISECTIONS = 6
# Layers share the blame for a cliff if they would win back this share of what the first of them would; together they
# must explain this share of the loss.
_BLAME = 0.5
# Bad steps in a row before the last of them are taken back.
_PATIENCE = 2


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
        around: Allocation | None = None,
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
            around: the cut that ``start`` is a model around, where it comes from a training at another budget.
        """
        self.specs, self.budget, self.rate, self.damping = list(specs), budget, rate, damping
        self.curvature = {name: table.double() for name, table in curvature.items()}
        tables = {spec.name: start[spec.name].double().clone() for spec in self.specs}
        none = torch.zeros(len(self.specs), dtype=torch.int64)
        floors = none if around is None else floors_below(self.specs, around)
        self.parameters = {
            **tables,
            **{f"{_ACCEPTED}{name}": table.clone() for name, table in tables.items()},
            f"{_ACCEPTED}loss": torch.full((2,), torch.inf, dtype=torch.float64),
            f"{_ACCEPTED}floors": floors.clone(),
            f"{_ACCEPTED}ranks": none.clone(),
            "floors": floors.clone(),
            "pins": none.clone(),
            "bad": torch.zeros((), dtype=torch.int64),
            "trust": torch.tensor(trust, dtype=torch.float64),
        }
        self.latest: Allocation | None = None

    def cut(self, progress: float, generator: torch.Generator) -> Cut:
        """Return the ranks that are optimal for the present tables; the masks only say which layers there are."""
        self.latest = self.allocation()
        return Cut({}, self.latest.ranks)

    def update(self, found: MaskGradients, progress: float) -> None:
        """Average the model around the latest cut into the tables, or deal with a step that was bad."""
        assert self.latest is not None
        accepted = self.parameters[f"{_ACCEPTED}loss"]
        noise = math.hypot(_spread(found), float(accepted[1]))
        if found.loss > max(_BAD * float(accepted[0]), float(accepted[0]) + _BAD_STDERRS * noise):
            self._over_a_cliff(found)
            return
        ranks = self._as_numbers(self.latest)
        accepted.copy_(torch.tensor([found.loss, _spread(found)]))
        self.parameters["bad"].zero_()
        for name in ("floors", *(spec.name for spec in self.specs)):
            self.parameters[f"{_ACCEPTED}{name}"].copy_(self.parameters[name])
        self.parameters[f"{_ACCEPTED}ranks"].copy_(ranks)
        old, new = {}, {}
        for spec, at in zip(self.specs, ranks.tolist(), strict=True):
            curve, table, first = self.curvature[spec.name], self.parameters[spec.name], _tails(found, spec.name)
            old[spec.name] = table - table[at]
            new[spec.name] = first - first[at] + self.damping * (curve - curve[at]).abs()
        limit = float(self.parameters["trust"]) * (1 - 0.75 * progress)
        self.parameters["floors"].copy_(self._next_floors(old, limit))
        for name, table in self._within(old, new, limit).items():
            self.parameters[name].copy_(table)

    def _over_a_cliff(self, found: MaskGradients) -> None:
        """Pin the layers that the gradient blames for the loss; else, or when that did not help, go back."""
        assert self.latest is not None
        before, now = self.parameters[f"{_ACCEPTED}ranks"], self._as_numbers(self.latest)
        back = [
            float(first[k] - first[to]) if to > k else 0.0
            for first, k, to in zip(
                (_tails(found, spec.name) for spec in self.specs), now.tolist(), before.tolist(), strict=True
            )
        ]
        blamed = [i for i, won in enumerate(back) if won > 0 and won >= _BLAME * max(back)]
        self.parameters["bad"] += 1
        for i in blamed:
            self.parameters["pins"][i] = min(int(before[i]), self.specs[i].top_rank)
        floors = torch.maximum(self.parameters["floors"], self.parameters["pins"])
        self.parameters["floors"].copy_(floors)
        excess = found.loss - float(self.parameters[f"{_ACCEPTED}loss"][0])
        if sum(back[i] for i in blamed) >= _BLAME * excess and int(self.parameters["bad"]) < _PATIENCE:
            return
        for spec in self.specs:
            self.parameters[spec.name].copy_(self.parameters[f"{_ACCEPTED}{spec.name}"])
        # What was pinned stays so: the cut that is gone back to keeps to it.
        accepted = self.parameters[f"{_ACCEPTED}floors"]
        self.parameters["floors"].copy_(torch.maximum(accepted, self.parameters["pins"]))
        self.parameters["bad"].zero_()
        self.parameters["trust"] /= 2

    def _as_numbers(self, allocation: Allocation) -> torch.Tensor:
        """Return the rank of each layer (L) int64, full rank where it is dense."""
        ranks = (allocation.ranks[spec.name] for spec in self.specs)
        full = (spec.full_rank for spec in self.specs)
        return torch.tensor([whole if rank is None else rank for rank, whole in zip(ranks, full, strict=True)])

    def _next_floors(self, old: Mapping[str, torch.Tensor], limit: float) -> torch.Tensor:
        """Return the floors of the next step: half of the latest ranks, or as near to that as the limit allows.

        After a start from a far larger budget the ranks press on the floors, and would fall by more than a step may
        move as soon as these were gone.
        """
        assert self.latest is not None
        wanted = torch.maximum(floors_below(self.specs, self.latest), self.parameters["pins"])
        above = (self.parameters["floors"] - wanted).clamp_min(0).double()

        def lowered(share: float) -> torch.Tensor:
            return wanted + ((1 - share) * above).ceil().long()

        return lowered(_largest(1.0, lambda share: self._moved(old, lowered(share)) <= limit))

    def _within(
        self, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor], limit: float
    ) -> dict[str, torch.Tensor]:
        """Return (1 − η) old + η new for the largest η up to the rate whose optimum is not too far away."""

        def mixed(rate: float) -> dict[str, torch.Tensor]:
            return {name: (1 - rate) * old[name] + rate * new[name] for name in old}

        floors = self.parameters["floors"]
        return mixed(_largest(self.rate, lambda rate: self._moved(mixed(rate), floors) <= limit))

    def _moved(self, tables: Mapping[str, torch.Tensor], floors: torch.Tensor) -> float:
        """Return the share of the dense cost that the optimum for these losses takes and gives, from the latest cut."""
        assert self.latest is not None
        found, latest = self._optimum(tables, floors).choices, self.latest.choices
        each = (abs(found[spec.name].cost - latest[spec.name].cost) for spec in self.specs)
        return sum(each) / sum(self.budget.dense_cost(spec) for spec in self.specs)

    def _optimum(self, tables: Mapping[str, torch.Tensor], floors: torch.Tensor) -> Allocation:
        return best_ranks(self.specs, above_floors(self.specs, tables, floors), self.budget)

    def tables(self, parameters: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Return V with the pins in it, by default the present one: module path → (r + 1) float64, nats per token.

        Floors are not in it: they belong to one step, and to the cut that it starts from.
        """
        found = parameters or self.parameters
        return above_floors(self.specs, {spec.name: found[spec.name] for spec in self.specs}, found["pins"])

    def allocation(self) -> Allocation:
        """Return the exact optimum for the present tables, pins and floors; pins are in the floors."""
        return self._optimum({spec.name: self.parameters[spec.name] for spec in self.specs}, self.parameters["floors"])


def _spread(found: MaskGradients) -> float:
    """Return the standard error of the loss, nats per token."""
    return found.stderr if math.isfinite(found.stderr) else _LONE_SPREAD * found.loss


def _largest(most: float, fits: Callable[[float], bool]) -> float:
    """Return ``most`` if it fits, else about the largest number below that does; 0 is taken to fit."""
    if fits(most):
        return most
    low, high = 0.0, most
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _tails(found: MaskGradients, name: str) -> torch.Tensor:
    """Return the summed gradient of the first k masks of a layer, k = 0 … r: (r + 1) float64."""
    masks = found.masks[name].double().cpu()
    return torch.cat([torch.zeros(1, dtype=torch.float64), masks.cumsum(0)])
