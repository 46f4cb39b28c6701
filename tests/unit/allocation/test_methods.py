"""What uniform and energy do, each by its own formula."""

from __future__ import annotations

import math

import pytest
import torch

from ara.allocation.energy import Energy, relative_loss
from ara.allocation.uniform import Uniform
from ara.models.weights import LinearSpec
from ara.solver.problem import Allocation, Budget, Module

GQA = [(84, 60), (28, 60), (28, 60), (60, 84), (92, 60), (92, 60), (60, 92)]


def _module(index: int, m: int, n: int, spectrum: torch.Tensor | None = None) -> Module:
    flat = torch.ones(min(m, n), dtype=torch.float64)
    return Module(LinearSpec(f"b.{index}", index, "l", m, n), flat if spectrum is None else spectrum.double())


def _run(allocator: Uniform | Energy, modules: list[Module], keep: float, rank_multiple: int = 1) -> Allocation:
    budget = Budget.for_keep([module.spec for module in modules], keep, rank_multiple)
    return allocator.allocate(modules, budget)


# -- uniform ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.8, 0.6])
def test_uniform_gives_one_share_to_all_layers_beside_those_that_stay_dense(keep: float) -> None:
    modules = [_module(i, 10 * m, 10 * n) for i, (m, n) in enumerate(GQA * 2)]
    specs = [module.spec for module in modules]
    dense = frozenset(spec.name for spec in specs if (spec.m, spec.n) == (600, 920))
    budget = Budget.for_keep(specs, keep, dense=dense)
    allocation = Uniform().allocate(modules, budget)
    total = sum(spec.dense_cost for spec in specs)
    held = sum(spec.dense_cost for spec in specs if spec.name in dense)
    share = (keep * total - held) / (total - held)
    for spec in specs:
        rank = allocation.ranks[spec.name]
        if spec.name in dense:
            assert rank is None
        else:
            assert rank is not None and spec.cost(rank) / spec.dense_cost == pytest.approx(share, abs=0.01)
    assert 0 <= budget.limit - allocation.parameters(specs) < 1500


def test_uniform_takes_floors_out_of_the_common_share() -> None:
    modules = [_module(0, 100, 100), _module(1, 1000, 1000)]
    budget = Budget.for_keep([module.spec for module in modules], 0.5, min_rank=40)
    ranks = Uniform().allocate(modules, budget).ranks
    # 40 · 200 parameters are held; the other layer gets (505,000 − 8,000) // 2,000, and the first what is left over.
    assert ranks == {"b.0": 45, "b.1": 248}


@pytest.mark.parametrize("keep", [0.8, 0.6, 0.35])
def test_uniform_is_the_floor_of_the_same_fraction_and_the_remainder(keep: float) -> None:
    modules = [_module(i, m, n) for i, (m, n) in enumerate(GQA * 2)]
    ranks = _run(Uniform(), modules, keep).ranks
    raised = 0
    for module in modules:
        spec = module.spec
        floor = math.floor(keep * spec.m * spec.n / (spec.m + spec.n))
        assert ranks[spec.name] in (floor, floor + 1)
        raised += ranks[spec.name] != floor
    assert 0 < raised < len(modules)


def test_uniform_rounds_down_to_the_multiple_before_it_spends_the_rest() -> None:
    # keep 0.8 of (84, 60), (28, 60), (60, 92), exactly 28.0, 15.3 and 29.1 ranks; the 576 + 640 + 768 parameters left
    # pay for one more step of 8 in the second layer (704), which lost most, then for one in the third (1216).
    modules = [_module(0, 84, 60), _module(1, 28, 60), _module(2, 60, 92)]
    assert list(_run(Uniform(), modules, 0.8, rank_multiple=8).ranks.values()) == [24, 16, 32]


def test_uniform_gives_the_remainder_to_the_layer_that_lost_most() -> None:
    # keep 0.5: exactly 6.0, 6.9 and 6.6 ranks; the 90 parameters of rounding pay for one more of the second.
    modules = [_module(0, 30, 20), _module(1, 41, 21), _module(2, 35, 21)]
    exact = [0.5 * m * n / (m + n) for m, n in ((30, 20), (41, 21), (35, 21))]
    assert [int(value) for value in exact] == [6, 6, 6]
    assert max(exact) == exact[1]
    assert list(_run(Uniform(), modules, 0.5).ranks.values()) == [6, 7, 6]


def test_uniform_does_not_look_at_the_spectrum() -> None:
    flat = [_module(i, m, n) for i, (m, n) in enumerate(GQA)]
    steep = [_module(i, m, n, torch.arange(min(m, n), 0, -1) ** 3.0) for i, (m, n) in enumerate(GQA)]
    assert _run(Uniform(), flat, 0.7) == _run(Uniform(), steep, 0.7)


def test_uniform_takes_back_what_least_ranks_have_overspent() -> None:
    # The thin layer cannot go below dense (1·19 < 20), so the wide one has less than half.
    modules = [_module(0, 1, 19), _module(1, 37, 41)]
    ranks = _run(Uniform(), modules, 0.5).ranks
    assert ranks == {"b.0": None, "b.1": (int(0.5 * (19 + 37 * 41)) - 19) // 78}


# -- energy -----------------------------------------------------------------------------------------------------


def test_relative_loss_is_the_discarded_part_of_the_spectrum() -> None:
    spectrum = torch.tensor([8.0, 4.0, 3.0, 1.0], dtype=torch.float64)
    loss = relative_loss(spectrum, [1, 2, 3, None])
    assert loss.tolist() == [0.5, 0.25, 1 / 16, 0.0]
    assert relative_loss(spectrum, [4]).tolist() == [0.0]
    assert relative_loss(torch.zeros(4, dtype=torch.float64), [1, None]).tolist() == [0.0, 0.0]


def test_energy_prefers_the_layer_whose_spectrum_pays() -> None:
    steep = torch.tensor([0.2**j for j in range(20)])
    flat = torch.ones(20)
    for order in ([steep, flat], [flat, steep]):
        modules = [_module(i, 30, 20, spectrum) for i, spectrum in enumerate(order)]
        ranks = _run(Energy(), modules, 0.7).ranks
        rank_of = {"steep" if s is steep else "flat": ranks[f"b.{i}"] for i, s in enumerate(order)}
        # 840 parameters: 600 make the flat one dense, the steep one lives on 4 ranks of 50.
        assert rank_of == {"steep": 4, "flat": None}


def test_energy_is_relative_to_each_layer() -> None:
    spectrum = torch.tensor([0.7**j for j in range(20)])
    same = _run(Energy(), [_module(0, 30, 20, spectrum), _module(1, 30, 20, spectrum)], 0.5)
    scaled = _run(Energy(), [_module(0, 30, 20, spectrum), _module(1, 30, 20, 2.0**40 * spectrum)], 0.5)
    assert same == scaled
    assert set(same.ranks.values()) == {6}


def test_energy_uses_the_dense_switch_where_it_pays_more() -> None:
    """With a flat spectrum the whole way from rank 1 to dense saves most per parameter: as many go dense as can."""
    modules = [_module(i, 60, 60) for i in range(5)]
    ranks = list(_run(Energy(), modules, 0.8).ranks.values())
    # 14 400 parameters: three dense ones of 3 600, and 30 ranks of 120 for the other two.
    assert ranks.count(None) == 3
    assert sum(rank for rank in ranks if rank is not None) == 30
