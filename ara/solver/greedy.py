"""Greedy solutions of the multiple-choice knapsack: climb along convex hulls, or by single steps."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch

from ara.models.weights import LinearSpec
from ara.solver.problem import Budget, Choice


def minimise_loss(specs: Sequence[LinearSpec], losses: Sequence[torch.Tensor], budget: Budget) -> list[int]:
    """Choose per layer so that the summed loss is small under the budget, along the convex hulls of the layers.

    Taking the edges of the lower convex hulls by loss saved per cost is optimal for the Lagrangian relaxation. The rest
    of the budget is spent in single steps, largest saving per cost first.

    Args:
        specs: the layers.
        losses: per layer, the loss of each of ``budget.choices(spec)``, non-increasing.
        budget: the limit; the cheapest choices together must fit.

    Returns:
        Index into ``budget.choices(spec)`` per layer.
    """
    choices = [budget.choices(spec) for spec in specs]
    hulls = [
        lower_hull([choice.cost for choice in options], loss.tolist())
        for options, loss in zip(choices, losses, strict=True)
    ]
    left = budget.limit - sum(options[0].cost for options in choices)
    return spend_on_steps(specs, losses, climb(choices, losses, hulls, left), budget)


def spend_on_steps(
    specs: Sequence[LinearSpec], losses: Sequence[torch.Tensor], picks: Sequence[int], budget: Budget
) -> list[int]:
    """Return picks raised by single rank steps, largest saving of loss per cost first, until none fits.

    Args:
        specs: the layers.
        losses: per layer, the loss of each of ``budget.choices(spec)``.
        picks: index into ``budget.choices(spec)`` per layer; together within the budget.
        budget: the limit.
    """
    choices = [budget.choices(spec) for spec in specs]
    left = budget.limit - sum(options[pick].cost for options, pick in zip(choices, picks, strict=True))
    steps = [budget.rank_steps(spec, pick) for spec, pick in zip(specs, picks, strict=True)]
    return climb(choices, losses, steps, left)


def lower_hull(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Return the indices of the lower convex hull of the points (cost, loss), cheapest first.

    Args:
        costs: non-decreasing.
        losses: one per cost.
    """
    hull: list[int] = []
    for i in range(len(costs)):
        if hull and losses[i] >= losses[hull[-1]]:
            continue
        if hull and costs[i] == costs[hull[-1]]:
            hull.pop()
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (losses[a] - losses[b]) * (costs[i] - costs[b]) > (losses[b] - losses[i]) * (costs[b] - costs[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def climb(
    choices: Sequence[Sequence[Choice]], losses: Sequence[torch.Tensor], ladders: Sequence[Sequence[int]], left: int
) -> list[int]:
    """Return the choice reached per layer by taking steps, largest saving of loss per cost first, until none fits.

    Args:
        choices: of each layer.
        losses: per layer, the loss of each choice.
        ladders: per layer, the choices to step through, beginning with the current one, at strictly increasing cost.
        left: cost to spend.
    """
    at = [0] * len(ladders)

    def step(i: int) -> tuple[float, int, int]:
        a, b = ladders[i][at[i]], ladders[i][at[i] + 1]
        extra = choices[i][b].cost - choices[i][a].cost
        return -float(losses[i][a] - losses[i][b]) / extra, i, extra

    queue = [step(i) for i in range(len(ladders)) if len(ladders[i]) > 1]
    heapq.heapify(queue)
    while queue:
        _, i, extra = heapq.heappop(queue)
        if extra > left:
            # This layer is finished; cheaper steps of other layers may still fit.
            continue
        at[i] += 1
        left -= extra
        if at[i] + 1 < len(ladders[i]):
            heapq.heappush(queue, step(i))
    return [ladder[position] for ladder, position in zip(ladders, at, strict=True)]
