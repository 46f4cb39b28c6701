"""The multiple-choice knapsack, solved exactly: one choice per layer, least summed loss under the budget.

:func:`ara.solver.greedy.minimise_loss` follows convex hulls and may miss the optimum by up to one hull edge. Pisinger's
minimal algorithm is exact:

1. The Lagrangian dual gives a price per unit of cost and a lower bound, that of the linear relaxation.
2. The reduced loss of a choice is its loss + price · cost, minus the least such value of its layer. A solution with
   this choice exceeds the bound by at least the reduced loss. So a better solution has no choice whose reduced loss
   exceeds the gap between the bound and the best solution known. The few choices that remain are the core.
3. Dynamic programming over the core, layer by layer. A state is dropped when another one costs and loses no more
   (dominance), or when the linear relaxation of the remaining layers shows that it cannot lead to a better solution
   than the best one known (bound).

The core starts narrow and is widened until it provably contains the optimum.

Sources: E. Balas, E. Zemel, "An algorithm for large zero-one knapsack problems", Operations Research 28 (1980), for the
core; M. E. Dyer, W. O. Riha, J. Walker, "A hybrid dynamic programming/branch-and-bound algorithm for the
multiple-choice knapsack problem", J. Comput. Appl. Math. 58 (1995), for bounds inside dynamic programming; D. Pisinger,
"A minimal algorithm for the multiple-choice knapsack problem", EJOR 83 (1995), for the core that widens; H. Kellerer,
U. Pferschy, D. Pisinger, "Knapsack Problems" (2004), chapter 11, for all of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ara.models.weights import LinearSpec
from ara.solver.core import Best, Core
from ara.solver.greedy import minimise_loss, spend_on_steps
from ara.solver.problem import Allocation, Budget, Choice
from ara.solver.relaxation import Front, front_of, relax

# Relative to `Relaxation.scale`.
TOLERANCE = 1e-12
# Width of the first core as a fraction of the gap, and the factor of each widening.
_FIRST_CORE = 2.0**-12
_WIDEN = 4.0


def best_ranks(specs: Sequence[LinearSpec], tables: Mapping[str, torch.Tensor], budget: Budget) -> Allocation:
    """Return the allocation of least summed loss under the budget.

    Args:
        specs: the layers.
        tables: module path → (r + 1) float64, the loss of keeping k components; the last entry is the dense layer.
        budget: the limit; of one bit width.
    """
    losses = [
        tables[spec.name][[spec.full_rank if choice.rank is None else choice.rank for choice in options]]
        for spec, options in ((spec, budget.rank_choices(spec)) for spec in specs)
    ]
    return Allocation.from_picks(specs, exact_minimise(specs, losses, budget), budget)


def exact_minimise(specs: Sequence[LinearSpec], losses: Sequence[torch.Tensor], budget: Budget) -> list[int]:
    """Choose per layer so that the summed loss is least under the budget.

    At one bit width, a larger rank counts as losing no more than a smaller one: each loss is replaced by the least loss
    up to it. Of choices with equal loss the cheapest is taken. The rest of the budget is spent in single rank steps at
    the chosen bit width until none fits. These steps use the losses as given; the largest saving per cost is first.

    The loss is the least possible within ``TOLERANCE`` · scale. The scale is at most twice the summed difference of
    the losses of the cheapest choice and of dense. Integer losses below 10¹¹ in sum are minimised exactly.

    There is one exception. A layer may leave more than ``MAX_STATES`` states, or ``MAX_PAIRS`` pairs of a state and a
    choice, after dominance and bounds (:mod:`ara.solver.core`). Then the range of the states' losses is cut into equal
    intervals, one per permitted state, and the cheapest state of each interval is kept. The loss exceeds the least one
    by no more than the summed widths of these intervals (one per layer), and by no more than the gap to the Lagrangian
    bound. It is never above that of ``minimise_loss``. This happens where many layers offer many choices at nearly the
    same loss per cost (losses proportional to the cost but for small noise or a fixed fee; one piecewise linear loss
    for all layers).

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
        front_of(spec, options, loss.detach().double().cpu().numpy())
        for spec, options, loss in zip(specs, choices, losses, strict=True)
    ]
    least = sum(int(layer.cost[0]) for layer in layers)
    if least > budget.limit:
        raise ValueError(f"the cheapest choices cost {least:,} {budget.unit}, more than the budget of {budget.limit:,}")
    best, certain = _solve(layers, budget.limit)
    picks = [int(layer.choice[pick]) for layer, pick in zip(layers, best, strict=True)]
    if not certain:
        falling = [_falling(options, loss) for options, loss in zip(choices, losses, strict=True)]
        greedy = minimise_loss(specs, falling, budget)
        picks = min(picks, greedy, key=lambda found: _total(falling, found))
    return spend_on_steps(specs, losses, picks, budget)


def _falling(options: Sequence[Choice], loss: torch.Tensor) -> torch.Tensor:
    """Return, for each choice, the least loss of those of its bit width up to it: (c) float64."""
    falling = loss.detach().double().cpu().clone()
    for bits in {choice.bits for choice in options}:
        at = torch.tensor([i for i, choice in enumerate(options) if choice.bits == bits])
        falling[at] = torch.cummin(falling[at], 0).values
    return falling


def _total(losses: Sequence[torch.Tensor], picks: Sequence[int]) -> float:
    return math.fsum(float(loss[pick]) for loss, pick in zip(losses, picks, strict=True))


def _solve(layers: Sequence[Front], capacity: int) -> tuple[list[int], bool]:
    """Return the best choice per layer, and whether it is certain that none is better.

    The cheapest choices together cost no more than ``capacity``.
    """
    if sum(int(layer.cost[-1]) for layer in layers) <= capacity:
        return [len(layer.cost) - 1 for layer in layers], True
    relaxed = relax(layers, capacity)
    tolerance = TOLERANCE * relaxed.scale / 2  # one half for the best solution, one for dominance
    best = Best(relaxed.gap, relaxed.picks)
    width = relaxed.gap * _FIRST_CORE
    certain = True
    while best.excess > tolerance:
        # Every solution whose excess is at most `width` consists of choices of this core.
        certain = Core(layers, relaxed, capacity, width).search(best, tolerance)
        if best.excess <= width:
            break
        width = min(width * _WIDEN, best.excess)
    return best.picks, certain or best.excess <= tolerance
