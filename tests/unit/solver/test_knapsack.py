"""The exact knapsack solver, against brute force and against dynamic programming over every single cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ara.layout_names import LayoutName
from ara.models.weights import LinearSpec
from ara.solver import core, knapsack
from ara.solver.greedy import minimise_loss
from ara.solver.knapsack import exact_minimise
from ara.solver.problem import Allocation, Budget
from ara.solver.relaxation import front_of
from tests.oracles import allocation as oracle


def _specs(shapes: Sequence[tuple[int, int]], layout: LayoutName = "factors") -> list[LinearSpec]:
    return [LinearSpec(f"b.{i}", i, "l", m, n, layout) for i, (m, n) in enumerate(shapes)]


def _budget(specs: Sequence[LinearSpec], keep: float, rank_multiple: int = 1) -> Budget:
    """Return the budget of ``keep``, or the least feasible one."""
    budget = Budget(int(keep * sum(spec.dense_cost for spec in specs)), rank_multiple)
    least = sum(budget.choices(spec)[0].cost for spec in specs)
    return Budget(max(budget.limit, least), rank_multiple)


def _tables(
    specs: Sequence[LinearSpec], losses: Sequence[torch.Tensor], budget: Budget
) -> list[list[tuple[int, float]]]:
    return [
        [(choice.cost, value) for choice, value in zip(budget.choices(spec), loss.tolist(), strict=True)]
        for spec, loss in zip(specs, losses, strict=True)
    ]


def _loss(losses: Sequence[torch.Tensor], picks: Sequence[int]) -> float:
    """Return the summed loss, where a larger choice loses no more than a smaller one."""
    return sum(float(loss[: pick + 1].min()) for loss, pick in zip(losses, picks, strict=True))


def _check_budget(specs: Sequence[LinearSpec], picks: Sequence[int], budget: Budget) -> None:
    """Hold picks against the promises of ``Allocator.allocate``."""
    assert len(picks) == len(specs)
    left, steps = budget.limit, []
    for spec, pick in zip(specs, picks, strict=True):
        assert type(pick) is int and pick >= 0
        costs = [choice.cost for choice in budget.choices(spec)]
        left -= costs[pick]
        if pick + 1 < len(costs):
            steps.append(costs[pick + 1] - costs[pick])
    assert left >= 0, "over the budget"
    assert not steps or left < min(steps), "a rank step was left unspent"


def _least_loss(tables: Sequence[Sequence[tuple[int, float]]], budget: int) -> float:
    """Return the least summed loss within the budget, from a table of the least loss at every cost."""
    least = torch.full((budget + 1,), torch.inf, dtype=torch.float64)
    least[0] = 0.0
    for choices in tables:
        after = torch.full_like(least, torch.inf)
        for cost, loss in choices:
            if cost <= budget:
                after[cost:] = torch.minimum(after[cost:], least[: budget + 1 - cost] + loss)
        least = after
    return float(least.min())


# -- small: brute force -----------------------------------------------------------------------------------------

_SIDE = st.integers(2, 14)
_LAYERS = st.lists(st.tuples(_SIDE, _SIDE, st.integers(0, 10_000)), min_size=1, max_size=4)
_KEEP = st.floats(0.2, 1.0)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(layers=_LAYERS, keep=_KEEP, rank_multiple=st.sampled_from([1, 1, 2]), top=st.sampled_from([0, 1, 3, 20, 10**6]))
@example(layers=[(2, 2, 0)], keep=1.0, rank_multiple=1, top=1)
def test_any_whole_losses_are_minimised_exactly(
    layers: list[tuple[int, int, int]], keep: float, rank_multiple: int, top: int
) -> None:
    """Ties, zeros, losses that rise with the rank: sums of integers leave no rounding to hide behind."""
    specs = _specs([(m, n) for m, n, _ in layers])
    budget = _budget(specs, keep, rank_multiple)
    losses = []
    for spec, (_, _, seed) in zip(specs, layers, strict=True):
        generator = torch.Generator().manual_seed(seed)
        losses.append(torch.randint(0, top + 1, (len(budget.choices(spec)),), generator=generator).double())
    picks = exact_minimise(specs, losses, budget)
    _check_budget(specs, picks, budget)
    # Without the rest that must be spent, the loss as given could be reached: it is what brute force finds.
    assert _loss(losses, picks) == oracle.least_loss(_tables(specs, losses, budget), budget.limit)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    layers=_LAYERS,
    keep=_KEEP,
    rank_multiple=st.sampled_from([1, 1, 2]),
    power=st.sampled_from([0.2, 1.0, 3.0]),
    unlike=st.sampled_from([0.0, 1.0, 6.0]),
    layout=st.sampled_from(["factors", "pivoted"]),
)
def test_falling_losses_are_minimised_and_never_worse_than_greedy(
    layers: list[tuple[int, int, int]], keep: float, rank_multiple: int, power: float, unlike: float, layout: LayoutName
) -> None:
    specs = _specs([(m, n) for m, n, _ in layers], layout)
    budget = _budget(specs, keep, rank_multiple)
    losses = []
    for spec, (_, _, seed) in zip(specs, layers, strict=True):
        generator = torch.Generator().manual_seed(seed)
        options = len(budget.choices(spec))
        drops = torch.rand(options, generator=generator, dtype=torch.float64) ** power
        scale = 10 ** (unlike * float(torch.rand((), generator=generator)))
        losses.append(scale * drops.flip(0).cumsum(0).flip(0))
    picks = exact_minimise(specs, losses, budget)
    _check_budget(specs, picks, budget)
    loss = sum(float(values[pick]) for values, pick in zip(losses, picks, strict=True))
    tables = _tables(specs, losses, budget)
    assert loss == pytest.approx(oracle.least_loss(tables, budget.limit), rel=1e-11)
    greedy = minimise_loss(specs, losses, budget)
    assert loss <= sum(float(values[pick]) for values, pick in zip(losses, greedy, strict=True)) * (1 + 1e-12)


def _bytes(spec: LinearSpec, rank: int | None, bits: int) -> int:
    """Return what a choice costs in bytes, counted anew."""
    return math.ceil(bits * (spec.m * spec.n if rank is None else rank * (spec.m + spec.n)) / 8)


def _losses_of_ranks_and_bits(
    spec: LinearSpec, rank_multiple: int, bits: tuple[int, ...], top: int, seed: int
) -> dict[tuple[int | None, int], float]:
    """Return a loss for all ranks and dense at all bit widths: more rank loses no more, more bits may."""
    generator = torch.Generator().manual_seed(seed)
    falling = torch.randint(0, top + 1, (len(bits), spec.m * spec.n + 1), generator=generator).cummin(1).values
    low = [k for k in range(rank_multiple, spec.full_rank, rank_multiple) if k * (spec.m + spec.n) < spec.m * spec.n]
    return {
        (k, b): float(row[-1 if k is None else k]) for b, row in zip(bits, falling, strict=True) for k in (*low, None)
    }


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    layers=_LAYERS,
    keep=_KEEP,
    rank_multiple=st.sampled_from([2, 2, 3]),
    bits=st.sampled_from([(16,), (4,), (16, 8), (8, 3), (1, 2)]),
    top=st.sampled_from([1, 3, 10**6]),
)
def test_ranks_and_bits_are_chosen_together_within_bytes(
    layers: list[tuple[int, int, int]], keep: float, rank_multiple: int, bits: tuple[int, ...], top: int
) -> None:
    specs = _specs([(m, n) for m, n, _ in layers])
    tables = [
        _losses_of_ranks_and_bits(spec, rank_multiple, bits, top, seed)
        for spec, (_, _, seed) in zip(specs, layers, strict=True)
    ]
    counted = [
        [(_bytes(spec, *key), loss) for key, loss in table.items()] for spec, table in zip(specs, tables, strict=True)
    ]
    least = sum(min(cost for cost, _ in choices) for choices in counted)
    limit = max(int(keep * sum(max(cost for cost, _ in choices) for choices in counted)), least)
    budget = Budget(limit, rank_multiple, unit="bytes", bits=bits)
    losses = [
        torch.tensor([table[choice.rank, choice.bits] for choice in budget.choices(spec)], dtype=torch.float64)
        for spec, table in zip(specs, tables, strict=True)
    ]
    exact, greedy = exact_minimise(specs, losses, budget), minimise_loss(specs, losses, budget)
    assert sum(float(loss[pick]) for loss, pick in zip(losses, exact, strict=True)) == oracle.least_loss(counted, limit)
    for picks in (exact, greedy):
        allocation = Allocation.from_picks(specs, picks, budget)
        spent = [_bytes(spec, allocation.ranks[spec.name], allocation.choices[spec.name].bits) for spec in specs]
        assert sum(spent) == allocation.cost <= limit
        for spec in specs:
            at = allocation.choices[spec.name]
            higher = [
                choice.cost for choice in budget.choices(spec) if choice.bits == at.bits and choice.cost > at.cost
            ]
            assert not higher or limit - allocation.cost < min(higher) - at.cost, "a rank step was left unspent"


@pytest.mark.parametrize("bits", [(16,), (8, 4)])
def test_bit_widths_with_too_many_states_are_still_no_worse_than_greedy(
    bits: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = _specs(_MIXED)
    monkeypatch.setattr(core, "MAX_STATES", 1)
    for share in (0.3, 0.6):
        budget = Budget(int(share * sum(2 * spec.dense_cost for spec in specs)), unit="bytes", bits=bits)
        losses = [
            torch.tensor([(1 - c.cost / budget.dense_cost(spec)) ** 2 + 1 / c.bits for c in budget.choices(spec)])
            for spec in specs
        ]
        picks = exact_minimise(specs, losses, budget)
        greedy = minimise_loss(specs, losses, budget)
        total, other = (sum(float(loss[p]) for loss, p in zip(losses, found, strict=True)) for found in (picks, greedy))
        assert total <= other * (1 + 1e-6)
        assert Allocation.from_picks(specs, picks, budget).cost <= budget.limit


def test_of_choices_that_cost_the_same_only_the_best_is_looked_at() -> None:
    (spec,) = _specs([(30, 20)])
    choices = Budget(0, 4, unit="bytes", bits=(4, 8)).choices(spec)  # (4, 4), (8, 4) and (4, 8), (dense, 4), (8, 8) …
    front = front_of(spec, choices, np.arange(len(choices), 0, -1.0))
    assert [(choices[at].rank, choices[at].bits) for at in front.choice] == [
        (4, 4),
        (4, 8),
        (None, 4),
        (8, 8),
        (None, 8),
    ]
    assert front.cost.tolist() == [100, 200, 300, 400, 600] and front.loss.tolist() == [5, 3, 2, 1, 0]


def test_bytes_of_one_width_are_parameters_in_another_unit() -> None:
    specs = _specs(_MIXED)
    budget = _budget(specs, 0.55)
    losses = _CURVES["convex"](specs, budget, seed=6)
    twice = Budget(2 * budget.limit + 1, unit="bytes")
    assert exact_minimise(specs, losses, twice) == exact_minimise(specs, losses, budget)
    with pytest.raises(ValueError, match=r"cost [0-9,]+ bytes, more than the budget of 1"):
        exact_minimise(specs, losses, Budget(1, unit="bytes"))


def test_it_finds_what_greedy_misses() -> None:
    """The steepest edge uses up the room of two others that save more together."""
    specs = _specs([(30, 20)] * 3)  # 50 a rank, ranks 1 .. 11, dense 600
    cliffs = [
        torch.tensor([loss] * before + [0.0] * (12 - before)) for loss, before in ((40.0, 6), (30.0, 5), (30.0, 5))
    ]
    budget = Budget(150 + 500)
    assert _loss(cliffs, minimise_loss(specs, cliffs, budget)) == 60
    assert exact_minimise(specs, cliffs, budget) == [0, 5, 5]


# -- middle: every cost -----------------------------------------------------------------------------------------

_MIXED = [(84, 60), (28, 60), (28, 60), (60, 84), (92, 60), (60, 92), (37, 41), (77, 6), (3, 2), (19, 53)]


def _whole(curve: Callable[[torch.Tensor, torch.Generator], torch.Tensor]) -> Callable[..., list[torch.Tensor]]:
    """Return a function that gives every layer the curve over the fraction of its dense cost, in integers."""

    def losses(specs: Sequence[LinearSpec], budget: Budget, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        result = []
        for spec in specs:
            cost = torch.tensor([choice.cost for choice in budget.choices(spec)], dtype=torch.float64)
            size = 10 ** float(2 * torch.rand((), generator=generator))
            result.append((1e5 * size * curve(cost / spec.dense_cost, generator)).round())
        return result

    return losses


def _noise(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(x.shape, generator=generator, dtype=torch.float64)


def _fee(specs: Sequence[LinearSpec], budget: Budget, seed: int) -> list[torch.Tensor]:
    """Return what is saved of the cost, and a fee unless dense: strongly correlated, the hardest kind."""
    options = [(spec, budget.choices(spec)) for spec in specs]
    return [
        torch.tensor([spec.dense_cost - c.cost + 1000 * (c.rank is not None) for c in choices]).double()
        for spec, choices in options
    ]


_CURVES = {
    "fee": _fee,
    "convex": _whole(lambda x, _: (1 - x) ** 3),
    "concave": _whole(lambda x, _: 1 - x**2),
    "linear": _whole(lambda x, _: 1 - x),
    "only dense helps": _whole(lambda x, _: (x < 1).double()),
    "stairs": _whole(lambda x, _: ((1 - x) ** 2 * 7).floor()),
    "noisy": _whole(lambda x, g: (1 - x) ** 2 * (1 + 0.2 * _noise(x, g)) + 0.01 * _noise(x, g)),
    "noise": _whole(lambda x, g: _noise(x, g)),
    "zero": _whole(lambda x, _: 0 * x),
}


@pytest.mark.parametrize("curve", _CURVES)
@pytest.mark.parametrize("keep", [0.1, 0.35, 0.6, 0.83, 0.97])
@pytest.mark.parametrize("rank_multiple", [1, 4])
@pytest.mark.parametrize("layout", ["factors", "pivoted"])
def test_the_loss_is_that_of_dynamic_programming_over_every_cost(
    curve: str, keep: float, rank_multiple: int, layout: LayoutName
) -> None:
    specs = _specs(_MIXED * 2, layout)
    budget = _budget(specs, keep, rank_multiple)
    losses = _CURVES[curve](specs, budget, seed=int(100 * keep))
    picks = exact_minimise(specs, losses, budget)
    _check_budget(specs, picks, budget)
    assert _loss(losses, picks) == _least_loss(_tables(specs, losses, budget), budget.limit)


def test_costs_proportional_to_losses_fill_the_budget() -> None:
    """A subset sum: the least loss is what the largest cost within the budget leaves."""
    specs = _specs(_MIXED * 3)
    for parameters in (60_001, 73_210):
        budget = Budget(parameters)
        losses = [
            torch.tensor([spec.dense_cost - choice.cost for choice in budget.choices(spec)], dtype=torch.float64)
            for spec in specs
        ]
        picks = exact_minimise(specs, losses, budget)
        spent = sum(budget.choices(spec)[pick].cost for spec, pick in zip(specs, picks, strict=True))
        assert spent == parameters


# -- large ------------------------------------------------------------------------------------------------------

_LLAMA_7B = ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]) * 32


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_seven_billion_parameters(noise: float) -> None:
    specs = _specs(_LLAMA_7B)
    budget = Budget.for_keep(specs, 0.7)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for spec in specs:
        x = torch.tensor([choice.cost for choice in budget.choices(spec)], dtype=torch.float64) / spec.dense_cost
        power, size = (float(value) for value in torch.rand(2, generator=generator))
        losses.append(10**size * (1 - x) ** (1.5 + power) * (1 + noise * _noise(x, generator)))
    falling = [loss.cummin(0).values for loss in losses]
    picks = exact_minimise(specs, losses, budget)
    _check_budget(specs, picks, budget)
    ours, greedy = _loss(losses, picks), _loss(losses, minimise_loss(specs, falling, budget))
    assert ours < greedy
    # No allocation beats the bound of any price; with so many layers the optimum all but reaches the best one.
    bounds = []
    costs = [torch.tensor([choice.cost for choice in budget.choices(spec)], dtype=torch.float64) for spec in specs]
    for price in torch.logspace(-8.5, -6.5, 60, dtype=torch.float64):
        relaxed = sum(float((loss + price * cost).min()) for loss, cost in zip(falling, costs, strict=True))
        bounds.append(relaxed - float(price) * budget.limit)
    assert max(bounds) <= ours <= max(bounds) + 0.01 * abs(ours)


# -- what is left, limits, errors -------------------------------------------------------------------------------


def test_the_rest_is_spent_where_it_does_least_harm() -> None:
    specs = _specs([(30, 20)] * 3)
    rising = torch.tensor([1.0, 0.0, *(5.0 + i for i in range(10))])
    gently = torch.tensor([1.0, 0.0, *(2.0 + i for i in range(10))])
    level = torch.tensor([1.0, 0.0, 0.0, 0.0] + [9.0] * 8)
    # Rank 2 each saves all there is; then come the steps that lose nothing, then those that lose least.
    assert exact_minimise(specs, [rising, gently, level], Budget(6 * 50)) == [1, 1, 1]
    assert exact_minimise(specs, [rising, gently, level], Budget(8 * 50)) == [1, 1, 3]
    assert exact_minimise(specs, [rising, gently, level], Budget(9 * 50 + 49)) == [1, 2, 3]


def test_losses_that_are_all_zero_still_spend_the_budget() -> None:
    specs = _specs([(30, 20)] * 2)
    picks = exact_minimise(specs, [torch.zeros(12)] * 2, Budget(700))
    assert sum(50 * (pick + 1) for pick in picks) == 700


@pytest.mark.parametrize("curve", _CURVES)
def test_everything_is_dense_where_the_budget_allows(curve: str) -> None:
    specs = _specs(_MIXED)
    budget = Budget.for_keep(specs, 1.0)
    picks = exact_minimise(specs, _CURVES[curve](specs, budget, seed=1), budget)
    assert picks == [len(budget.choices(spec)) - 1 for spec in specs]


@pytest.mark.parametrize("curve", _CURVES)
def test_the_unit_of_the_loss_does_not_matter_and_the_same_gives_the_same(curve: str) -> None:
    specs = _specs(_MIXED)
    budget = _budget(specs, 0.5)
    losses = _CURVES[curve](specs, budget, seed=2)
    picks = exact_minimise(specs, losses, budget)
    assert exact_minimise(specs, [loss.clone() for loss in losses], budget) == picks
    for factor in (2.0**-40, 2.0**40):
        assert exact_minimise(specs, [factor * loss for loss in losses], budget) == picks


def test_the_arguments_stay_as_they_are() -> None:
    specs = _specs(_MIXED)
    budget = _budget(specs, 0.5)
    losses = _CURVES["noisy"](specs, budget, seed=3)
    before = [loss.clone() for loss in losses]
    exact_minimise(specs, losses, budget)
    assert all(torch.equal(a, b) for a, b in zip(losses, before, strict=True))


@pytest.mark.parametrize(("limit", "value"), [("MAX_STATES", 1), ("MAX_STATES", 40), ("MAX_PAIRS", 50)])
def test_too_many_states_are_merged_and_still_never_worse_than_greedy(
    limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = _specs(_MIXED * 2)
    monkeypatch.setattr(core, limit, value)
    above = []
    for keep in (0.2, 0.5, 0.65, 0.8):
        for curve in ("fee", "concave", "stairs", "noise"):
            budget = _budget(specs, keep)
            losses = _CURVES[curve](specs, budget, seed=4)
            picks = exact_minimise(specs, losses, budget)
            _check_budget(specs, picks, budget)
            least = _least_loss(_tables(specs, losses, budget), budget.limit)
            falling = [loss.cummin(0).values for loss in losses]
            assert least <= _loss(losses, picks) <= _loss(losses, minimise_loss(specs, falling, budget))
            above.append(_loss(losses, picks) - least)
    assert max(above) > 0  # the limit did bite


def test_greedy_is_taken_where_merging_has_lost_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = _specs([(30, 20)] * 2)
    losses = [torch.tensor([1.0] * before + [0.0] * (12 - before)) for before in (11, 5)]
    budget = Budget(100 + 250)
    for certain, picks in ((True, [5, 0]), (False, [0, 5])):  # single steps would climb the first layer in vain
        monkeypatch.setattr(knapsack, "_solve", lambda *_, certain=certain: ([0, 0], certain))
        assert exact_minimise(specs, losses, budget) == picks
    # What single steps lose again does not count against greedy: a larger rank loses no more than a smaller one.
    rising = [torch.tensor(begin + [begin[-1]] * (12 - len(begin))) for begin in ([5.0, 200.0, 1.0, 9.0], [0.0, 100.0])]
    monkeypatch.setattr(knapsack, "_solve", lambda *_: ([0, 0], False))
    assert exact_minimise(specs, rising, Budget(100 + 200)) == [4, 0]
    monkeypatch.undo()
    monkeypatch.setattr(knapsack, "minimise_loss", lambda *_: [0, 0])
    monkeypatch.setattr(knapsack, "_solve", lambda *_: ([0, 1], False))
    assert exact_minimise(specs, losses, budget) == [0, 5]


@pytest.mark.parametrize("curve", ["fee", "noise", "concave"])
def test_blocks_are_only_for_memory(curve: str, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = _specs(_MIXED)
    budget = _budget(specs, 0.6)
    losses = _CURVES[curve](specs, budget, seed=5)
    picks = exact_minimise(specs, losses, budget)
    monkeypatch.setattr(core, "_BLOCK", 7)
    assert exact_minimise(specs, losses, budget) == picks


def test_what_cannot_be_solved_is_refused() -> None:
    specs = _specs([(30, 20)] * 2)
    losses = [torch.zeros(12)] * 2
    with pytest.raises(ValueError, match="cheapest choices cost 100 parameters, more than the budget of 99"):
        exact_minimise(specs, losses, Budget(99))
    assert exact_minimise(specs, losses, Budget(100)) == [0, 0]
    for bad in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match=r"b\.1 has losses that are not finite"):
            exact_minimise(specs, [losses[0], torch.tensor([bad] + [0.0] * 11)], Budget(700))
    with pytest.raises(ValueError, match=r"b\.0 has 12 choices, but losses of shape \(11,\)"):
        exact_minimise(specs, [torch.zeros(11), losses[1]], Budget(700))
    with pytest.raises(ValueError):
        exact_minimise(specs, losses[:1], Budget(700))


def test_no_layers_have_no_choices() -> None:
    assert exact_minimise([], [], Budget(0)) == []
