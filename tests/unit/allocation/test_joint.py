"""Ranks and bits together: sizes, losses of choices, and the knapsack over them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import torch

from ara.allocation.joint import Rounder, RoundingShares, best_choices, joint_losses, rounding_shares
from ara.errors import UsageError
from ara.layout_names import LAYOUT_NAMES, LayoutName
from ara.layouts import layout_named
from ara.layouts.grid import Grid
from ara.models.weights import LinearSpec
from ara.quantisation.calibrated import output_error
from ara.solver.problem import Allocation, Budget, Choice, Module

if TYPE_CHECKING:
    from ara.masks.context import TuningContext

GRIDS = (Grid(8, 32, True), Grid(4, 32, True), Grid(4, 16, True))


def layer(name: str = "x", m: int = 24, n: int = 40, layout: LayoutName = "factors") -> LinearSpec:
    return LinearSpec(name, 0, "proj", m, n, layout, 16)


def factored(m: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return A, B, G and the spectrum of a random weight, in the metric of G."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(m, n, generator=generator, dtype=torch.float64)
    x = torch.randn(9 * n, n, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, n, dtype=torch.float64)
    g = x.T @ x / len(x)
    root = torch.linalg.cholesky(g)
    u, s, vt = torch.linalg.svd(w @ root, full_matrices=False)
    return s[:, None] * vt @ torch.linalg.inv(root), u, g, s.square()


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("grid", [*GRIDS, None])
def test_bytes_are_those_of_the_stored_tensors(layout: LayoutName, grid: Grid | None) -> None:
    spec = layer(layout=layout)
    for rank in (1, 7, spec.top_rank, None):
        shapes = {"weight": (24, 40)} if rank is None else layout_named(layout).store(24, 40, rank)
        expected = 0
        for shape in shapes.values():
            if len(shape) == 1:
                expected += 4 * shape[0]
            elif grid is None:
                expected += 2 * shape[0] * shape[1]
            else:
                blocks = -(-shape[1] // grid.block)
                expected += shape[0] * (blocks * (grid.block * grid.bits // 8 + 2) + -(-blocks * grid.bits // 8))
        bits, block = (16, None) if grid is None else (grid.bits, grid.block)
        assert Choice.stored(spec, rank, grid) == Choice(rank, bits, expected, block)


def test_a_choice_that_costs_as_much_as_a_larger_one_is_not_offered() -> None:
    spec = layer()
    budget = Budget.for_bytes([spec], 10**6, GRIDS, (16, 8, 4))
    choices = budget.choices(spec)
    assert {choice.width for choice in choices} == {(16, None), *((grid.bits, grid.block) for grid in GRIDS)}
    for width in {choice.width for choice in choices}:
        costs = [choice.cost for choice in choices if choice.width == width]
        assert costs == sorted(set(costs))
        # Larger choices of the same grid.
        first = next(at for at, choice in enumerate(choices) if choice.width == width)
        assert [choices[at].cost for at in budget.rank_steps(spec, first)] == costs
    assert budget.choices(spec)[-1] == Choice.stored(spec, None, None)
    with pytest.raises(UsageError, match=r"smallest choices need \d+"):
        Budget.for_bytes([spec], 10, GRIDS, (16, 8, 4))


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_shares_are_relative_errors_in_the_metric_of_the_factors(layout: LayoutName) -> None:
    a, b, g, _ = factored(24, 40)
    found = {(grid.bits, grid.block): rounding_shares(layer(layout=layout), a, b, g, grid) for grid in GRIDS}
    fine, coarse, short = (found[grid.bits, grid.block] for grid in GRIDS)
    assert 0 < fine.dense < 0.02 * coarse.dense and 0 < fine.factors < 0.02 * coarse.factors
    assert short.dense < coarse.dense
    from ara.quantisation.calibrated import round_calibrated

    # These factors have the metric of plain output errors: B has orthonormal columns.
    rounded = round_calibrated(b @ a, g, GRIDS[1]).weight()
    assert coarse.dense == pytest.approx(output_error(b @ a, rounded, g))


def test_losses_follow_the_curve_of_the_table() -> None:
    spec = layer(m=4, n=6)
    spectrum = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    table = torch.tensor([9.0, 5.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    budget = Budget.for_bytes([spec], 10**6, [Grid(4, 16)], (16, 4))
    shares = {(4, 16): RoundingShares(dense=2 / 15, factors=3 / 12)}
    found = joint_losses(Module(spec, spectrum), table, shares, budget).tolist()
    losses = {(choice.rank, choice.bits): loss for choice, loss in zip(budget.choices(spec), found, strict=True)}
    assert losses[None, 16] == 0
    # 2 of 15 are lost: a third of the way from rank 3 (1 lost) to rank 2 (3 lost) would be 1.67, a half is 2.
    assert losses[None, 4] == pytest.approx(1.5)
    for rank, lost in ((1, 7), (2, 3)):
        if (rank, 16) in losses:
            assert losses[rank, 16] == pytest.approx({7: 5.0, 3: 2.0}[lost])
    if (2, 4) in losses:
        # 3 are cut, a quarter of the other 12 is rounded away: 6, three quarters from 3 to 7.
        assert losses[2, 4] == pytest.approx(2 + 0.75 * 3)


def test_the_choice_is_the_best_of_all_combinations() -> None:
    modules, tables, shares = [], {}, {}
    for number, (m, n) in enumerate([(4, 16), (6, 16), (5, 20)]):
        a, b, g, spectrum = factored(m, n, number)
        spec = layer(str(number), m, n, "pivoted")
        modules.append(Module(spec, spectrum))
        tables[spec.name] = torch.cat([spectrum.flip(0).cumsum(0).flip(0).sqrt(), torch.zeros(1)])
        shares[spec.name] = {(grid.bits, grid.block): rounding_shares(spec, a, b, g, grid) for grid in GRIDS}
    specs = [module.spec for module in modules]
    total = sum(spec.stored_bytes(None) for spec in specs)
    for share in (0.45, 0.6, 0.8):
        budget = Budget.for_bytes(specs, int(share * total), GRIDS, (16, 8, 4))
        picks = best_choices(modules, tables, shares, budget)
        losses = [joint_losses(one, tables[one.spec.name], shares[one.spec.name], budget) for one in modules]
        costs = [[choice.cost for choice in budget.choices(spec)] for spec in specs]
        best = min(
            sum(float(loss[at]) for loss, at in zip(losses, each, strict=True))
            for each in itertools.product(*(range(len(loss)) for loss in losses))
            if sum(cost[at] for cost, at in zip(costs, each, strict=True)) <= budget.limit
        )
        found = sum(float(loss[at]) for loss, at in zip(losses, picks, strict=True))
        assert found == pytest.approx(best)
        assert Allocation.from_picks(specs, picks, budget).cost <= budget.limit


def test_lengths_between_the_measured_ones_are_interpolated() -> None:
    short, long = RoundingShares(1e-3, 4e-3), RoundingShares(4e-3, 9e-3)
    assert short.towards(long, 0) == short
    middle = short.towards(long, 0.5)
    assert (middle.dense, middle.factors) == (pytest.approx(2e-3), pytest.approx(6e-3))
    assert short.towards(long, 1).dense == pytest.approx(4e-3)
    # A weight of zeros has no errors.
    assert RoundingShares(0, 0).towards(RoundingShares(0, 0), 0.5) == RoundingShares(0, 0)


def test_the_measured_shares_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three lengths two are measured, for each number of bits."""
    measured = []

    def shares_of(rounder: Rounder, grid: Grid) -> dict[str, RoundingShares]:
        measured.append((grid.bits, grid.block))
        return {"l": RoundingShares(grid.block, 2 * grid.block)}

    monkeypatch.setattr(Rounder, "_shares_of", shares_of)
    context = SimpleNamespace(model=SimpleNamespace(specs=[layer("l")]))
    grids = [Grid(bits, block) for bits in (4, 8) for block in (128, 32, 64)]
    found = Rounder(cast("TuningContext", context), grids).shares()["l"]
    assert measured == [(4, 32), (4, 128), (8, 32), (8, 128)]
    assert {width: share.dense for width, share in found.items()} == {
        (bits, block): pytest.approx(block) for bits in (4, 8) for block in (32, 64, 128)
    }
