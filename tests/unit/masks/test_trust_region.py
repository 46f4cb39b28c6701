"""What a training has learned, at its own budget and at others."""

import torch

from ara.masks.rank_losses import LearnedLosses, nearest
from ara.masks.trust_region import above_floors, floors_below
from ara.models.weights import LinearSpec
from ara.solver.knapsack import best_ranks
from ara.solver.problem import Allocation, Budget

SQUARE, WIDE = LinearSpec("square", 0, "l", 30, 30), LinearSpec("wide", 0, "l", 20, 60)
SPECS = [SQUARE, WIDE]
TABLES = {
    "square": torch.linspace(0.1, 0, 31, dtype=torch.float64).square(),
    "wide": torch.linspace(0.2, 0, 21, dtype=torch.float64).square(),
}


def _learned(keep, ranks):
    return LearnedLosses(keep, TABLES, Allocation.of_ranks(SPECS, ranks) if ranks else Allocation({}))


def test_floors_are_half_of_the_rank_and_dense_is_the_highest_rank_that_pays():
    assert floors_below(SPECS, Allocation.of_ranks(SPECS, {"square": 9, "wide": None})).tolist() == [5, 7]
    assert floors_below(SPECS, Allocation.of_ranks(SPECS, {"square": None, "wide": 1})).tolist() == [7, 1]


def test_in_a_layout_without_break_even_dense_is_one_more_than_the_highest_rank():
    spec = LinearSpec("square", 0, "l", 30, 30, layout="pivoted")
    assert floors_below([spec], Allocation.of_ranks([spec], {"square": None})).tolist() == [15]


def test_the_barrier_stands_in_front_of_the_floor_alone():
    found = above_floors(SPECS, TABLES, torch.tensor([4, 0]))
    assert torch.equal(found["wide"], TABLES["wide"])
    assert torch.equal(found["square"][4:], TABLES["square"][4:])
    expected = [float(TABLES["square"][k]) + 10 * (1 - k / 4) ** 2 for k in range(4)]
    assert found["square"][:4].tolist() == expected


def test_a_table_that_falls_below_the_floor_is_filled_up():
    falling = {"square": torch.linspace(0, 1, 31, dtype=torch.float64)}
    found = above_floors([SQUARE], falling, torch.tensor([4]))["square"]
    assert found[0] == falling["square"][4] + 10


def test_at_its_own_budget_a_training_hands_out_its_best_ranks():
    budget = Budget.for_keep(SPECS, 0.6)
    ranks = {"square": 5, "wide": 12}
    assert budget.met_by(SPECS, ranks) and best_ranks(SPECS, TABLES, budget).ranks != ranks
    assert _learned(0.6, ranks).allocation(SPECS, budget).ranks == ranks


def test_at_another_budget_no_layer_falls_below_half_of_its_rank():
    budget = Budget.for_keep(SPECS, 0.4)
    unbound = best_ranks(SPECS, TABLES, budget).ranks
    found = _learned(0.8, {"square": None, "wide": 7}).allocation(SPECS, budget).ranks
    assert unbound["square"] < 7 <= found["square"]


def test_of_two_equally_near_budgets_the_larger_one_serves():
    learned = [_learned(keep, {}) for keep in (0.9, 0.8, 0.6)]
    assert nearest(learned, 0.7).keep == 0.8  # |0.8 − 0.7| > |0.6 − 0.7| in binary fractions
    assert nearest(learned, 0.69).keep == 0.6
    assert nearest(learned, 0.85).keep == 0.9
