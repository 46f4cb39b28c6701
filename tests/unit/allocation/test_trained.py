"""Allocators that train masks, and the rounding that brings what they learn to the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ara.allocation.gumbel import Gumbel, GumbelMasks, GumbelOptions
from ara.allocation.tanh import Tanh, TanhMasks, TanhOptions
from ara.errors import UsageError
from ara.masks.context import TuningContext
from ara.models.weights import LinearSpec
from ara.solver.problem import Allocation, Budget, Module
from ara.solver.rounding import proportional
from tests.toy import _drawn_text, toy_problem

SHAPES = [(84, 60), (28, 60), (37, 41), (40, 40), (92, 60)]
ALLOCATORS = {
    # The toy's loss depends on ranks much less than that of a trained model, so the budget needs less weight.
    "gumbel": Gumbel(GumbelOptions(steps=60, budget_weight=4)),
    "tanh": Tanh(TanhOptions(steps=40, learning_rate=0.03, budget_weight=2)),
}


def specs_of(shapes: Sequence[tuple[int, int]]) -> list[LinearSpec]:
    return [LinearSpec(f"blocks.0.l{i}", 0, f"l{i}", m, n) for i, (m, n) in enumerate(shapes)]


def modules_of(shapes: Sequence[tuple[int, int]]) -> list[Module]:
    return [Module(spec, 0.9 ** torch.arange(spec.full_rank).double()) for spec in specs_of(shapes)]


def check(allocation: Allocation, specs: Sequence[LinearSpec], budget: Budget) -> None:
    """Hold an allocation against the budget: not over it, and less than one step unspent."""
    left = budget.limit - allocation.parameters(specs)
    assert left >= 0
    for spec in specs:
        choices = budget.choices(spec)
        at = [choice.rank for choice in choices].index(allocation.ranks[spec.name])
        assert at + 1 == len(choices) or choices[at + 1].cost - choices[at].cost > left


_LAYER = st.tuples(st.integers(1, 90), st.integers(1, 90), st.floats(1e-6, 3.0))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    layers=st.lists(_LAYER, min_size=1, max_size=9),
    keep=st.floats(0.05, 1.0),
    rank_multiple=st.sampled_from([1, 2, 8, 100]),
    min_rank=st.sampled_from([1, 7, 1000]),
    keep_dense=st.booleans(),
)
def test_shares_become_ranks_that_meet_the_budget(
    layers: list[tuple[int, int, float]], keep: float, rank_multiple: int, min_rank: int, keep_dense: bool
) -> None:
    specs = specs_of([(m, n) for m, n, _ in layers])
    shares = [share for _, _, share in layers]
    try:
        budget = Budget.for_keep(specs, keep, rank_multiple, min_rank)
    except UsageError:
        budget = Budget(sum(budget_of(spec, rank_multiple, min_rank) for spec in specs), rank_multiple, min_rank)
    allocation = proportional(specs, shares, budget, keep_dense=keep_dense)
    check(allocation, specs, budget)
    dense = [spec for spec, share in zip(specs, shares, strict=True) if share >= 1]
    least = sum(spec.m * spec.n if spec in dense else budget_of(spec, rank_multiple, min_rank) for spec in specs)
    if keep_dense and least <= budget.limit:
        assert all(allocation.ranks[spec.name] is None for spec in dense)


def budget_of(spec: LinearSpec, rank_multiple: int, min_rank: int) -> int:
    """Return the least that a layer can cost."""
    rank = -(-max(rank_multiple, min_rank) // rank_multiple) * rank_multiple
    return min(spec.m * spec.n, rank * (spec.m + spec.n))


@pytest.mark.parametrize("keep_dense", [True, False])
def test_ranks_are_proportional_to_shares(keep_dense: bool) -> None:
    specs = specs_of([(300, 200)] * 4)
    budget = Budget.for_keep(specs, 0.4)
    ranks = proportional(specs, [0.1, 0.2, 0.3, 0.4], budget, keep_dense=keep_dense).ranks.values()
    assert list(ranks) == [19, 38, 58, 77]


def test_what_rounding_leaves_goes_to_the_layer_that_lost_most() -> None:
    specs = specs_of([(300, 200), (30, 20), (30, 20)])
    # Worth 60, 4.3 and 5.8 ranks. The first one's last rank, of 500, does not fit; one of the others', of 50, does.
    shares = [60 * 500 / 60000, 4.3 * 50 / 600, 5.8 * 50 / 600]
    budget = Budget(59 * 500 + 4 * 50 + 5 * 50 + 60)
    assert list(proportional(specs, shares, budget, keep_dense=True).ranks.values()) == [59, 4, 6]


def test_scaled_shares_become_dense_at_break_even_unless_dense_is_what_the_shares_say() -> None:
    specs = specs_of([(300, 200)] * 3)
    budget = Budget.for_keep(specs, 0.8)
    free = proportional(specs, [0.3, 0.5, 0.7], budget, keep_dense=False)
    assert list(free.ranks.values())[2] is None
    held = proportional(specs, [0.6, 0.7, 0.98], budget, keep_dense=True)
    # One factor would bring the last to 1.03.
    assert list(held.ranks.values())[2] == 119
    kept = proportional(specs, [1.0, 0.9, 0.9], budget, keep_dense=True)
    assert list(kept.ranks.values()) == [None, 84, 84]


def test_dense_layers_give_way_when_there_is_no_room() -> None:
    specs = specs_of([(300, 200)] * 3)
    budget = Budget.for_keep(specs, 0.5)
    ranks = list(proportional(specs, [1.2, 1.1, 1.3], budget, keep_dense=True).ranks.values())
    assert ranks[2] is None and ranks[0] is not None and ranks[1] is not None
    assert ranks[0] > ranks[1]


def gumbel_masks(**options: object) -> GumbelMasks:
    modules = modules_of(SHAPES)
    return GumbelMasks(modules, Budget.for_keep(specs_of(SHAPES), 0.6), GumbelOptions(**options))


def test_a_component_is_kept_with_the_probability_of_its_logit() -> None:
    masks = gumbel_masks()
    with torch.no_grad():
        masks.parameters["logits"].copy_(torch.linspace(-4, 4, len(masks.parameters["logits"])))
    generator = torch.Generator().manual_seed(0)
    draws = 2000
    kept = torch.zeros_like(masks.parameters["logits"])
    for _ in range(draws):
        drawn = torch.cat(list(masks.cut(0.0, generator).masks.values())).detach()
        assert set(drawn.unique().tolist()) <= {0.0, 1.0}
        kept += drawn
    # Five standard deviations.
    torch.testing.assert_close(
        kept / draws, torch.sigmoid(masks.parameters["logits"].detach()), rtol=0, atol=5 * 0.5 / draws**0.5
    )


def test_the_gradient_goes_straight_through_the_sigmoid() -> None:
    masks = gumbel_masks(temperature=0.7)
    drawn = torch.cat(list(masks.cut(0.0, torch.Generator().manual_seed(3)).masks.values()))
    (gradient,) = torch.autograd.grad(drawn.sum(), masks.parameters["logits"])
    uniform = torch.rand(len(drawn), generator=torch.Generator().manual_seed(3))
    soft = torch.sigmoid((masks.parameters["logits"].detach() + uniform.logit()) / 0.7)
    torch.testing.assert_close(gradient, soft * (1 - soft) / 0.7)


def test_the_penalty_counts_the_cost_over_the_budget_and_the_energy_out_of_order() -> None:
    masks = gumbel_masks(budget_weight=16, align_weight=0)
    masks.cut(0.0, torch.Generator())
    masks.drawn = [torch.ones(spec.full_rank) for spec in masks.specs]
    cost = sum(spec.full_rank * (spec.m + spec.n) for spec in masks.specs)
    wanted = 16 * torch.tensor(cost / masks.budget.limit).log()
    torch.testing.assert_close(masks.penalty(), wanted)
    masks.drawn = [torch.zeros(spec.full_rank) for spec in masks.specs]
    assert masks.penalty() == 0

    masks = gumbel_masks(budget_weight=0, align_weight=2)
    masks.drawn = [(torch.arange(spec.full_rank) < 5).float() for spec in masks.specs]
    assert masks.penalty() == 0
    # The second component is missing, so the fifth is one too many.
    masks.drawn[0] = torch.zeros(60).index_fill(0, torch.tensor([0, 2, 3, 4]), 1.0)
    energy = 0.9 ** torch.arange(60)
    torch.testing.assert_close(masks.penalty(), 2 * (energy[1] + energy[4]) / energy.sum() / len(SHAPES))


def test_equal_counts_are_equal_ranks_also_where_all_of_them_are_beyond_break_even() -> None:
    modules = modules_of([(40, 60)] * 4)
    budget = Budget.for_keep([module.spec for module in modules], 0.5)
    assert list(GumbelMasks(modules, budget, GumbelOptions()).allocation().ranks.values()) == [12] * 4


def test_tanh_masks_fall_around_the_position() -> None:
    modules = modules_of(SHAPES)
    masks = TanhMasks(modules, Budget.for_keep(specs_of(SHAPES), 0.6), TanhOptions(beta=1.5))
    drawn = masks.cut(0.0, torch.Generator()).masks
    for spec in masks.specs:
        # Not the wished 0.6 but what the whole parameters of the budget are of all.
        position = masks.keep * spec.m * spec.n / (spec.m + spec.n)
        wanted = 1 / (1 + torch.exp(-3 * (position - torch.arange(1, spec.full_rank + 1))))
        torch.testing.assert_close(drawn[spec.name], wanted.float(), rtol=1e-4, atol=1e-6)


def test_positions_stay_between_rank_1_and_full_rank() -> None:
    masks = TanhMasks(modules_of(SHAPES), Budget.for_keep(specs_of(SHAPES), 0.6), TanhOptions())
    with torch.no_grad():
        masks.parameters["shares"].copy_(torch.tensor([-1.0, 0.0, 9.0, 0.5, 2.0]))
    masks.cut(0.0, torch.Generator())
    ranks = [
        share * spec.m * spec.n / (spec.m + spec.n)
        for share, spec in zip(masks.parameters["shares"].tolist(), masks.specs, strict=True)
    ]
    assert ranks == pytest.approx([1, 1, 37, 10, 60])


def test_the_tanh_penalty_charges_dense_layers_their_weight() -> None:
    masks = TanhMasks(modules_of(SHAPES), Budget.for_keep(specs_of(SHAPES), 0.6), TanhOptions(budget_weight=20))
    with torch.no_grad():
        masks.parameters["shares"].copy_(torch.tensor([1.3, 0.7, 0.7, 0.7, 1.0]))
    sizes = torch.tensor([m * n for m, n in SHAPES]).double()
    kept = (sizes * torch.tensor([1, 0.7, 0.7, 0.7, 1]).double()).sum() / sizes.sum()
    penalty = masks.penalty()
    assert penalty.item() == pytest.approx(20 * abs(kept.item() - masks.keep))
    (gradient,) = torch.autograd.grad(penalty, masks.parameters["shares"])
    torch.testing.assert_close(gradient, 20 * sizes / sizes.sum() * torch.tensor([0, 1, 1, 1, 0]))


@pytest.mark.parametrize("family", [GumbelMasks, TanhMasks])
def test_layers_that_must_stay_dense_are_so_while_others_learn(family: type[GumbelMasks] | type[TanhMasks]) -> None:
    modules = modules_of([*SHAPES, (1, 19)])
    specs = [module.spec for module in modules]
    budget = Budget.for_keep(specs, 0.7, dense=frozenset([specs[2].name]))
    options = {GumbelMasks: GumbelOptions(align_weight=0), TanhMasks: TanhOptions()}[family]
    masks = family(modules, budget, options)
    (parameter,) = masks.parameters.values()
    with torch.no_grad():
        parameter.fill_(-9)
    drawn = masks.cut(0.0, torch.Generator().manual_seed(0)).masks
    for i, spec in enumerate(specs):
        assert (drawn[spec.name] == 1).all() == (i in (2, 5)), spec
    if family is TanhMasks:
        sizes = [spec.m * spec.n for spec in specs]
        least = [spec.m + spec.n for spec in specs]
        kept = (sum(least[i] for i in (0, 1, 3, 4)) + sizes[2] + sizes[5]) / sum(sizes)
        assert masks.penalty().item() == pytest.approx(20 * abs(kept - budget.limit / sum(sizes)))
    allocation = masks.allocation()
    assert allocation.ranks[specs[2].name] is None
    check(allocation, specs, budget)


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Module], TuningContext]:
    """Return four layers of one shape, of which only the second is read by anything, and text that fits."""
    modules, context = toy_problem(tmp_path_factory.mktemp("toy"), [(37, 41)] * 4, seed=2)
    model = context.model.model
    for i in (0, 2, 3):
        model.get_submodule(modules[i].spec.name.removesuffix(".linear")).write.zero_()
    text = _drawn_text(model, count=40, length=24, seed=0)
    return modules, replace(context, train=text[:24], held_out=text[24:])


@pytest.mark.parametrize("name", ALLOCATORS)
def test_the_layer_that_matters_gets_more_rank(name: str, problem: tuple[list[Module], TuningContext]) -> None:
    modules, context = problem
    specs = [module.spec for module in modules]
    budget = Budget.for_keep(specs, 0.5)
    allocation = ALLOCATORS[name].allocate(modules, budget, context)
    check(allocation, specs, budget)
    first, matters, *others = (rank or specs[0].full_rank for rank in allocation.ranks.values())
    # Under a uniform allocation ranks differ by 1.
    assert matters >= max(first, *others) + 3, allocation


@pytest.mark.parametrize("name", ALLOCATORS)
def test_the_seed_decides(name: str, problem: tuple[list[Module], TuningContext]) -> None:
    modules, context = problem
    budget = Budget.for_keep([module.spec for module in modules], 0.5)
    torch.manual_seed(1)
    first = ALLOCATORS[name].allocate(modules, budget, context)
    torch.manual_seed(2)
    assert ALLOCATORS[name].allocate(modules, budget, context) == first


def test_the_result_is_no_worse_on_held_out_text_than_the_start(problem: tuple[list[Module], TuningContext]) -> None:
    modules, context = problem
    budget = Budget.for_keep([module.spec for module in modules], 0.5)
    options = GumbelOptions(steps=3, learning_rate=50)
    start = GumbelMasks(modules, budget, options).allocation()
    found = Gumbel(options).allocate(modules, budget, context)
    losses = []
    for allocation in (start, found):
        context.model.use(allocation.ranks)
        losses.append(float(context.model.nll(context.held_out).mean()))
    context.model.use_dense()
    assert losses[1] <= losses[0]
