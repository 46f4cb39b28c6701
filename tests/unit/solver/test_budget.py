"""The exact budget and the convex-hull solver, against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ara.errors import UsageError
from ara.models.weights import LinearSpec
from ara.solver.greedy import lower_hull, minimise_loss
from ara.solver.problem import Allocation, Budget, Choice
from ara.solver.rounding import spend_rest
from tests.oracles import allocation as oracle


def _spec(m: int, n: int, index: int = 0) -> LinearSpec:
    return LinearSpec(f"b.{index}", index, "l", m, n)


# -- Budget -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "rank_multiple", "min_rank", "ranks"),
    [
        (7, 5, 1, 1, [1, 2]),  # break-even at 35 / 12 = 2.9
        (12, 4, 1, 1, [1, 2]),  # break-even at 48 / 16 = 3 exactly: rank 3 costs as much as W
        (60, 92, 8, 1, [8, 16, 24, 32]),
        (60, 92, 16, 17, [32]),
        (60, 92, 1, 34, [34, 35, 36]),
        (60, 92, 1, 37, []),
        (60, 92, 64, 1, []),
        (1, 19, 1, 1, []),  # rank 1 costs 20, more than 19
        (2, 2, 1, 1, []),  # 4 = 4
    ],
)
def test_choices_are_the_ranks_below_break_even_then_dense(
    m: int, n: int, rank_multiple: int, min_rank: int, ranks: list[int]
) -> None:
    choices = Budget(0, rank_multiple, min_rank).choices(_spec(m, n))
    assert choices == (*(Choice(k, 16, k * (m + n)) for k in ranks), Choice(None, 16, m * n))


@pytest.mark.parametrize(("keep", "parameters"), [(0.8, 800_000), (0.7, 700_000), (1 / 3, 333_333), (1.0, 1_000_000)])
def test_the_limit_is_the_floor_of_the_product_without_rounding_loss(keep: float, parameters: int) -> None:
    assert Budget.for_keep([_spec(1000, 1000)], keep).limit == parameters


def test_the_least_ranks_decide_what_is_impossible() -> None:
    specs = [_spec(30, 20), _spec(41, 17)]
    least = 50 + 58
    assert Budget.for_keep(specs, (least + 0.5) / (600 + 697)).limit == least
    with pytest.raises(UsageError, match=f"allows {least - 1:,} parameters.*already cost {least:,}"):
        Budget.for_keep(specs, (least - 0.5) / (600 + 697))


def test_costs_of_an_allocation() -> None:
    specs = [_spec(30, 20, 0), _spec(41, 17, 1)]
    allocation = Allocation.of_ranks(specs, {"b.0": 4, "b.1": None})
    assert allocation.choices == {"b.0": Choice(4, 16, 200), "b.1": Choice(None, 16, 697)}
    assert allocation.cost == allocation.parameters(specs) == 897
    assert allocation.keep(specs) == 897 / 1297
    assert allocation.dense_count() == 1


def test_a_budget_in_bytes_counts_whole_bytes_of_the_bits_of_the_model() -> None:
    spec = LinearSpec("b.0", 0, "l", 5, 4, bits=3)  # 9 parameters a rank, 20 dense: 27, 54 and 60 bits
    budget = Budget(7, unit="bytes")
    assert budget.choices(spec) == (Choice(1, 3, 4), Choice(2, 3, 7), Choice(None, 3, 8))
    assert budget.dense_cost(spec) == 8
    assert budget.in_parameters([spec]) == 7 * 20 / 8
    assert Budget(7).in_parameters([spec]) == 7


def test_a_rank_is_not_offered_where_a_larger_one_has_as_many_bytes() -> None:
    spec = _spec(3, 2)  # 5 parameters at rank 1, 6 dense
    assert Budget(9, unit="bytes", bits=(1,)).choices(spec) == (Choice(None, 1, 1),)
    assert Budget(9, unit="bytes", bits=(8,)).choices(spec) == (Choice(1, 8, 5), Choice(None, 8, 6))


def test_several_bit_widths_are_listed_by_cost_and_steps_stay_at_one_width() -> None:
    spec = _spec(7, 5)  # 12 parameters a rank, 35 dense
    budget = Budget(70, unit="bytes", bits=(16, 8))
    rows = [(1, 8, 12), (1, 16, 24), (2, 8, 24), (None, 8, 35), (2, 16, 48), (None, 16, 70)]
    assert [(c.rank, c.bits, c.cost) for c in budget.choices(spec)] == [rows[i] for i in (0, 2, 1, 3, 4, 5)]
    assert list(budget.rank_steps(spec, 0)) == [0, 1, 3]
    assert list(budget.rank_steps(spec, 2)) == [2, 4, 5]
    assert list(Budget(70).rank_steps(spec, 1)) == [1, 2]
    with pytest.raises(ValueError, match="chooses ranks alone, the budget offers 2 bit widths"):
        budget.rank_choices(spec)
    fixed = Budget(70, unit="bytes", bits=(8, 16), dense=frozenset({"b.0"}))
    assert fixed.choices(spec) == (Choice(None, 8, 35), Choice(None, 16, 70))
    assert budget.choices(spec)[0].rank == 1, "budgets do not share what they offer"


def test_a_budget_is_met_by_ranks_on_offer_that_leave_no_step() -> None:
    specs = [_spec(30, 20, 0), _spec(41, 17, 1)]  # 50 and 58 a rank
    for budget, unit in ((Budget(5 * 50 + 2 * 58 + 49), 1), (Budget(2 * (5 * 50 + 2 * 58 + 49), unit="bytes"), 2)):
        met = budget.met_by(specs, {"b.0": 5, "b.1": 2})
        assert met is not None and met.choices == {"b.0": Choice(5, 16, unit * 250), "b.1": Choice(2, 16, unit * 116)}
        assert met == Allocation.of_ranks(specs, met.ranks, budget)
        assert met.parameters(specs) == 366 and met.keep(specs) == 366 / 1297
        for ranks in ({"b.0": 4, "b.1": 2}, {"b.0": 6, "b.1": 2}, {"b.0": None, "b.1": None}, {"b.0": 5, "b.1": 13}):
            assert budget.met_by(specs, ranks) is None
    assert Budget(10**6).met_by(specs, {"b.0": None, "b.1": None}) is not None
    assert Budget(5 * 50 + 2 * 58, rank_multiple=2).met_by(specs, {"b.0": 5, "b.1": 2}) is None


# -- lower_hull -------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    drops=st.lists(st.integers(0, 20), min_size=12, max_size=12),
)
def test_lower_hull_equals_brute_force(steps: list[int], drops: list[int]) -> None:
    costs = [sum(steps[: i + 1]) for i in range(len(steps))]
    losses = [float(sum(drops[i:])) for i in range(len(steps))]
    assert lower_hull(costs, losses) == sorted(oracle.on_lower_hull(costs, losses))


@pytest.mark.parametrize(
    ("losses", "hull"),
    [
        ([9.0, 4.0, 1.0, 0.0], [0, 1, 2, 3]),
        ([9.0, 6.0, 3.0, 0.0], [0, 3]),  # points on the chord are no corners
        ([9.0, 8.0, 1.0, 0.0], [0, 2, 3]),
        ([5.0, 5.0, 5.0, 5.0], [0]),
        ([9.0, 9.0, 9.0, 0.0], [0, 3]),  # only dense helps
        ([0.0], [0]),
    ],
)
def test_lower_hull_by_hand(losses: list[float], hull: list[int]) -> None:
    assert lower_hull([2, 3, 4, 5][: len(losses)], losses) == hull


def test_of_points_of_the_same_cost_the_lowest_is_on_the_hull() -> None:
    assert lower_hull([2, 2, 3, 3, 4], [9.0, 8.0, 4.0, 3.0, 3.5]) == [1, 3]


# -- spend_rest -------------------------------------------------------------------------------------------------


def test_the_rest_goes_to_the_highest_priority_first_one_step_each() -> None:
    specs = [_spec(30, 20, i) for i in range(3)]  # 50 a rank, ranks 1..11, dense 600
    picks = [4, 4, 4]
    spend_rest(specs, picks, Budget(15 * 50 + 4 * 50 + 49), [0.1, 0.3, 0.2])
    assert picks == [5, 6, 5]


def test_the_rest_goes_where_it_fits() -> None:
    specs = [_spec(30, 20, 0), _spec(9, 8, 1)]  # 50 and 17 a rank
    picks = [0, 0]
    spend_rest(specs, picks, Budget(50 + 17 + 49), [1.0, 0.0])
    assert picks == [0, 2]  # 34 of the 49; a rank of the first layer costs 50


def test_the_last_step_is_to_dense_at_what_it_costs() -> None:
    spec = _spec(30, 20)
    for extra, expected in ((49, 10), (50, 11)):  # from rank 11 (550) to dense (600)
        picks = [10]
        spend_rest([spec], picks, Budget(550 + extra), [1.0])
        assert picks == [expected]


# -- minimise_loss ----------------------------------------------------------------------------------------------

_LAYER = st.tuples(st.integers(4, 12), st.integers(4, 12), st.integers(0, 10_000))


@settings(max_examples=250, deadline=None, derandomize=True)
@given(layers=st.lists(_LAYER, min_size=1, max_size=4), keep=st.floats(0.3, 1.0), rank_multiple=st.sampled_from([1, 2]))
def test_minimise_loss_is_within_one_hull_edge_of_the_bound(
    layers: list[tuple[int, int, int]], keep: float, rank_multiple: int
) -> None:
    """Greedy along the hulls loses at most one edge against the Lagrangian bound, which no allocation can beat."""
    specs = [_spec(m, n, i) for i, (m, n, _) in enumerate(layers)]
    dense = sum(spec.dense_cost for spec in specs)
    free = Budget(dense, rank_multiple)
    least = sum(free.choices(spec)[0].cost for spec in specs)
    budget = Budget(max(int(keep * dense), least), rank_multiple)
    tables, losses = [], []
    for spec, (_, _, seed) in zip(specs, layers, strict=True):
        options = budget.choices(spec)
        generator = torch.Generator().manual_seed(seed)
        drops = torch.rand(len(options), generator=generator, dtype=torch.float64) ** 3
        loss = drops.flip(0).cumsum(0).flip(0) - drops[-1]  # dense loses nothing
        losses.append(loss)
        tables.append([(choice.cost, value) for choice, value in zip(options, loss.tolist(), strict=True)])

    picks = minimise_loss(specs, losses, budget)

    spent = sum(table[pick][0] for table, pick in zip(tables, picks, strict=True))
    ours = sum(table[pick][1] for table, pick in zip(tables, picks, strict=True))
    assert spent <= budget.limit
    best = oracle.least_loss(tables, budget.limit)
    bound = oracle.lagrangian_bound(tables, budget.limit)
    edge = 0.0
    for table in tables:
        costs, values = [c for c, _ in table], [v for _, v in table]
        corners = sorted(oracle.on_lower_hull(costs, values))
        edge = max([edge, *(values[a] - values[b] for a, b in itertools.pairwise(corners))])
    assert bound - 1e-9 <= best <= ours + 1e-9
    assert ours <= bound + edge + 1e-9


def test_minimise_loss_is_optimal_where_the_hull_meets_the_budget() -> None:
    specs = [_spec(30, 20, 0), _spec(30, 20, 1)]
    losses = [torch.tensor([11.0 - i for i in range(11)] + [0.0]) * scale for scale in (1.0, 3.0)]
    picks = minimise_loss(specs, losses, Budget(600 + 300))
    assert picks == [5, 11]  # the layer that loses three times as much becomes dense, the other gets the rest


def test_minimise_loss_jumps_over_ranks_that_do_not_help() -> None:
    """Only dense saves anything in the first layer: all or nothing."""
    specs = [_spec(30, 20, 0), _spec(30, 20, 1)]
    cliff = torch.tensor([100.0] * 11 + [0.0])
    slope = torch.tensor([1.0 - i / 11 for i in range(11)] + [0.0])
    assert minimise_loss(specs, [cliff, slope], Budget(600 + 50)) == [11, 0]
    # The cliff is out of reach: the slope gets all it can take, and only then the useless rest is spent.
    assert minimise_loss(specs, [cliff, slope], Budget(50 + 590)) == [0, 10]


def test_losses_that_are_all_zero_still_spend_the_budget() -> None:
    specs = [_spec(30, 20, 0), _spec(30, 20, 1)]
    picks = minimise_loss(specs, [torch.zeros(12)] * 2, Budget(700))
    assert sum(50 * (pick + 1) for pick in picks) == 700
