"""Turn a wanted share per layer into ranks that meet the budget: all shares are scaled by one factor."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from ara.models.weights import LinearSpec
from ara.solver.problem import Allocation, Budget, Choice

_BISECTIONS = 100
# Cost by which a choice may exceed its share: compensates for rounding in products such as 0.8 · 1 000 000.
_SLACK = 1e-6


def proportional(
    specs: Sequence[LinearSpec], shares: Sequence[float], budget: Budget, *, keep_dense: bool
) -> Allocation:
    """Scale all shares by the largest factor that the budget allows, and spend the rest in single steps.

    A layer gets the largest rank within factor · share · dense cost, at least the least rank that the budget offers.
    The rest of the budget goes to the layers that lost most by rounding.

    Args:
        specs: the layers.
        shares: R = k(m + n) / mn per layer, positive, may exceed 1.
        budget: the limit; of one bit width.
        keep_dense: layers of share 1 or more stay dense (ARA, arXiv 2510.19389, Eq. 8). Only the others are scaled, up
            to their highest rank below break-even. If the dense layers leave no room for the least ranks of the others,
            those with the smallest share are made low-rank first. If false, all are scaled, and a layer is dense where
            its scaled share reaches 1.
    """
    choices = [budget.rank_choices(spec) for spec in specs]
    offered = choices
    if keep_dense:
        whole = _dense_that_fit(choices, shares, budget)
        offered = [
            options[-1:] if dense else options[:-1] or options for options, dense in zip(choices, whole, strict=True)
        ]
    ladders = [[choice.cost for choice in options] for options in offered]
    dense_costs = [options[-1].cost for options in choices]

    def picks_at(factor: float) -> list[int]:
        return [
            max(0, bisect_right(ladder, factor * share * dense_cost + _SLACK) - 1)
            for ladder, share, dense_cost in zip(ladders, shares, dense_costs, strict=True)
        ]

    def spent(factor: float) -> int:
        return sum(ladder[pick] for ladder, pick in zip(ladders, picks_at(factor), strict=True))

    low, high = 0.0, 1 / min(shares)
    if spent(high) <= budget.limit:
        low = high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if spent(middle) <= budget.limit:
            low = middle
        else:
            high = middle
    costs = [ladder[pick] for ladder, pick in zip(ladders, picks_at(low), strict=True)]
    lost = [
        (low * share * dense_cost - cost) / (spec.m + spec.n)
        for spec, share, dense_cost, cost in zip(specs, shares, dense_costs, costs, strict=True)
    ]
    picks = [[choice.cost for choice in options].index(cost) for options, cost in zip(choices, costs, strict=True)]
    spend_rest(specs, picks, budget, lost)
    return Allocation.from_picks(specs, picks, budget)


def spend_rest(specs: Sequence[LinearSpec], picks: list[int], budget: Budget, priority: Sequence[float]) -> None:
    """Raise picks by single steps, highest ``priority`` first, until no single step fits the budget any more.

    Args:
        specs: the layers.
        picks: index into ``budget.choices(spec)`` per layer; changed in place; together within the budget.
        budget: the limit; of one bit width.
        priority: one number per layer.
    """
    choices = [budget.rank_choices(spec) for spec in specs]
    left = budget.limit - sum(options[pick].cost for options, pick in zip(choices, picks, strict=True))
    queue = [(-priority[i], i) for i in range(len(specs))]
    while queue:
        waiting = []
        for _, i in sorted(queue):
            if picks[i] + 1 >= len(choices[i]):
                continue
            step = choices[i][picks[i] + 1].cost - choices[i][picks[i]].cost
            if step <= left:
                picks[i] += 1
                left -= step
                waiting.append((-priority[i], i))
        queue = waiting


def without_choice(specs: Sequence[LinearSpec], budget: Budget) -> list[bool]:
    """Return which layers are dense in every allocation: fixed by the budget, or so small that no rank is cheaper."""
    return [len(budget.rank_choices(spec)) == 1 for spec in specs]


def _dense_that_fit(choices: Sequence[Sequence[Choice]], shares: Sequence[float], budget: Budget) -> list[bool]:
    """Return which layers stay dense: share 1 or more, except the smallest while the least ranks do not fit."""
    whole = [share >= 1 for share in shares]
    least = sum(options[-1 if dense else 0].cost for options, dense in zip(choices, whole, strict=True))
    for i in sorted((i for i, dense in enumerate(whole) if dense), key=lambda i: shares[i]):
        if least <= budget.limit:
            break
        whole[i] = False
        least -= choices[i][-1].cost - choices[i][0].cost
    return whole
