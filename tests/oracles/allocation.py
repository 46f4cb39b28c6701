"""Rank allocation by brute force, written without looking at ara.allocation; exponential, for tiny problems."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

Choices = Sequence[tuple[int, float]]  # (cost, loss) of each choice of one layer


def least_loss(layers: Sequence[Choices], budget: int) -> float:
    """Return the least summed loss of one choice per layer within the budget, over all combinations."""
    return min(
        sum(loss for _, loss in picked)
        for picked in itertools.product(*layers)
        if sum(cost for cost, _ in picked) <= budget
    )


def lagrangian_bound(layers: Sequence[Choices], budget: int) -> float:
    """Return the largest value of the Lagrangian dual: no allocation within the budget can lose less.

    The dual is concave and piecewise linear in the price; its maximum lies where one layer is indifferent between two
    of its choices, or at price 0.
    """
    prices = {0.0}
    for choices in layers:
        for (cost_a, loss_a), (cost_b, loss_b) in itertools.combinations(choices, 2):
            prices.add(max((loss_a - loss_b) / (cost_b - cost_a), 0.0))
    return max(
        sum(min(loss + price * cost for cost, loss in choices) for choices in layers) - price * budget
        for price in prices
    )


def on_lower_hull(costs: Sequence[float], losses: Sequence[float]) -> set[int]:
    """Return the corners of the decreasing part of the lower convex hull, by testing each point against all chords.

    A point is a corner when every cheaper point loses more, and no chord between a cheaper and a dearer point passes
    below or through it.
    """
    corners = set()
    for i, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        if any(losses[a] <= loss for a in range(i)):
            continue
        below = False
        for a, b in itertools.product(range(i), range(i + 1, len(costs))):
            share = (cost - costs[a]) / (costs[b] - costs[a])
            below |= losses[a] + share * (losses[b] - losses[a]) <= loss
        if not below:
            corners.add(i)
    return corners
