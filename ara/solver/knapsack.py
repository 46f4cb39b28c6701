"""The multiple-choice knapsack, solved exactly: the choice per layer that loses least under the budget.

:func:`ara.solver.budget.minimise_loss` climbs convex hulls and may miss the optimum by up to one hull edge. Here
that gap is closed as by Pisinger's minimal algorithm:

1. The Lagrangian dual gives a price per parameter and a lower bound, that of the linear relaxation.
2. The reduced loss of a choice (loss + price · cost, less the least of its layer) is what it adds to that bound at
   least. A better solution has no choice whose reduced loss exceeds the gap between the bound and the best solution
   known; few choices per layer are left, the core.
3. Dynamic programming over the core, layer by layer. A state is dropped when another one costs and loses no more
   (dominance), or when the linear relaxation of the layers to come takes it beyond the best solution known (bound).

The core starts narrow and is widened until it provably holds the optimum.

Sources: E. Balas, E. Zemel, "An algorithm for large zero-one knapsack problems", Operations Research 28 (1980), for the
core; M. E. Dyer, W. O. Riha, J. Walker, "A hybrid dynamic programming/branch-and-bound algorithm for the
multiple-choice knapsack problem", J. Comput. Appl. Math. 58 (1995), for bounds inside dynamic programming; D. Pisinger,
"A minimal algorithm for the multiple-choice knapsack problem", EJOR 83 (1995), for the core that widens; H. Kellerer,
U. Pferschy, D. Pisinger, "Knapsack Problems" (2004), chapter 11, for all of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ara.models.weights import LinearSpec
from ara.solver.budget import Budget, climb, lower_hull, minimise_loss

# Relative to the loss of the relaxation and the worth of the budget, see `_Relaxation.scale`.
TOLERANCE = 1e-12
# Bounds on the dynamic programming: states that a layer starts from, and pairs (state, choice) that it looks at.
MAX_STATES = 1 << 17
MAX_PAIRS = 1 << 21
# Pairs looked at together, for memory.
_BLOCK = 1 << 18
# Width of the first core as a fraction of the gap, and the factor by which a core that was too narrow is widened.
_FIRST_CORE = 2.0**-12
_WIDEN = 4.0


def exact_minimise(specs: Sequence[LinearSpec], losses: Sequence[torch.Tensor], budget: Budget) -> list[int]:
    """Choose per layer so that the summed loss is least under the budget.

    A larger rank counts as losing no more than a smaller one: each loss is replaced by the least loss up to it. Of
    choices that then lose the same, the cheapest is taken. What the optimum leaves of the budget is spent in single
    steps, first those that save most (or cost least) of the loss as given, until none fits any more.

    The loss is the least possible within ``TOLERANCE`` · scale, where the scale is at most twice the summed fall of the
    losses from the cheapest choice to dense; with losses that are integers below 10¹¹ in sum it is the least possible.
    Only where more than ``MAX_STATES`` states, or ``MAX_PAIRS`` pairs of a state and a choice, survive dominance and
    bounds in one layer, the range of the states' losses is cut into as many equal intervals as states may remain, and
    the cheapest state of each interval is kept. The loss is then above the least one by no more than the widths of
    these intervals (one per layer) together, by no more than the gap to the Lagrangian bound, and never above that of
    ``minimise_loss``. This happens where many layers offer long runs of choices at nearly the same loss per parameter
    (losses proportional to the cost but for small noise or a fixed fee; one piecewise linear loss for all layers).

    Args:
        specs: the layers.
        losses: per layer, the loss of each of ``budget.choices(spec)``, (c) of any float type; finite.
        budget: the limit; the cheapest choices together must fit.

    Returns:
        Index into ``budget.choices(spec)`` per layer; the same for the same arguments.

    Raises:
        ValueError: a loss is not finite, losses and choices differ in number, or the cheapest choices do not fit.
    """
    choices = [budget.choices(spec) for spec in specs]
    layers = [
        _useful(spec, options, loss.detach().double().cpu().numpy())
        for spec, options, loss in zip(specs, choices, losses, strict=True)
    ]
    least = sum(int(layer.cost[0]) for layer in layers)
    if least > budget.parameters:
        raise ValueError(
            f"the cheapest choices cost {least:,} parameters, more than the budget of {budget.parameters:,}"
        )
    best, certain = _solve(layers, budget.parameters)
    picks = [int(layer.choice[pick]) for layer, pick in zip(layers, best, strict=True)]
    if not certain:
        falling = [torch.cummin(loss.detach().double().cpu(), 0).values for loss in losses]
        greedy = minimise_loss(specs, falling, budget)
        picks = min(picks, greedy, key=lambda found: _total(falling, found))
    left = budget.parameters - sum(options[pick][1] for options, pick in zip(choices, picks, strict=True))
    steps = [range(pick, len(options)) for pick, options in zip(picks, choices, strict=True)]
    return climb(choices, losses, steps, left)[0]


def _total(losses: Sequence[torch.Tensor], picks: Sequence[int]) -> float:
    return math.fsum(float(loss[pick]) for loss, pick in zip(losses, picks, strict=True))


@dataclass(frozen=True, eq=False)
class _Layer:
    """The choices of a layer that lose less than all cheaper ones.

    Attributes:
        choice: (c) int64, index into ``budget.choices(spec)``, increasing.
        cost: (c) int64, parameters, increasing.
        loss: (c) float64, decreasing to 0.
        perimeter: m + n; layers that share it reach the same costs.
    """

    choice: np.ndarray
    cost: np.ndarray
    loss: np.ndarray
    perimeter: int


def _useful(spec: LinearSpec, options: Sequence[tuple[int | None, int]], loss: np.ndarray) -> _Layer:
    """Return the choices of ``spec`` that are worth their cost.

    Args:
        spec: the layer.
        options: its choices (rank, cost).
        loss: (c) float64, of each choice.

    Raises:
        ValueError: a loss is not finite, or their number is not that of the choices.
    """
    if loss.shape != (len(options),):
        raise ValueError(f"{spec.name} has {len(options)} choices, but losses of shape {loss.shape}")
    if not np.isfinite(loss).all():
        raise ValueError(f"{spec.name} has losses that are not finite")
    falling = np.minimum.accumulate(loss)
    choice = np.flatnonzero(np.diff(falling, prepend=np.inf) < 0)
    cost = np.array([cost for _, cost in options], dtype=np.int64)
    return _Layer(choice, cost[choice], falling[choice] - falling[-1], spec.m + spec.n)


@dataclass(eq=False)
class _Best:
    """The best solution known.

    Attributes:
        excess: its loss less the Lagrangian bound, float.
        picks: index into the arrays of :class:`_Layer`, per layer.
    """

    excess: float
    picks: list[int]


def _solve(layers: Sequence[_Layer], capacity: int) -> tuple[list[int], bool]:
    """Return the best choice per layer, and whether it is certain that none is better.

    Args:
        layers: their choices; the cheapest together cost no more than ``capacity``.
        capacity: parameters.
    """
    if sum(int(layer.cost[-1]) for layer in layers) <= capacity:
        return [len(layer.cost) - 1 for layer in layers], True
    relaxed = _relax(layers, capacity)
    tolerance = TOLERANCE * relaxed.scale / 2  # one half for the best solution, one for dominance
    best = _Best(relaxed.gap, relaxed.picks)
    width = relaxed.gap * _FIRST_CORE
    certain = True
    while best.excess > tolerance:
        # Every solution whose excess is at most `width` consists of choices of this core.
        certain = _Core(layers, relaxed, capacity, width).search(best, tolerance)
        if best.excess <= width:
            break
        width = min(width * _WIDEN, best.excess)
    return best.picks, certain or best.excess <= tolerance


@dataclass(frozen=True, eq=False)
class _Relaxation:
    """Optimum of the Lagrangian dual of the budget, which is that of the linear relaxation.

    Attributes:
        price: loss per parameter.
        reduced: per layer, (c) float64: loss + price · cost, less the least of the layer; 0 is what the price chooses.
        picks: what the price chooses, from the cheapest end: a solution.
        gap: loss of ``picks`` less the bound.
        scale: loss of ``picks`` plus what the budget beyond the cheapest choices is worth at the price.
    """

    price: float
    reduced: list[np.ndarray]
    picks: list[int]
    gap: float
    scale: float


def _relax(layers: Sequence[_Layer], capacity: int) -> _Relaxation:
    """Maximise the dual: Σ min(loss + price · cost) - price · capacity over the price.

    The dual is concave and piecewise linear. Each iteration takes the price at which a solution within the capacity and
    one beyond it are worth the same, and replaces one of them by what is better at that price; where nothing is, the
    price is the optimum. Any price gives a valid bound.
    """
    sizes = np.array([len(layer.cost) for layer in layers])
    starts = np.cumsum(sizes) - sizes
    cost = np.concatenate([layer.cost - layer.cost[0] for layer in layers])
    loss = np.concatenate([layer.loss for layer in layers])
    room = capacity - sum(int(layer.cost[0]) for layer in layers)
    within, beyond = starts, starts + sizes - 1
    spent, asked = 0, int(cost[beyond].sum())
    while True:
        price = float(loss[within].sum() - loss[beyond].sum()) / (asked - spent)
        value = loss + price * cost
        reduced = value - np.repeat(np.minimum.reduceat(value, starts), sizes)
        zeros = np.flatnonzero(reduced == 0)
        better = zeros[np.searchsorted(zeros, starts)]
        between = int(cost[better].sum())
        # A gain of rounding errors is none.
        if not spent < between < asked or reduced[within].sum() <= 1e-14 * value[within].sum():
            break
        if between <= room:
            within, spent = better, between
        else:
            beyond, asked = better, between
    return _Relaxation(
        price=price,
        reduced=np.split(reduced, starts[1:]),
        picks=(within - starts).tolist(),
        gap=float(reduced[within].sum()) + price * (room - spent),
        scale=float(loss[within].sum()) + price * room,
    )


@dataclass(frozen=True, eq=False)
class _Edges:
    """Edges of the convex hulls of all layers, steepest first; a layer's own in their order.

    Attributes:
        place: (e) place of the layer in the order of the core.
        start, end: (e) the choices that the edge joins, index into the layer's choices in the core.
        cost: (e) int64, units from start to end.
        reduced: (e) float64, reduced loss from start to end.
        slope: (e) float64, reduced loss per unit, non-decreasing.
    """

    place: np.ndarray
    start: np.ndarray
    end: np.ndarray
    cost: np.ndarray
    reduced: np.ndarray
    slope: np.ndarray


class _Rest:
    """Linear relaxation of the layers of a core from one place on.

    Its optimum climbs the edges from the cheapest choices, steepest first, and takes part of the first that no longer
    fits.

    Args:
        core: the core.
        place: of the first layer.
    """

    def __init__(self, core: _Core, place: int) -> None:
        self.core = core
        self.edges = np.flatnonzero(core.edges.place >= place)
        # Cost and reduced loss of the corners; beyond the last one, room stays unused at the price.
        self.cost = np.concatenate([[0], np.cumsum(core.edges.cost[self.edges])])
        first = float(sum(reduced[0] for reduced in core.reduced[place:]))
        self.reduced = first + np.concatenate([[0.0], np.cumsum(core.edges.reduced[self.edges])])
        self.slope = np.append(core.edges.slope[self.edges], core.price)

    def bound(self, cost: np.ndarray, reduced: np.ndarray) -> np.ndarray:
        """Return the least excess that any completion of the states has; infinite where none fits.

        Args:
            cost: (s) int64 units, of the layers before.
            reduced: (s) float64, reduced loss of the layers before.
        """
        room = self.core.room - cost
        corner = np.searchsorted(self.cost, room, side="right") - 1
        bound = reduced + self.reduced[corner] + (room - self.cost[corner]) * self.slope[corner]
        return np.where(corner >= 0, bound, np.inf)

    def complete(self, cost: np.ndarray, reduced: np.ndarray) -> tuple[float, int, list[tuple[int, int]]]:
        """Complete states to solutions: the edges that fit, then the largest choice that fits in the next edge's layer.

        Args:
            cost: (s) int64 units, of the layers before; all leave room for the cheapest choices.
            reduced: (s) float64, reduced loss of the layers before.

        Returns:
            The least excess, its state, and the choices of the layers to come as (place, choice), later ones to replace
            earlier ones of the same place; layers that are not named have their first choice.
        """
        core, edges = self.core, self.core.edges
        room = core.room - cost
        corner = np.searchsorted(self.cost, room, side="right") - 1
        room = room - self.cost[corner]
        excess = reduced + self.reduced[corner] + room * core.price
        split = np.flatnonzero(corner < len(self.edges))
        edge = self.edges[corner[split]]
        place = edges.place[edge]
        at = core.offset[place] + edges.start[edge]
        largest = core.largest(place, core.flat_cost[at] + room[split])
        excess[split] += core.flat_reduced[largest] - core.flat_reduced[at]
        excess[split] -= (core.flat_cost[largest] - core.flat_cost[at]) * core.price
        state = int(np.argmin(excess))
        passed = self.edges[: corner[state]]
        chosen = list(zip(edges.place[passed].tolist(), edges.end[passed].tolist(), strict=True))
        mine = np.flatnonzero(split == state)
        if len(mine):
            chosen.append((int(place[mine[0]]), int(largest[mine[0]] - core.offset[place[mine[0]]])))
        return float(excess[state]), state, chosen


class _Core:
    """The choices whose reduced loss is at most ``width``, and dynamic programming over them.

    Costs count from the cheapest choice of each layer in the core, in units of their greatest common divisor.

    Args:
        layers: all choices.
        relaxed: their relaxation.
        capacity: parameters.
        width: largest reduced loss.
    """

    def __init__(self, layers: Sequence[_Layer], relaxed: _Relaxation, capacity: int, width: float) -> None:
        self.width = width
        kept = [np.flatnonzero(reduced <= width) for reduced in relaxed.reduced]
        spare = capacity - sum(int(layer.cost[keep[0]]) for layer, keep in zip(layers, kept, strict=True))
        self.feasible = spare >= 0
        # What does not even fit together with the cheapest choices goes, too.
        kept = [keep[layer.cost[keep] <= layer.cost[keep[0]] + spare] for layer, keep in zip(layers, kept, strict=True)]
        self.kept = kept
        free = [i for i, keep in enumerate(kept) if len(keep) > 1]
        steps = [np.gcd.reduce(np.diff(layers[i].cost[kept[i]])) for i in free]
        unit = math.gcd(*map(int, steps)) or 1
        self.room, waste = divmod(spare, unit)
        self.price = relaxed.price * unit
        # No solution can use what is left over of a unit, and layers without a choice add their reduced loss.
        self.least = relaxed.price * waste
        self.least += float(sum(relaxed.reduced[i][keep[0]] for i, keep in enumerate(kept) if len(keep) == 1))
        # Layers that reach the same costs follow each other, so that their states coincide.
        sizes = Counter[int]()
        for i in free:
            sizes[layers[i].perimeter] += len(kept[i])
        self.order = sorted(free, key=lambda i: (-sizes[layers[i].perimeter], layers[i].perimeter, -len(kept[i]), i))
        self.cost = [(layers[i].cost[kept[i]] - layers[i].cost[kept[i][0]]) // unit for i in self.order]
        self.reduced = [relaxed.reduced[i][kept[i]] for i in self.order]
        self.flat_cost = np.concatenate([np.zeros(0, np.int64), *self.cost])
        self.flat_reduced = np.concatenate([np.zeros(0), *self.reduced])
        self.offset = np.cumsum([0, *map(len, self.cost)])
        places = np.repeat(np.arange(len(self.cost)), np.diff(self.offset))
        self._sorted = places * (self.room + 1) + self.flat_cost
        self.edges = self._hull_edges([layers[i].loss[kept[i]] for i in self.order])

    def _hull_edges(self, losses: Sequence[np.ndarray]) -> _Edges:
        hulls = [np.array(lower_hull(c.tolist(), loss.tolist())) for c, loss in zip(self.cost, losses, strict=True)]
        place = np.repeat(np.arange(len(hulls)), np.array([len(hull) - 1 for hull in hulls], dtype=np.int64))
        start = np.concatenate([np.zeros(0, np.int64), *(hull[:-1] for hull in hulls)])
        end = np.concatenate([np.zeros(0, np.int64), *(hull[1:] for hull in hulls)])
        a, b = self.offset[place] + start, self.offset[place] + end
        cost = self.flat_cost[b] - self.flat_cost[a]
        reduced = self.flat_reduced[b] - self.flat_reduced[a]
        slope = reduced / cost
        for p in range(len(hulls)):
            # Rounding must not change the order within a layer.
            slope[place == p] = np.maximum.accumulate(slope[place == p])
        by = np.argsort(slope, kind="stable")
        return _Edges(place[by], start[by], end[by], cost[by], reduced[by], slope[by])

    def largest(self, place: np.ndarray, room: np.ndarray) -> np.ndarray:
        """Return the largest choice at each ``place`` that costs at most ``room`` units, as index into ``flat_*``."""
        return np.searchsorted(self._sorted, place * (self.room + 1) + room, side="right") - 1

    def search(self, best: _Best, tolerance: float) -> bool:
        """Replace ``best`` by the best solution in the core where that is better by more than ``tolerance``.

        Args:
            best: of all solutions known; changed in place.
            tolerance: summed loss that dominance may neglect.

        Returns:
            Whether it is certain, up to the tolerances, that the core has none better than ``best``.
        """
        if not self.feasible:
            return True
        certain = True
        cost, reduced = np.zeros(1, np.int64), np.full(1, self.least)
        # The way back: per layer done, the state before and the choice of each state.
        way: list[tuple[np.ndarray, np.ndarray]] = []
        for place in range(len(self.order) + 1):
            rest = _Rest(self, place)
            if place:
                ceiling = min(self.width, best.excess - tolerance)
                choices = np.flatnonzero(self.reduced[place - 1] <= ceiling - reduced.min())
                limit = max(min(MAX_STATES, MAX_PAIRS // max(len(choices), 1)), 1)
                if len(cost) > limit:
                    certain = False
                    fall = float(reduced[0] - reduced[-1] - self.price * (cost[0] - cost[-1]))
                    keep = self._undominated(cost, reduced, fall / limit)
                    cost, reduced, way[-1] = cost[keep], reduced[keep], (way[-1][0][keep], way[-1][1][keep])
                cost, reduced, state, choice = self._extend(cost, reduced, place - 1, choices, rest, ceiling, tolerance)
                way.append((state, choice))
            if not len(cost):
                break
            excess, last, completion = rest.complete(cost, reduced)
            if excess < best.excess - tolerance:
                best.excess, best.picks = excess, self._picks(way, last, completion)
            if best.excess <= self.least + tolerance:
                return True
        return certain

    def _extend(
        self,
        cost: np.ndarray,
        reduced: np.ndarray,
        place: int,
        choices: np.ndarray,
        rest: _Rest,
        ceiling: float,
        tolerance: float,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return cost, reduced loss, state before and choice of the states after the layer at ``place``.

        Args:
            cost: (s) of the states before.
            reduced: (s) of the states before.
            place: of the layer.
            choices: of the layer.
            rest: the layers behind it.
            ceiling: largest bound that a state may have.
            tolerance: see :meth:`search`.
        """
        rows = max(_BLOCK // len(cost), 1)
        found = [np.zeros(0, np.int64)]
        for first in range(0, len(choices), rows):
            block = choices[first : first + rows]
            outer = np.add.outer(self.cost[place][block], cost), np.add.outer(self.reduced[place][block], reduced)
            found.append(first * len(cost) + np.flatnonzero(rest.bound(*(x.ravel() for x in outer)) <= ceiling))
        row, state = np.divmod(np.concatenate(found), len(cost))
        choice = choices[row]
        cost, reduced = self.cost[place][choice] + cost[state], self.reduced[place][choice] + reduced[state]
        by = np.argsort(cost, kind="stable")
        by = by[self._undominated(cost[by], reduced[by], tolerance / len(self.order))]
        return cost[by], reduced[by], state[by].astype(np.int32), choice[by].astype(np.int32)

    def _undominated(self, cost: np.ndarray, reduced: np.ndarray, interval: float) -> np.ndarray:
        """Return which states remain: those whose loss is in a lower interval than that of every cheaper state.

        A state that is dropped has a cheaper one, or one that costs the same, that loses less than ``interval`` more.

        Args:
            cost: (s) int64 units, non-decreasing.
            reduced: (s) float64.
            interval: loss.
        """
        level = np.floor((reduced - self.price * cost) / interval)
        lowest = np.minimum.accumulate(level)
        keep = np.flatnonzero(np.append(True, level[1:] < lowest[:-1])[: len(level)])
        # Among states of the same cost the last one is the lowest.
        return keep[np.append(cost[keep][1:] != cost[keep][:-1], True)[: len(keep)]]

    def _picks(
        self, way: Sequence[tuple[np.ndarray, np.ndarray]], state: int, completion: Sequence[tuple[int, int]]
    ) -> list[int]:
        """Return the choice of every layer, as an index into the arrays of :class:`_Layer`.

        Args:
            way: per layer done, the state before and the choice of each state.
            state: the state after the layers done.
            completion: choices of the layers to come, see :meth:`_Rest.complete`.
        """
        choice = dict(completion)
        for place in reversed(range(len(way))):
            before, chosen = way[place]
            state, choice[place] = int(before[state]), int(chosen[state])
        picks = [int(keep[0]) for keep in self.kept]
        for place, i in enumerate(self.order):
            picks[i] = int(self.kept[i][choice.get(place, 0)])
        return picks
