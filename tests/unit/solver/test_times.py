"""Budgets of time: what is measured, interpolated, offered and chosen; all times are made up."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ara.errors import UsageError
from ara.models.weights import LinearSpec
from ara.solver.knapsack import best_ranks
from ara.solver.problem import Allocation, Budget
from ara.solver.times import ShapeTimes, TimeTable, rising

WIDE, SQUARE = (60, 12), (30, 30)


def specs(*shapes: tuple[int, int]) -> list[LinearSpec]:
    return [LinearSpec(f"b.{i}", 0, "l", m, n) for i, (m, n) in enumerate(shapes)]


def even(spec: LinearSpec, fee: int = 0) -> ShapeTimes:
    """Ten nanoseconds per parameter; low rank costs a fee."""
    return ShapeTimes(10 * spec.dense_cost, {k: 10 * spec.cost(k) + fee for k in range(1, spec.top_rank + 1)})


def table(*layers: LinearSpec, fee: int = 0) -> TimeTable:
    return TimeTable({(spec.m, spec.n): even(spec, fee) for spec in layers})


@given(st.lists(st.integers(0, 20), max_size=6))
def test_rising_values_are_the_nearest_ones(values: list[int]) -> None:
    """The nearest rising values: compared with every partition into runs, of which each takes its mean."""

    def distance(found: list[float]) -> float:
        return sum((a - b) ** 2 for a, b in zip(values, found, strict=True))

    found = rising(values)
    assert all(a <= b + 1e-12 for a, b in pairwise(found))
    others = []
    for cuts in product([False, True], repeat=max(len(values) - 1, 0)):
        runs: list[list[int]] = []
        for value, starts in zip(values, (True, *cuts), strict=False):
            if starts:
                runs.append([])
            runs[-1].append(value)
        others.append([sum(run) / len(run) for run in runs for _ in run])
    best = min(distance(other) for other in others if all(a <= b for a, b in pairwise(other)))
    assert distance(found) == pytest.approx(best)


def test_times_are_whole_nanoseconds_and_linear_between_measured_ranks() -> None:
    times = ShapeTimes.of_seconds(9e-9, {8: 30e-9, 2: 10e-9, 4: 16e-9})
    assert times == ShapeTimes(9, {2: 10, 4: 16, 8: 30})
    assert [times.at(rank) for rank in range(2, 9)] == [10, 13, 16, 20, 23, 26, 30]  # 19.5 and 26.5 go to even
    assert times.at(None) == 9
    for outside in (1, 9):
        with pytest.raises(ValueError, match=f"rank {outside} is not between the measured ranks 2, 4, 8"):
            times.at(outside)
    with pytest.raises(ValueError, match="not between"):
        ShapeTimes(9, {}).at(1)


def test_a_larger_rank_is_never_faster_and_no_layer_costs_nothing() -> None:
    assert ShapeTimes.of_seconds(0.0, {1: 4e-9, 2: 8e-9, 3: 6e-9, 4: 5e-9}) == ShapeTimes(1, {1: 4, 2: 6, 3: 6, 4: 6})


def test_only_ranks_that_are_faster_than_dense_are_offered() -> None:
    (spec,) = specs(WIDE)
    times = TimeTable({WIDE: ShapeTimes(50, {1: 20, 2: 20, 3: 40, 4: 50, 10: 60})})
    budget = Budget(1000, unit="nanoseconds", times=times)
    # Rank 2 is as fast as rank 1 and loses less; from rank 4 on nothing is gained.
    assert [(choice.rank, choice.cost) for choice in budget.choices(spec)] == [(2, 20), (3, 40), (None, 50)]


def test_a_layer_whose_ranks_are_all_slower_stays_dense() -> None:
    layers = specs(WIDE, SQUARE, SQUARE)
    slow = ShapeTimes(5000, dict.fromkeys(range(1, 11), 6000))
    times = TimeTable({WIDE: slow, SQUARE: even(layers[1])})
    budget = Budget.for_keep(layers, 0.6, times=times)
    # Dropping ranks of the slow layer would cost no loss at all.
    tables = {spec.name: torch.linspace(1, 0, spec.full_rank + 1, dtype=torch.float64) for spec in layers}
    tables["b.0"] = torch.zeros(13, dtype=torch.float64)
    found = best_ranks(layers, tables, budget)
    assert found.ranks["b.0"] is None
    assert 0.55 * 23_000 < found.cost <= budget.limit == 13_800
    assert found.cost == times.total(layers, found.ranks)


@pytest.mark.parametrize("fee", [0, 900])
@pytest.mark.parametrize("keep", [0.4, 0.55, 0.7, 0.95])
def test_the_loss_is_least_within_the_time(keep: float, fee: int) -> None:
    layers = specs(WIDE, SQUARE, WIDE)
    generator = torch.Generator().manual_seed(round(100 * keep) + fee)
    tables = {}
    for spec in layers:
        falls = torch.randint(1, 50, (spec.full_rank,), generator=generator).double()
        tables[spec.name] = torch.cat([falls.flip(0).cumsum(0).flip(0), falls.new_zeros(1)])

    def loss(ranks: dict[str, int | None]) -> float:
        return sum(
            float(tables[spec.name][spec.full_rank if (k := ranks[spec.name]) is None else k]) for spec in layers
        )

    budget = Budget.for_keep(layers, keep, times=table(*layers, fee=fee))
    found = best_ranks(layers, tables, budget)
    assert found.cost <= budget.limit
    every = [
        {spec.name: choice.rank for spec, choice in zip(layers, picks, strict=True)}
        for picks in product(*map(budget.choices, layers))
        if sum(choice.cost for choice in picks) <= budget.limit
    ]
    assert loss(dict(found.ranks)) == min(map(loss, every))


def test_everything_is_dense_at_keep_1() -> None:
    layers = specs(WIDE, SQUARE)
    tables = {spec.name: torch.zeros(spec.full_rank + 1) for spec in layers}
    budget = Budget.for_keep(layers, 1.0, times=table(*layers))
    assert budget.limit == 10 * (720 + 900)
    assert set(best_ranks(layers, tables, budget).ranks.values()) == {None}


def test_a_share_that_no_choice_reaches_says_the_least_one() -> None:
    layers = specs(WIDE, SQUARE)
    times = TimeTable({WIDE: ShapeTimes(700, {1: 710, 10: 900}), SQUARE: ShapeTimes(300, {1: 100, 14: 250})})
    with pytest.raises(
        UsageError, match=r"keep 0.6 allows 600 nanoseconds, but the fastest choices .* cost 800"
    ) as found:
        Budget.for_keep(layers, 0.6, times=times)
    assert "use --keep 0.8" in (found.value.hint or "")
    assert Budget.for_keep(layers, 0.8, times=times).limit == 800


def test_limits_of_ranks_hold_under_a_budget_of_time() -> None:
    (spec,) = specs(SQUARE)
    choices = Budget.for_keep([spec], 0.9, rank_multiple=3, min_rank=4, min_keep=0.45, times=table(spec)).choices(spec)
    assert [choice.rank for choice in choices] == [9, 12, None]  # rank 6 keeps 0.4
    fixed = Budget.for_keep([spec], 1.0, dense=frozenset({"b.0"}), times=TimeTable({SQUARE: ShapeTimes(9, {})}))
    assert [choice.rank for choice in fixed.choices(spec)] == [None]


def test_a_budget_of_time_is_met_and_priced_in_time() -> None:
    layers = specs(SQUARE, SQUARE)
    times = table(layers[0])
    budget = Budget(10 * (5 * 60 + 7 * 60) + 599, unit="nanoseconds", times=times)
    met = budget.met_by(layers, {"b.0": 5, "b.1": 7})
    assert met is not None and met.cost == 7200 and met == Allocation.of_ranks(layers, met.ranks, budget)
    assert budget.met_by(layers, {"b.0": 5, "b.1": 5}) is None
    assert met.parameters(layers) == 720
    assert Budget(9000, unit="nanoseconds", times=times).in_parameters(layers[:1]) == 900
