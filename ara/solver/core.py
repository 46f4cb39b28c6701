"""Dynamic programming over the core of a multiple-choice knapsack; see :mod:`ara.solver.knapsack` for the method."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ara.solver.greedy import lower_hull
from ara.solver.relaxation import Front, Relaxation

# Limits of the dynamic programming: states before a layer, and pairs (state, choice) examined for it.
MAX_STATES = 1 << 17
MAX_PAIRS = 1 << 21
# Pairs examined at once; bounds the memory.
_BLOCK = 1 << 18


@dataclass(eq=False)
class Best:
    """The best solution known.

    Attributes:
        excess: loss minus the Lagrangian bound.
        picks: index into the arrays of :class:`Front`, per layer.
    """

    excess: float
    picks: list[int]


@dataclass(frozen=True, eq=False)
class _Edges:
    """Edges of the convex hulls of all layers, steepest first; those of one layer in their own order.

    Attributes:
        place: (e) position of the layer in the order of the core.
        start, end: (e) the choices that the edge joins, index into the layer's choices in the core.
        cost: (e) int64 units, from start to end.
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
    """Linear relaxation of the layers of a core from position ``place`` on.

    Its optimum starts from the cheapest choices and takes edges, steepest first. The first edge that does not fit is
    taken in part.
    """

    def __init__(self, core: Core, place: int) -> None:
        self.core = core
        self.edges = np.flatnonzero(core.edges.place >= place)
        # Cost and reduced loss after each edge. Room after the last edge stays unused; it counts at the price.
        self.cost = np.concatenate([[0], np.cumsum(core.edges.cost[self.edges])])
        first = float(sum(reduced[0] for reduced in core.reduced[place:]))
        self.reduced = first + np.concatenate([[0.0], np.cumsum(core.edges.reduced[self.edges])])
        self.slope = np.append(core.edges.slope[self.edges], core.price)

    def bound(self, cost: np.ndarray, reduced: np.ndarray) -> np.ndarray:
        """Return a lower bound on the excess of all completions of the states (s); infinite where none fits."""
        room = self.core.room - cost
        corner = np.searchsorted(self.cost, room, side="right") - 1
        bound = reduced + self.reduced[corner] + (room - self.cost[corner]) * self.slope[corner]
        return np.where(corner >= 0, bound, np.inf)

    def complete(self, cost: np.ndarray, reduced: np.ndarray) -> tuple[float, int, list[tuple[int, int]]]:
        """Complete states to solutions: take the edges that fit, then the largest choice that fits in the next layer.

        Args:
            cost: (s) int64 units, of the layers before; all leave room for the cheapest choices.
            reduced: (s) float64, reduced loss of the layers before.

        Returns:
            The least excess, its state, and the choices of the remaining layers as (place, choice). A later pair
            replaces an earlier one of the same place. Layers not named have their first choice.
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


class Core:
    """The choices whose reduced loss is at most ``width``, and dynamic programming over them.

    Costs are relative to the cheapest choice of each layer in the core, in units of their greatest common divisor.

    Args:
        layers: all choices.
        relaxed: their relaxation.
        capacity: limit on the summed cost.
        width: largest reduced loss.
    """

    def __init__(self, layers: Sequence[Front], relaxed: Relaxation, capacity: int, width: float) -> None:
        self.width = width
        kept = [np.flatnonzero(reduced <= width) for reduced in relaxed.reduced]
        spare = capacity - sum(int(layer.cost[keep[0]]) for layer, keep in zip(layers, kept, strict=True))
        self.feasible = spare >= 0
        # Drop choices that do not fit even with the cheapest choices of all other layers.
        kept = [keep[layer.cost[keep] <= layer.cost[keep[0]] + spare] for layer, keep in zip(layers, kept, strict=True)]
        self.kept = kept
        free = [i for i, keep in enumerate(kept) if len(keep) > 1]
        steps = [np.gcd.reduce(np.diff(layers[i].cost[kept[i]])) for i in free]
        unit = math.gcd(*map(int, steps)) or 1
        self.room, waste = divmod(spare, unit)
        self.price = relaxed.price * unit
        # No solution can use a fraction of a unit. Layers with a single choice add its reduced loss.
        self.least = relaxed.price * waste
        self.least += float(sum(relaxed.reduced[i][keep[0]] for i, keep in enumerate(kept) if len(keep) == 1))
        # Layers with the same possible costs are adjacent, so that their states coincide.
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
            # Rounding errors must not change the order within a layer.
            slope[place == p] = np.maximum.accumulate(slope[place == p])
        by = np.argsort(slope, kind="stable")
        return _Edges(place[by], start[by], end[by], cost[by], reduced[by], slope[by])

    def largest(self, place: np.ndarray, room: np.ndarray) -> np.ndarray:
        """Return the largest choice at each ``place`` that costs at most ``room`` units, as index into ``flat_*``."""
        return np.searchsorted(self._sorted, place * (self.room + 1) + room, side="right") - 1

    def search(self, best: Best, tolerance: float) -> bool:
        """Replace ``best`` by the best solution in the core if that is better by more than ``tolerance``.

        Args:
            best: the best solution known; changed in place.
            tolerance: summed loss that dominance may neglect.

        Returns:
            Whether it is certain, up to the tolerances, that the core has no better solution than ``best``.
        """
        if not self.feasible:
            return True
        certain = True
        cost, reduced = np.zeros(1, np.int64), np.full(1, self.least)
        # For backtracking: per finished layer, the previous state and the choice of each state.
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
        """Return cost, reduced loss, previous state and choice of the states after the layer at ``place``.

        ``ceiling`` is the largest bound that a state may have; ``rest`` are the layers after this one.
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
        """Return the states whose loss is in a lower interval than that of every cheaper state.

        For each dropped state a state of the same cost or less remains whose loss is higher by less than ``interval``.
        ``cost`` (s) is non-decreasing.
        """
        level = np.floor((reduced - self.price * cost) / interval)
        lowest = np.minimum.accumulate(level)
        keep = np.flatnonzero(np.append(True, level[1:] < lowest[:-1])[: len(level)])
        # Among states of the same cost the last one is the lowest.
        return keep[np.append(cost[keep][1:] != cost[keep][:-1], True)[: len(keep)]]

    def _picks(
        self, way: Sequence[tuple[np.ndarray, np.ndarray]], state: int, completion: Sequence[tuple[int, int]]
    ) -> list[int]:
        """Return the choice of every layer, as index into :class:`Front`: backtrack ``way``, add ``completion``."""
        choice = dict(completion)
        for place in reversed(range(len(way))):
            before, chosen = way[place]
            state, choice[place] = int(before[state]), int(chosen[state])
        picks = [int(keep[0]) for keep in self.kept]
        for place, i in enumerate(self.order):
            picks[i] = int(self.kept[i][choice.get(place, 0)])
        return picks
