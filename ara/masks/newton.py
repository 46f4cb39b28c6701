"""The priced form with a second-order step: linearise the loss at the current cut and solve the knapsack again.

At a cut with ranks k⁰ the loss of other ranks is, to second order in the masks and layer by layer,

    L_i(k) ≈ Σ_j (1[j ≤ k] − 1[j ≤ k⁰_i]) ∂L/∂p_ij  +  κ |T_i(k) − T_i(k⁰_i)|

The first term is the straight-through gradient. It includes the effect of the errors of all other layers. The second
term is the Gauss-Newton curvature, taken from the sensitivity table T (:mod:`ara.masks.sensitivity_table`): T_i(k) is
half the mean square of a tail sum whose terms are nearly uncorrelated, so the curvature of the components between k and
k⁰ is the difference. If the gradients agree with the table, the model equals the table.

Every step averages the new model into the previous ones, V ← (1 − η) V + η L, and takes the ranks that are optimal for
V under the budget. So the noise of a batch changes few ranks. The model is valid only near the cut. Hence:

- A step that would move more than a given share of all parameters is shortened by a smaller η.
- No layer falls below half of its rank in one step (:mod:`ara.masks.trust_region`). This also holds for the start from
  the result of another budget.
- A bad step is one after which the loss is far higher. Usually one component is essential for the whole model (in
  SmolLM2-135M the value projection of the first block), and the gradient after the step shows it: the layers whose
  previous rank would lower the loss most are pinned at that rank, or at their highest rank below dense. If they do not
  explain the loss, or pinning does not help, the step is undone and the next steps are half as long.

The result is a cut that is optimal for its own linearisation: all layers pay the same price for their last component.
Adam on θ (:mod:`ara.masks.priced`) needs many more steps, because it does not know the scale of the loss.
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

# A step is bad if the next loss exceeds the last one by this factor and by this many standard errors.
_BAD = 1.3
_BAD_STDERRS = 3.0
# Standard error assumed for the loss of a single window, as a share of the loss.
_LONE_STDERR = 0.25
# Prefix of the names of the tensors that a bad step restores.
_ACCEPTED = "accepted:"
# Bisections in the search for a step length.
_BISECTIONS = 6
# A layer is pinned if its previous rank would lower the loss by this share of what the most important layer would.
# All pinned layers together must explain this share of the increase.
_BLAME = 0.5
# A step is undone after this many bad steps in a row.
_PATIENCE = 2


class NewtonMasks(MaskFamily):
    """Rank losses that are linearised again in every step; see the module's docstring."""

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
            start: module path → (r + 1), the first V, nats per token.
            curvature: module path → (r + 1), the sensitivity table T, nats per token.
            rate: largest η.
            trust: largest share of the layers' dense parameters that the first step may move, removed and added ones
                together; falls linearly to a quarter. A step that would move more gets a smaller η.
            damping: κ; above 1 moves fewer ranks.
            around: the cut at which ``start`` is a model, if it comes from a training at another budget.
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
        """Return the ranks that are optimal for the current tables; there are no masks."""
        self.latest = self.allocation()
        return Cut({}, self.latest.ranks)

    def update(self, gradients: MaskGradients, progress: float) -> None:
        """Average the model at the latest cut into the tables, or handle a bad step."""
        assert self.latest is not None
        accepted = self.parameters[f"{_ACCEPTED}loss"]
        noise = math.hypot(_stderr(gradients), float(accepted[1]))
        if gradients.loss > max(_BAD * float(accepted[0]), float(accepted[0]) + _BAD_STDERRS * noise):
            self._handle_bad_step(gradients)
            return
        ranks = self._as_numbers(self.latest)
        accepted.copy_(torch.tensor([gradients.loss, _stderr(gradients)]))
        self.parameters["bad"].zero_()
        for name in ("floors", *(spec.name for spec in self.specs)):
            self.parameters[f"{_ACCEPTED}{name}"].copy_(self.parameters[name])
        self.parameters[f"{_ACCEPTED}ranks"].copy_(ranks)
        old, new = {}, {}
        for spec, at in zip(self.specs, ranks.tolist(), strict=True):
            curve, table, first = self.curvature[spec.name], self.parameters[spec.name], _summed(gradients, spec.name)
            old[spec.name] = table - table[at]
            new[spec.name] = first - first[at] + self.damping * (curve - curve[at]).abs()
        limit = float(self.parameters["trust"]) * (1 - 0.75 * progress)
        self.parameters["floors"].copy_(self._next_floors(old, limit))
        for name, table in self._averaged(old, new, limit).items():
            self.parameters[name].copy_(table)

    def _handle_bad_step(self, gradients: MaskGradients) -> None:
        """Pin the layers that explain the loss; undo the step if none explain it or pinning did not help."""
        assert self.latest is not None
        before, now = self.parameters[f"{_ACCEPTED}ranks"], self._as_numbers(self.latest)
        # Decrease of the loss, to first order, if the layer had its previous rank.
        gains = []
        for spec, k, to in zip(self.specs, now.tolist(), before.tolist(), strict=True):
            first = _summed(gradients, spec.name)
            gains.append(float(first[k] - first[to]) if to > k else 0.0)
        pinned = [i for i, gain in enumerate(gains) if gain > 0 and gain >= _BLAME * max(gains)]
        self.parameters["bad"] += 1
        for i in pinned:
            self.parameters["pins"][i] = min(int(before[i]), self.specs[i].top_rank)
        floors = torch.maximum(self.parameters["floors"], self.parameters["pins"])
        self.parameters["floors"].copy_(floors)
        excess = gradients.loss - float(self.parameters[f"{_ACCEPTED}loss"][0])
        if sum(gains[i] for i in pinned) >= _BLAME * excess and int(self.parameters["bad"]) < _PATIENCE:
            return
        for spec in self.specs:
            self.parameters[spec.name].copy_(self.parameters[f"{_ACCEPTED}{spec.name}"])
        # Pins remain: the restored cut satisfies them.
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

        After a start from a far larger budget many ranks are at their floors. If the floors fell at once, the ranks
        would move by more than the limit.
        """
        assert self.latest is not None
        wanted = torch.maximum(floors_below(self.specs, self.latest), self.parameters["pins"])
        above = (self.parameters["floors"] - wanted).clamp_min(0).double()

        def lowered(share: float) -> torch.Tensor:
            return wanted + ((1 - share) * above).ceil().long()

        return lowered(_largest(1.0, lambda share: self._moved(old, lowered(share)) <= limit))

    def _averaged(
        self, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor], limit: float
    ) -> dict[str, torch.Tensor]:
        """Return (1 − η) old + η new for the largest η up to the rate whose optimum is within the limit."""

        def mixed(rate: float) -> dict[str, torch.Tensor]:
            return {name: (1 - rate) * old[name] + rate * new[name] for name in old}

        floors = self.parameters["floors"]
        return mixed(_largest(self.rate, lambda rate: self._moved(mixed(rate), floors) <= limit))

    def _moved(self, tables: Mapping[str, torch.Tensor], floors: torch.Tensor) -> float:
        """Return the share of the dense cost by which the optimum for these losses differs from the latest cut."""
        assert self.latest is not None
        optimum, latest = self._optimum(tables, floors).choices, self.latest.choices
        moved = sum(abs(optimum[spec.name].cost - latest[spec.name].cost) for spec in self.specs)
        return moved / sum(self.budget.dense_cost(spec) for spec in self.specs)

    def _optimum(self, tables: Mapping[str, torch.Tensor], floors: torch.Tensor) -> Allocation:
        return best_ranks(self.specs, above_floors(self.specs, tables, floors), self.budget)

    def tables(self, parameters: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Return V with barriers below the pins, nats per token. Floors are left out: they apply to one step only."""
        values = parameters or self.parameters
        return above_floors(self.specs, {spec.name: values[spec.name] for spec in self.specs}, values["pins"])

    def allocation(self) -> Allocation:
        """Return the exact optimum for the current tables and floors, which include the pins."""
        return self._optimum({spec.name: self.parameters[spec.name] for spec in self.specs}, self.parameters["floors"])


def _stderr(gradients: MaskGradients) -> float:
    """Return the standard error of the loss, nats per token."""
    return gradients.stderr if math.isfinite(gradients.stderr) else _LONE_STDERR * gradients.loss


def _largest(most: float, fits: Callable[[float], bool]) -> float:
    """Return ``most`` if it fits, else approximately the largest number that fits; 0 is assumed to fit."""
    if fits(most):
        return most
    low, high = 0.0, most
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _summed(gradients: MaskGradients, name: str) -> torch.Tensor:
    """Return the summed gradient of the first k components of a layer, k = 0 … r: (r + 1) float64."""
    masks = gradients.masks[name].double().cpu()
    return torch.cat([torch.zeros(1, dtype=torch.float64), masks.cumsum(0)])
