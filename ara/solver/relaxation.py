"""The choices of a layer that can be optimal, and the Lagrangian relaxation of the budget over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ara.models.weights import LinearSpec
from ara.solver.problem import Choice


@dataclass(frozen=True, eq=False)
class Front:
    """The choices of a layer whose loss is below that of all cheaper ones.

    Attributes:
        choice: (c) int64, index into ``budget.choices(spec)``, increasing.
        cost: (c) int64, in the unit of the budget, increasing.
        loss: (c) float64, decreasing to 0.
        perimeter: m + n; layers with the same one have the same possible costs.
    """

    choice: np.ndarray
    cost: np.ndarray
    loss: np.ndarray
    perimeter: int


def front_of(spec: LinearSpec, options: Sequence[Choice], loss: np.ndarray) -> Front:
    """Return the choices of ``spec`` that lose less than all cheaper ones.

    Args:
        spec: the layer.
        options: its choices, cheapest first.
        loss: (c) float64, of each choice.

    Raises:
        ValueError: a loss is not finite, or losses and choices differ in number.
    """
    if loss.shape != (len(options),):
        raise ValueError(f"{spec.name} has {len(options)} choices, but losses of shape {loss.shape}")
    if not np.isfinite(loss).all():
        raise ValueError(f"{spec.name} has losses that are not finite")
    falling = np.minimum.accumulate(loss)
    choice = np.flatnonzero(np.diff(falling, prepend=np.inf) < 0)
    cost = np.array([choice.cost for choice in options], dtype=np.int64)
    # Choices of different bit widths may cost the same; the last of them loses least.
    choice = choice[np.diff(cost[choice], append=-1) != 0]
    return Front(choice, cost[choice], falling[choice] - falling[-1], spec.m + spec.n)


@dataclass(frozen=True, eq=False)
class Relaxation:
    """Optimum of the Lagrangian dual of the budget; it equals that of the linear relaxation.

    Attributes:
        price: loss per unit of cost.
        reduced: per layer, (c) float64: loss + price · cost, minus the least of the layer; 0 for optimal choices.
        picks: a solution within the budget, made of optimal choices at this price.
        gap: loss of ``picks`` minus the bound.
        scale: loss of ``picks`` + price · budget left by the cheapest choices.
    """

    price: float
    reduced: list[np.ndarray]
    picks: list[int]
    gap: float
    scale: float


def relax(layers: Sequence[Front], capacity: int) -> Relaxation:
    """Maximise the dual: Σ min(loss + price · cost) - price · capacity over the price.

    The dual is concave and piecewise linear. Each iteration takes the price at which a solution within the capacity and
    one above it have the same value, and replaces one of them by a better solution at that price. When there is none,
    the price is optimal. Any price gives a valid bound.
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
        # A gain within rounding errors does not count.
        if not spent < between < asked or reduced[within].sum() <= 1e-14 * value[within].sum():
            break
        if between <= room:
            within, spent = better, between
        else:
            beyond, asked = better, between
    return Relaxation(
        price=price,
        reduced=np.split(reduced, starts[1:]),
        picks=(within - starts).tolist(),
        gap=float(reduced[within].sum()) + price * (room - spent),
        scale=float(loss[within].sum()) + price * room,
    )
