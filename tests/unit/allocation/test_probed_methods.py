"""What strs and dp-kl make of probed losses, each by its own formula."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ara.allocation.dp_kl import DpKl, interpolate
from ara.allocation.strs import Strs, search
from ara.masks.context import TuningContext
from ara.masks.single_layer_probes import ProbeOptions
from ara.models.weights import LinearSpec
from ara.solver.problem import Budget, Choice
from tests.oracles.allocation import least_loss
from tests.toy import toy_problem

SHAPES = [(37, 41), (20, 30), (44, 25), (30, 30), (26, 52)]


def _specs() -> list[LinearSpec]:
    return [LinearSpec(f"b.{i}", i, "l", m, n) for i, (m, n) in enumerate(SHAPES)]


# -- strs -------------------------------------------------------------------------------------------------------


def _noted(seed: int) -> list[dict[int, float]]:
    """Return perplexities of a few choices per layer that mostly, but not always, fall with the rank."""
    generator = torch.Generator().manual_seed(seed)
    curves = []
    for spec in _specs():
        count = len(Budget(0).choices(spec)) - 1
        points = [0, count // 3, 2 * count // 3, count - 1]
        noise = torch.rand(len(points), generator=generator).tolist()
        curves.append({at: 3 + (1 - at / count) ** 2 + noise[i] for i, at in enumerate(points)})
    return curves


@pytest.mark.parametrize("seed", range(20))
def test_strs_takes_the_smallest_threshold_that_meets_the_budget(seed: int) -> None:
    specs, curves = _specs(), _noted(seed)
    dense = sum(spec.dense_cost for spec in specs)
    for keep in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0):
        budget = Budget.for_keep(specs, keep)
        # The plain way: try all thresholds from the smallest on.
        for threshold in sorted({0.0, *(value for curve in curves for value in curve.values())}):
            ranks, cost = [], 0
            for spec, curve in zip(specs, curves, strict=True):
                below = [budget.choices(spec)[at] for at, value in curve.items() if value <= threshold]
                chosen = min(below, key=lambda choice: choice.cost, default=Choice(None, 16, spec.m * spec.n))
                ranks.append(chosen.rank)
                cost += chosen.cost
            if cost <= int(keep * dense + 1e-6):
                break
        found = search(specs, curves, budget)
        assert [budget.choices(spec)[at].rank for spec, at in zip(specs, found, strict=True)] == ranks


def test_strs_spends_what_is_left_on_the_most_sensitive_layer(tmp_path: Path) -> None:
    modules, context = toy_problem(tmp_path, SHAPES)
    specs = [module.spec for module in modules]
    options = ProbeOptions(ratios=1, windows=6)
    # One ratio: the least rank is all that is probed, and only that of every layer together fits.
    budget = Budget(sum((spec.m + spec.n) for spec in specs) + max((spec.m + spec.n) for spec in specs))
    ranks = Strs(options).allocate(modules, budget, context).ranks
    alone = {}
    for spec in specs:
        context.model.use({spec.name: 1})
        alone[spec.name] = context.model.nll(context.train).mean().item()
        context.model.use_dense()
    assert {name for name, rank in ranks.items() if rank == 2} == {max(alone, key=lambda name: alone[name])}
    assert sorted(ranks.values()) == [1, 1, 1, 1, 2]


# -- dp-kl ------------------------------------------------------------------------------------------------------


def test_kl_is_linear_in_the_rank_between_probes_and_zero_at_full_rank() -> None:
    spec, budget = LinearSpec("b", 0, "l", 30, 20), Budget(0)  # full rank 20, ranks 1 … 11 below break-even
    losses = interpolate(spec, {0: 3.0, 4: 1.0, 9: 0.5}, budget)
    assert losses.dtype == torch.float64
    expected = [3, 2.5, 2, 1.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5 * 9 / 10, 0]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))


def test_kl_that_rises_with_the_rank_is_noise() -> None:
    spec, budget = LinearSpec("b", 0, "l", 30, 20), Budget(0)
    losses = interpolate(spec, {0: 3.0, 4: 1.0, 9: 1.2}, budget)
    assert losses[4:10].tolist() == [1.0] * 6
    assert (interpolate(spec, {0: -1e-9, 4: 1e-9}, budget) == 0).all()


def test_a_layer_that_can_only_be_dense_loses_nothing() -> None:
    assert interpolate(LinearSpec("b", 0, "l", 1, 1), {}, Budget(0)).tolist() == [0.0]


@pytest.fixture
def small(tmp_path: Path) -> tuple:
    return toy_problem(tmp_path, [(12, 9), (8, 14), (10, 10)])


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_dp_kl_finds_the_least_summed_kl_of_all_allocations(small: tuple, keep: float) -> None:
    modules, context = small
    specs = [module.spec for module in modules]
    budget = Budget.for_keep(specs, keep)
    # With more ratios than ranks every rank is probed and nothing interpolated.
    allocation = DpKl(ProbeOptions(ratios=64, windows=6)).allocate(modules, budget, context)
    layers = [[(choice.cost, _kl(context, spec, choice.rank)) for choice in budget.choices(spec)] for spec in specs]
    found = sum(_kl(context, spec, allocation.ranks[spec.name]) for spec in specs)
    assert math.isclose(found, least_loss(layers, budget.limit), rel_tol=1e-5)


def _kl(context: TuningContext, spec: LinearSpec, rank: int | None) -> float:
    teacher = context.model.scores(context.train)
    context.model.use({spec.name: rank})
    loss = context.model.kl(context.train, teacher).mean().item()
    context.model.use_dense()
    return loss
