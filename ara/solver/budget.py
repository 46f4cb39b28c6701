"""The budget, and how integer ranks meet it exactly.

A layer's choices are the ranks 1·s, 2·s, … (s the rank multiple) that cost less than mn, and dense at mn: a rank that
costs as much as W is never offered, for W itself is then the better layer (ARA, Eq. 8). What a rank costs depends on
how it is stored, see :meth:`ara.models.weights.LinearSpec.cost`.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ara.errors import UsageError
from ara.models.weights import LinearSpec


@dataclass(frozen=True)
class Budget:
    """How many parameters the factorised layers may have together.

    Attributes:
        parameters: the limit, floor(keep · Σ mn).
        rank_multiple: every kept rank is a multiple of this.
        min_rank: least rank of a layer; rounded up to the multiple.
        min_keep: least share of a layer's dense parameters, in [0, 1].
        dense: module paths that stay dense whatever it costs.
    """

    parameters: int
    rank_multiple: int = 1
    min_rank: int = 1
    min_keep: float = 0.0
    dense: frozenset[str] = frozenset()

    @classmethod
    def for_keep(
        cls,
        specs: Sequence[LinearSpec],
        keep: float,
        rank_multiple: int = 1,
        min_rank: int = 1,
        min_keep: float = 0.0,
        dense: frozenset[str] = frozenset(),
    ) -> Budget:
        """Return the budget that keeps the fraction ``keep`` of the dense parameters of ``specs``.

        Raises:
            UsageError: even the least ranks cost more.
        """
        # The small addend forgives the rounding of a product such as 0.8 · 1 000 000.
        limit = int(keep * sum(spec.dense_cost for spec in specs) + 1e-6)
        budget = cls(limit, rank_multiple, min_rank, min_keep, dense)
        least = sum(budget.choices(spec)[0][1] for spec in specs)
        if least > budget.parameters:
            total = sum(spec.dense_cost for spec in specs)
            floors = [f"at least {min_rank}", f"multiples of {rank_multiple}"]
            floors += [f"{min_keep:.0%} of each layer"] if min_keep else []
            floors += [f"{len(dense)} layers dense"] if dense else []
            raise UsageError(
                f"keep {keep:g} allows {budget.parameters:,} parameters, but the least ranks "
                f"({', '.join(floors)}) already cost {least:,}",
                f"use --keep {least / total + 0.005:.2f} or more, or a smaller --min-rank or --rank-multiple",
            )
        return budget

    def choices(self, spec: LinearSpec) -> list[tuple[int | None, int]]:
        """Return all choices of a layer as (rank or ``None`` for dense, cost), cheapest first, dense last."""
        if spec.name in self.dense:
            return [(None, spec.dense_cost)]
        step = self.rank_multiple
        # The small number forgives the rounding of a product such as 0.3 · 1 000 000.
        floor = self.min_keep * spec.dense_cost - 1e-6
        least = max(self.min_rank, 1 + bisect_left(range(1, spec.top_rank + 1), floor, key=spec.cost))
        first = max(step, -(-least // step) * step)
        ranks = range(first, spec.top_rank + 1, step)
        return [*((rank, spec.cost(rank)) for rank in ranks), (None, spec.dense_cost)]

    def is_met_by(self, specs: Sequence[LinearSpec], ranks: Mapping[str, int | None]) -> bool:
        """Tell whether all ``ranks`` are choices, fit, and leave too little for a next step of any layer."""
        spent, steps = 0, []
        for spec in specs:
            choices = self.choices(spec)
            at = next((i for i, (rank, _) in enumerate(choices) if rank == ranks[spec.name]), None)
            if at is None:
                return False
            spent += choices[at][1]
            steps += [after[1] - choices[at][1] for after in choices[at + 1 : at + 2]]
        left = self.parameters - spent
        return 0 <= left < min(steps, default=left + 1)


def spend_rest(specs: Sequence[LinearSpec], picks: list[int], budget: Budget, priority: Sequence[float]) -> None:
    """Raise picks by single steps, highest ``priority`` first, until no single step fits the budget any more.

    Args:
        specs: the layers.
        picks: index into ``budget.choices(spec)`` per layer; changed in place; together within the budget.
        budget: the limit.
        priority: one number per layer.
    """
    choices = [budget.choices(spec) for spec in specs]
    left = budget.parameters - sum(options[pick][1] for options, pick in zip(choices, picks, strict=True))
    queue = [(-priority[i], i) for i in range(len(specs))]
    while queue:
        waiting = []
        for _, i in sorted(queue):
            if picks[i] + 1 >= len(choices[i]):
                continue
            step = choices[i][picks[i] + 1][1] - choices[i][picks[i]][1]
            if step <= left:
                picks[i] += 1
                left -= step
                waiting.append((-priority[i], i))
        queue = waiting


def minimise_loss(specs: Sequence[LinearSpec], losses: Sequence[torch.Tensor], budget: Budget) -> list[int]:
    """Choose per layer so that the summed loss is least under the budget, along the convex hulls of the layers.

    Greedy by loss saved per parameter along each layer's lower convex hull is the optimum of the Lagrangian
    relaxation; what the hulls leave over is spent in single steps, best saving first.

    Args:
        specs: the layers.
        losses: per layer, the loss of each of ``budget.choices(spec)``, non-increasing.
        budget: the limit; the cheapest choices together must fit.

    Returns:
        Index into ``budget.choices(spec)`` per layer.
    """
    choices = [budget.choices(spec) for spec in specs]
    hulls = [
        lower_hull([cost for _, cost in options], loss.tolist()) for options, loss in zip(choices, losses, strict=True)
    ]
    left = budget.parameters - sum(options[0][1] for options in choices)
    picks, left = climb(choices, losses, hulls, left)
    # What the hulls leave over is spent in single steps.
    steps = [range(pick, len(options)) for pick, options in zip(picks, choices, strict=True)]
    return climb(choices, losses, steps, left)[0]


def lower_hull(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Return the indices of the lower convex hull of the points (cost, loss), from the cheapest to the dearest.

    Args:
        costs: strictly increasing.
        losses: one per cost.
    """
    hull: list[int] = []
    for i in range(len(costs)):
        if hull and losses[i] >= losses[hull[-1]]:
            continue
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (losses[a] - losses[b]) * (costs[i] - costs[b]) > (losses[b] - losses[i]) * (costs[b] - costs[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def climb(
    choices: list[list[tuple[int | None, int]]],
    losses: Sequence[torch.Tensor],
    ladders: Sequence[Sequence[int]],
    left: int,
) -> tuple[list[int], int]:
    """Climb the layers' ladders rung by rung, always the rung that saves most loss per parameter, until none fits.

    Args:
        choices: (rank, cost) per choice and layer.
        losses: per layer, the loss of each choice.
        ladders: per layer, the choices to climb through, from the present one up.
        left: parameters to spend.

    Returns:
        The choice reached per layer, and the parameters left.
    """
    at = [0] * len(ladders)

    def rung(i: int) -> tuple[float, int, int]:
        a, b = ladders[i][at[i]], ladders[i][at[i] + 1]
        extra = choices[i][b][1] - choices[i][a][1]
        return -float(losses[i][a] - losses[i][b]) / extra, i, extra

    queue = [rung(i) for i in range(len(ladders)) if len(ladders[i]) > 1]
    heapq.heapify(queue)
    while queue:
        _, i, extra = heapq.heappop(queue)
        if extra > left:
            # This layer stops here; cheaper rungs of other layers may still fit.
            continue
        at[i] += 1
        left -= extra
        if at[i] + 1 < len(ladders[i]):
            heapq.heappush(queue, rung(i))
    return [ladder[position] for ladder, position in zip(ladders, at, strict=True)], left
