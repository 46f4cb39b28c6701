"""What every family of trainable masks must do; a new one is found by being a subclass, and asks for a line here."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

import ara.allocation
import ara.masks
from ara.allocation.gumbel import GumbelMasks, GumbelOptions
from ara.allocation.tanh import TanhMasks, TanhOptions
from ara.config import MaskTrainingOptions, MethodOptions
from ara.masks.ara_family import ara_family
from ara.masks.context import TuningContext
from ara.masks.mask_family import Cut, MaskFamily
from ara.masks.model import MaskGradients
from ara.masks.newton import NewtonMasks
from ara.masks.optimisers import Adam, OwnStep, optimiser_for
from ara.masks.paper import PaperStaircase
from ara.masks.priced import PricedStaircase
from ara.masks.sensitivity_table import sensitivity_table
from ara.masks.state import TrainingSettings, TrainingState
from ara.solver.problem import Budget, Module
from tests.toy import toy_problem

Maker = Callable[[list[Module], Budget, dict[str, torch.Tensor]], MaskFamily]

_STEPS = 3
# Steps along a gradient that never changes; nats per component, more than any penalty asks for.
_PULLS, _PULL = 20, 3.0
SHAPES = [(37, 41), (28, 60), (60, 28), (37, 41), (3, 2), (1, 19)]  # the last two are cheaper dense at any rank
KEEPS = [0.3, 0.6, 0.75, 0.9, 0.97]


def _of_ara(options: MaskTrainingOptions) -> Maker:
    return lambda modules, budget, table: ara_family(options, modules, budget, table)


# Large steps, so that a few of them move whole ranks.
NEWTON = MaskTrainingOptions(trust=1.0)
ADAM = MaskTrainingOptions(optimiser="adam", atoms=12, learning_rate=0.5, average=0.5, temperature=20.0)
PAPER = MaskTrainingOptions(objective="paper", optimiser="adam", atoms=12, learning_rate=0.5, average=0.5)
# How each family is made at its start, and the options that it trains by.
FAMILIES: dict[type[MaskFamily], tuple[MethodOptions, Maker]] = {
    NewtonMasks: (NEWTON, _of_ara(NEWTON)),
    PricedStaircase: (ADAM, _of_ara(ADAM)),
    PaperStaircase: (PAPER, _of_ara(PAPER)),
    GumbelMasks: (GumbelOptions(), lambda modules, budget, _: GumbelMasks(modules, budget, GumbelOptions())),
    TanhMasks: (TanhOptions(), lambda modules, budget, _: TanhMasks(modules, budget, TanhOptions())),
}
every_family = pytest.mark.parametrize("kind", FAMILIES, ids=lambda kind: kind.__name__)


class Toy:
    """A toy model with its sensitivity table, which all families of this suite are made for."""

    def __init__(self, modules: list[Module], context: TuningContext) -> None:
        self.modules, self.context = modules, context
        self.specs = [module.spec for module in modules]
        self.table = sensitivity_table(context).values

    def budget(self, keep: float, rank_multiple: int = 1, dense: frozenset[str] = frozenset()) -> Budget:
        """Return the budget of ``keep``, or the least feasible one."""
        limit = int(keep * sum(spec.dense_cost for spec in self.specs) + 1e-6)
        budget = Budget(limit, rank_multiple, dense=dense)
        return replace(budget, limit=max(limit, sum(budget.choices(spec)[0].cost for spec in self.specs)))

    def family(self, kind: type[MaskFamily], budget: Budget) -> MaskFamily:
        """Return a family at its start."""
        return FAMILIES[kind][1](self.modules, budget, self.table)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(*toy_problem(tmp_path_factory.mktemp("toy"), SHAPES))


def _optimiser(family: MaskFamily, state: TrainingState) -> OwnStep | Adam:
    settings = TrainingSettings.of(FAMILIES[type(family)][0], micro_batch=3, seed=0)
    return optimiser_for(family, replace(settings, steps=_STEPS), state)


def _train(family: MaskFamily, toy: Toy, state: TrainingState | None = None, until: int = _STEPS) -> TrainingState:
    """Take steps as the training loop does; returns everything that further ones depend on."""
    state, model = state or TrainingState(), toy.context.model
    optimiser = _optimiser(family, state)
    for step in range(state.step, until):
        cut = family.cut(step / _STEPS, torch.Generator().manual_seed(step))
        if cut.ranks is None:
            model.use_soft(cut.masks)
        else:
            model.use(cut.ranks)
        optimiser.step(cut, model.gradients(toy.context.train, "ce", 3, step), step / _STEPS)
    model.use_dense()
    return TrainingState(until, optimiser.state())


def _pulled(family: MaskFamily, toy: Toy, favourite: str) -> None:
    """Take steps along a gradient by which every component of one layer lowers the loss, and no other does anything."""
    optimiser = _optimiser(family, TrainingState())
    gradients = {spec.name: torch.zeros(spec.full_rank) for spec in toy.specs}
    gradients[favourite] -= _PULL
    for step in range(_PULLS):
        cut = family.cut(0.0, torch.Generator().manual_seed(step))
        optimiser.step(cut, MaskGradients(1.0, 0.1, gradients), 0.0)


def _leaves(kind: type[MaskFamily]) -> Iterator[type[MaskFamily]]:
    below = kind.__subclasses__()
    for found in below:
        yield from _leaves(found)
    if not below:
        yield kind


def test_every_family_of_the_package_is_tested_here() -> None:
    for package in (ara.masks, ara.allocation):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    assert {kind for kind in _leaves(MaskFamily) if kind.__module__.startswith("ara.")} == set(FAMILIES)


@every_family
def test_a_cut_fits_the_layers(toy: Toy, kind: type[MaskFamily]) -> None:
    family = toy.family(kind, toy.budget(0.6))
    for trained in (False, True):
        if trained:
            _train(family, toy)
        for progress in (0.0, 0.5):
            _check_cut(family.cut(progress, torch.Generator().manual_seed(1)), toy)


def _check_cut(cut: Cut, toy: Toy) -> None:
    named = set(cut.masks) if cut.ranks is None else set(cut.ranks)
    assert named == {spec.name for spec in toy.specs}, "every layer is cut anew in every step"
    for spec in toy.specs:
        if cut.ranks is not None:
            rank = cut.ranks[spec.name]
            assert rank is None or (type(rank) is int and 1 <= rank <= spec.top_rank)
        if spec.name in cut.masks:
            mask = cut.masks[spec.name].detach()
            assert mask.shape == (spec.full_rank,) and mask.dtype == torch.float32
            # Sums of the atoms' weights are rounded.
            assert float(mask.min()) >= -1e-6 and float(mask.max()) <= 1 + 1e-6


@every_family
def test_masks_fall_from_component_to_component_unless_they_are_drawn(toy: Toy, kind: type[MaskFamily]) -> None:
    family = toy.family(kind, toy.budget(0.6))
    _train(family, toy)
    first, second = (family.cut(0.5, torch.Generator().manual_seed(seed)).masks for seed in (1, 2))
    if any(not torch.equal(first[name], second[name]) for name in first):
        assert all(set(mask.detach().unique().tolist()) <= {0.0, 1.0} for mask in first.values()), (
            "drawn masks are hard"
        )
    else:
        assert all(bool((mask.detach().diff() <= 1e-6).all()) for mask in first.values())


@every_family
def test_finite_gradients_reach_every_parameter(toy: Toy, kind: type[MaskFamily]) -> None:
    family = toy.family(kind, toy.budget(0.6))
    before = {name: value.detach().clone() for name, value in family.parameters.items()}
    if not family.own_step:
        cut = family.cut(0.0, torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(1)
        loss = torch.stack([(mask * torch.randn(mask.shape, generator=generator)).sum() for mask in cut.masks.values()])
        penalty = family.penalty()
        (loss.sum() if penalty is None else loss.sum() + penalty).backward()
        for value in family.parameters.values():
            assert value.is_leaf and value.grad is not None
            assert bool(value.grad.isfinite().all()) and bool(value.grad.any())
    _train(family, toy)
    assert all(bool(value.isfinite().all()) for value in family.parameters.values())
    assert any(not torch.equal(value.detach(), before[name]) for name, value in family.parameters.items())


@every_family
@pytest.mark.parametrize("rank_multiple", [1, 4])
def test_the_allocation_meets_the_budget_exactly(toy: Toy, kind: type[MaskFamily], rank_multiple: int) -> None:
    dense = frozenset({toy.specs[1].name})
    for keep in KEEPS:
        family = toy.family(kind, toy.budget(keep, rank_multiple, dense if keep > 0.5 else frozenset()))
        for trained in (False, True):
            if trained:
                _train(family, toy)
            _check_allocation(family, toy)


def _check_allocation(family: MaskFamily, toy: Toy) -> None:
    """Hold an allocation to its budget, counted anew: all on offer, not over it, less than a rank step unspent."""
    allocation, budget = family.allocation(), family.budget
    assert list(allocation.choices) == [spec.name for spec in toy.specs]
    left, steps = budget.limit, []
    for spec in toy.specs:
        rank, each = allocation.ranks[spec.name], 1 if budget.unit == "parameters" else spec.bits // 8
        cost = spec.m * spec.n if rank is None else rank * (spec.m + spec.n)
        left -= each * cost
        if rank is not None:
            assert rank % budget.rank_multiple == 0 and cost < spec.m * spec.n and spec.name not in budget.dense
            higher = (rank + budget.rank_multiple) * (spec.m + spec.n)
            steps.append(each * (min(higher, spec.m * spec.n) - cost))
    assert left == budget.limit - allocation.cost >= 0, "over the budget"
    assert not steps or left < min(steps), "a rank step was left unspent"


@every_family
def test_a_budget_in_bytes_is_met_by_the_ranks_of_as_many_parameters(toy: Toy, kind: type[MaskFamily]) -> None:
    budget = toy.budget(0.6)
    each = toy.specs[0].bits // 8
    in_bytes = replace(budget, limit=each * budget.limit, unit="bytes")
    found = []
    for family in (toy.family(kind, budget), toy.family(kind, in_bytes)):
        _train(family, toy)
        _check_allocation(family, toy)
        found.append(family.allocation())
    assert found[0].ranks == found[1].ranks and found[1].cost == each * found[0].cost


@every_family
def test_ranks_alone_do_not_choose_between_bit_widths(toy: Toy, kind: type[MaskFamily]) -> None:
    with pytest.raises(ValueError, match="chooses ranks alone, the budget offers 2 bit widths"):
        toy.family(kind, Budget(10**6, unit="bytes", bits=(4, 8))).allocation()


@every_family
def test_the_same_seed_gives_the_same_bytes(toy: Toy, kind: type[MaskFamily]) -> None:
    made = []
    for ambient in (1, 2):
        torch.manual_seed(ambient)
        family = toy.family(kind, toy.budget(0.6))
        _train(family, toy)
        cut = family.cut(0.5, torch.Generator().manual_seed(7))
        made.append((family.parameters, cut.masks, cut.ranks, family.allocation()))
    (parameters, masks, ranks, allocation), again = made
    assert parameters.keys() == again[0].keys() and masks.keys() == again[1].keys()
    assert all(torch.equal(value, again[0][name]) for name, value in parameters.items())
    assert all(torch.equal(mask, again[1][name]) for name, mask in masks.items())
    assert (ranks, allocation) == (again[2], again[3])


@every_family
def test_a_training_goes_on_from_its_saved_state_bit_by_bit(toy: Toy, kind: type[MaskFamily]) -> None:
    whole, resumed = toy.family(kind, toy.budget(0.6)), toy.family(kind, toy.budget(0.6))
    _train(whole, toy)
    state = _train(toy.family(kind, toy.budget(0.6)), toy, until=1)
    _train(resumed, toy, state)
    assert all(torch.equal(value, resumed.parameters[name]) for name, value in whole.parameters.items())
    assert whole.allocation() == resumed.allocation()


@every_family
def test_full_keep_leaves_everything_dense(toy: Toy, kind: type[MaskFamily]) -> None:
    family = toy.family(kind, toy.budget(1.0))
    for trained in (False, True):
        if trained:
            _train(family, toy)
        allocation = family.allocation()
        assert set(allocation.ranks.values()) == {None} and allocation.keep(toy.specs) == 1


@every_family
def test_more_keep_never_costs_less(toy: Toy, kind: type[MaskFamily]) -> None:
    costs = []
    for keep in KEEPS:
        family = toy.family(kind, toy.budget(keep))
        _train(family, toy)
        costs.append(family.allocation().cost)
    assert costs == sorted(costs) and costs[0] < costs[-1]


@every_family
@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_layer_whose_components_lower_the_loss_keeps_more(toy: Toy, kind: type[MaskFamily], place: int) -> None:
    budget, favourite = toy.budget(0.6), toy.specs[place]
    family = toy.family(kind, budget)
    before = family.allocation().choices[favourite.name].cost
    _pulled(family, toy, favourite.name)
    assert family.allocation().choices[favourite.name].cost > before
    _check_allocation(family, toy)
