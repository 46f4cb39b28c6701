"""Staircase masks, the price, and the second-order step, against their formulas and by finite differences."""

import math

import pytest
import torch

from ara.masks.ara_family import even_tables
from ara.masks.model import MaskGradients
from ara.masks.newton import NewtonMasks
from ara.masks.priced import PricedStaircase, hard_price
from ara.masks.staircase import paper_atoms, priced_atoms
from ara.masks.trust_region import floors_below
from ara.models.weights import LinearSpec
from ara.solver.knapsack import best_ranks
from ara.solver.problem import Budget

SHAPES = [(20, 14), (9, 20), (16, 16), (30, 5), (1, 3)]
SPECS = [LinearSpec(f"blocks.{i}.l", i, "l", m, n) for i, (m, n) in enumerate(SHAPES)]
GENERATOR = torch.Generator().manual_seed(0)


def _tables(seed=1):
    generator = torch.Generator().manual_seed(seed)
    tables = {}
    for spec in SPECS:
        energy = torch.rand(spec.full_rank, generator=generator, dtype=torch.float64).sort(descending=True).values
        tails = energy.flip(0).cumsum(0).flip(0)
        tables[spec.name] = torch.cat([tails, torch.zeros(1, dtype=torch.float64)])
    return tables


def _cost(ranks):
    return sum(s.dense_cost if ranks[s.name] is None else s.cost(ranks[s.name]) for s in SPECS)


@pytest.mark.parametrize(
    "atoms", [priced_atoms(SPECS, Budget(10**6), 6), paper_atoms(SPECS, 6)], ids=["priced", "paper"]
)
def test_masks_are_monotone_and_sum_to_the_expected_rank(atoms):
    scores = torch.randn(atoms.ranks.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    alpha = atoms.alpha(scores)
    torch.testing.assert_close(alpha.sum(1), torch.ones(len(SPECS), dtype=torch.float64))
    assert (alpha[~atoms.real] == 0).all()
    for i, (spec, mask) in enumerate(atoms.masks(alpha).items()):
        assert mask.shape == (SPECS[i].full_rank,) and spec == SPECS[i].name
        assert (mask.diff() <= 1e-6).all() and mask.min() >= 0 and mask.max() <= 1 + 1e-6
        staircase = (torch.arange(SPECS[i].full_rank)[None] < atoms.ranks[i][:, None]).double()
        torch.testing.assert_close(mask.double(), alpha[i] @ staircase, rtol=1e-5, atol=1e-6)
        assert float(mask.sum()) == pytest.approx(float((alpha[i] * atoms.ranks[i]).sum()), rel=1e-5)


def test_priced_atoms_have_no_rank_that_does_not_pay():
    budget = Budget(10**6, rank_multiple=2)
    atoms = priced_atoms(SPECS, budget, 5)
    for i, spec in enumerate(SPECS):
        offered = {choice.rank: choice.cost for choice in budget.choices(spec)}
        real = atoms.real[i]
        for rank, price, dense in zip(atoms.ranks[i][real], atoms.costs[i][real], atoms.dense[i][real], strict=True):
            assert offered[None if dense else int(rank)] == int(price)
        assert atoms.dense[i].sum() == 1 and int(atoms.ranks[i][atoms.dense[i]]) == spec.full_rank


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9, 1.0])
def test_the_price_keeps_the_hard_choice_on_budget(keep):
    budget = Budget.for_keep(SPECS, keep)
    atoms = priced_atoms(SPECS, budget, 8)
    theta = -atoms.expand(_tables())
    price, picks = hard_price(theta, atoms, budget.limit)
    spent = _cost(atoms.hard_ranks(picks))
    assert spent <= budget.limit
    cheaper = (theta - 0.98 * price * atoms.costs - 1e-9).masked_fill(~atoms.real, -torch.inf).argmax(1)
    assert keep == 1 or _cost(atoms.hard_ranks(cheaper)) > budget.limit


def test_the_gradient_holds_the_expected_cost():
    """Against finite differences of p along a direction, with the price solved anew for the expected cost."""
    budget = Budget.for_keep(SPECS, 0.6)
    family = PricedStaircase(priced_atoms(SPECS, budget, 8), budget, _tables(), temperature=30.0)
    weights = {
        s.name: torch.randn(s.full_rank, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(SPECS)
    }
    cut = family.cut(0.0, GENERATOR)
    sum((cut.masks[name] * w).sum() for name, w in weights.items()).backward()
    theta, atoms = family.parameters["theta"], family.atoms

    def at(theta):
        def alpha(price):
            return atoms.alpha((theta - price * atoms.costs) / family.temperature)

        def cost(price):
            return float((alpha(price) * atoms.costs).sum())

        wanted = target if target is not None else cost(family.price)
        low, high = family.price - 1, family.price + 1
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(middle) > wanted else (low, middle)
        masks = atoms.masks(alpha(high))
        return float(sum((masks[name].double() * w.double()).sum() for name, w in weights.items())), wanted

    target = None
    _, target = at(theta.detach())
    direction = torch.randn(theta.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    step = 1e-2
    slope = (at(theta.detach() + step * direction)[0] - at(theta.detach() - step * direction)[0]) / (2 * step)
    assert float((theta.grad * direction).sum()) == pytest.approx(slope, rel=1e-2)


def test_allocation_is_the_optimum_of_the_tables():
    budget = Budget.for_keep(SPECS, 0.6)
    every = max(spec.full_rank for spec in SPECS) + 1
    family = PricedStaircase(priced_atoms(SPECS, budget, every), budget, _tables())
    best = best_ranks(SPECS, _tables(), budget)

    def loss(ranks):
        return sum(float(_tables()[s.name][s.full_rank if ranks[s.name] is None else ranks[s.name]]) for s in SPECS)

    assert loss(family.allocation().ranks) == pytest.approx(loss(best.ranks))


def test_even_tables_are_met_by_equal_shares():
    specs = [LinearSpec(f"l{i}", i, "l", 400, 300 + 50 * i) for i in range(4)]
    allocation = best_ranks(specs, even_tables(specs), Budget.for_keep(specs, 0.6))
    for spec in specs:
        assert spec.cost(allocation.ranks[spec.name]) / spec.dense_cost == pytest.approx(0.6, abs=0.01)


def _found(masks, loss=1.0):
    return MaskGradients(loss, 0.01, masks)


class Quadratic:
    """A loss of all layers' masks that is exactly the model of a Newton step: Σ_j c_j (1 − p_j) plus interactions."""

    def __init__(self, tables, scale):
        self.tables, self.scale = tables, scale

    def gradients(self, ranks):
        found = {}
        for spec in SPECS:
            rank = spec.full_rank if ranks[spec.name] is None else ranks[spec.name]
            each = -self.tables[spec.name].diff() * self.scale[spec.name]
            # d/dp of Σ_j e_j (1 − p_j)², 2 e_j on the removed components and 0 on the kept ones.
            found[spec.name] = torch.where(torch.arange(spec.full_rank) < rank, 0.0, -2 * each).float()
        return found

    def loss(self, ranks):
        return sum(
            float(self.tables[s.name][s.full_rank if ranks[s.name] is None else ranks[s.name]] * self.scale[s.name])
            for s in SPECS
        )


def test_newton_leaves_a_true_table_as_it_is():
    budget, tables = Budget.for_keep(SPECS, 0.6), _tables()
    problem = Quadratic(tables, {spec.name: 1.0 for spec in SPECS})
    family = NewtonMasks(SPECS, budget, tables, tables, rate=0.5, trust=1.0)
    start = family.allocation()
    for i in range(4):
        family.update(_found(problem.gradients(family.cut(i / 4, GENERATOR).ranks)), i / 4)
    assert family.allocation() == start


def test_newton_finds_that_a_layer_matters_more_than_the_table_says():
    budget, tables = Budget.for_keep(SPECS, 0.6), _tables()
    scale = {spec.name: 8.0 if i == 0 else 1.0 for i, spec in enumerate(SPECS)}
    problem = Quadratic(tables, scale)
    family = NewtonMasks(SPECS, budget, tables, tables, rate=0.5, trust=1.0)
    before = problem.loss(family.allocation().ranks)
    for i in range(12):
        family.update(_found(problem.gradients(family.cut(i / 12, GENERATOR).ranks)), i / 12)
    after = family.allocation()
    best = best_ranks(SPECS, {n: t * scale[n] for n, t in tables.items()}, budget)
    assert problem.loss(after.ranks) < before
    assert problem.loss(after.ranks) <= problem.loss(best.ranks) + 0.5 * (before - problem.loss(best.ranks))


def _steep():
    """Return layers, tables, a budget and a generator, such that no layer is all or nothing."""
    specs = [LinearSpec(f"l{i}", i, "l", 40, 30) for i in range(12)]
    drawing = torch.Generator().manual_seed(8)
    tables = {}
    for spec in specs:
        energy = torch.rand(30, generator=drawing, dtype=torch.float64) * 0.7 ** torch.arange(30)
        tables[spec.name] = torch.cat([energy.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    return specs, tables, Budget.for_keep(specs, 0.4), drawing


def test_a_step_moves_no_more_than_it_is_trusted_to():
    specs, tables, budget, drawing = _steep()
    wild = {spec.name: -0.1 * torch.rand(30, generator=drawing) * i for i, spec in enumerate(specs)}
    for trust in (0.02, 0.1):
        family = NewtonMasks(specs, budget, tables, tables, rate=1.0, trust=trust)
        before = family.cut(0.0, GENERATOR).ranks
        family.update(_found(wild), 0.0)
        after = family.allocation().ranks

        def cost(ranks):
            return [1200 if ranks[spec.name] is None else 70 * ranks[spec.name] for spec in specs]

        moved = sum(abs(a - b) for a, b in zip(cost(before), cost(after), strict=True)) / (12 * 1200)
        assert moved <= trust
        assert trust < 0.1 or moved > 0


def test_a_step_that_makes_it_far_worse_is_taken_back_where_no_layer_explains_it():
    budget, tables = Budget.for_keep(SPECS, 0.6), _tables()
    scale = {spec.name: 8.0 if i == 0 else 1.0 for i, spec in enumerate(SPECS)}
    problem = Quadratic(tables, scale)
    family = NewtonMasks(SPECS, budget, tables, tables, rate=0.5, trust=1.0)
    first = family.cut(0.0, GENERATOR).ranks
    family.update(_found(problem.gradients(first)), 0.0)
    family.cut(0.1, GENERATOR)
    flat = {spec.name: torch.full((spec.full_rank,), -1e-4) for spec in SPECS}
    family.update(_found(flat, 1.5), 0.1)
    assert family.cut(0.2, GENERATOR).ranks == first
    assert float(family.parameters["trust"]) == 0.5
    family.update(_found(problem.gradients(first), 1.1), 0.2)
    assert float(family.parameters["trust"]) == 0.5


def test_no_layer_falls_below_half_of_its_rank_in_one_step():
    specs, tables, budget, _ = _steep()
    family = NewtonMasks(specs, budget, tables, tables, rate=1.0, trust=1.0)
    before = family.cut(0.0, GENERATOR).ranks
    # All that matters is in the last layer, says the gradient.
    wild = {spec.name: torch.full((spec.full_rank,), -1.0 if spec is specs[-1] else 0.0) for spec in specs}
    family.update(_found(wild), 0.0)
    after = family.cut(0.1, GENERATOR).ranks
    assert after != before
    for spec in specs:
        ranks = [spec.full_rank if r[spec.name] is None else r[spec.name] for r in (before, after)]
        assert ranks[1] >= ranks[0] / 2
    # That holds for a step, and is no part of what is learned.
    assert max(float(family.tables()[spec.name].max()) for spec in specs) < 10 * (1 - 1 / 15) ** 2


def test_a_square_layer_can_leave_dense_in_one_step():
    """Half of its rank is its break-even; counted from there, it would be locked."""
    specs = [LinearSpec(f"l{i}", i, "l", 30, 30) for i in range(4)]
    table = torch.cat([torch.linspace(1, 0.1, 30, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    tables = {spec.name: table * (5 if spec is specs[0] else 1) for spec in specs}
    budget = Budget.for_keep(specs, 0.6)
    flat = {**tables, "l0": torch.zeros(31)}
    family = NewtonMasks(specs, budget, tables, flat, rate=1.0, trust=1.0)
    assert family.cut(0.0, GENERATOR).ranks["l0"] is None
    idle = {spec.name: torch.full((30,), 0.0 if spec is specs[0] else -0.1) for spec in specs}
    family.update(_found(idle), 0.0)
    assert family.cut(0.1, GENERATOR).ranks["l0"] == 7, "half of rank 14, the highest below break-even"


@pytest.mark.parametrize("trust", [0.1, 0.3, 1.0])
def test_floors_of_a_far_larger_budget_fall_no_faster_than_a_step_may_move(trust):
    specs, tables, _, _ = _steep()
    tables = {name: table * (0.01 if name < "l2" else 1) for name, table in tables.items()}
    large = best_ranks(specs, tables, Budget.for_keep(specs, 0.95))
    budget = Budget.for_keep(specs, 0.5)
    # Without curvature, the tables' own slopes say at every step what the tables say.
    straight = {name: torch.zeros_like(table) for name, table in tables.items()}
    family = NewtonMasks(specs, budget, tables, straight, rate=1.0, trust=trust, around=large)
    first = family.cut(0.0, GENERATOR).ranks
    floors = floors_below(specs, large).tolist()
    assert any(first[spec.name] == floor for spec, floor in zip(specs, floors, strict=True))
    still = {spec.name: tables[spec.name].diff()[:30] for spec in specs}
    moved = []
    for _ in range(8):
        before = family.allocation()
        assert family.cut(0.0, GENERATOR).ranks == before.ranks
        family.update(_found(still), 0.0)
        after = family.allocation()
        each = [abs(before.choices[spec.name].cost - after.choices[spec.name].cost) for spec in specs]
        moved.append(sum(each) / sum(spec.dense_cost for spec in specs))
        for spec, half in zip(specs, floors_below(specs, before).tolist(), strict=True):
            assert after.ranks[spec.name] is None or after.ranks[spec.name] >= half
    assert max(moved) <= trust
    assert sum(moved) > 0


def _over_a_cliff(specs, family, layer, edge):
    """Let a family step over a cliff below rank ``edge`` of ``layer``; return the cut before and the one after."""
    spec = specs[layer]
    before = family.cut(0.0, GENERATOR).ranks
    down = {s.name: torch.full((s.full_rank,), 0.5 if s is spec else -0.05) for s in specs}
    family.update(_found(down), 0.0)
    fallen = family.cut(0.1, GENERATOR).ranks
    assert fallen[spec.name] < edge <= before[spec.name]
    behind = {s.name: torch.full((s.full_rank,), -0.3 if s is spec else -0.001) for s in specs}
    family.update(_found(behind, 2.5), 0.1)
    return before, family.cut(0.2, GENERATOR).ranks


def test_the_layer_that_went_over_a_cliff_is_pinned_and_the_others_go_on():
    specs, tables, budget, _ = _steep()
    family = NewtonMasks(specs, budget, tables, tables, rate=1.0, trust=1.0)
    layer = max(range(12), key=lambda i: family.allocation().ranks[specs[i].name] or 0)
    edge = family.allocation().ranks[specs[layer].name]
    before, after = _over_a_cliff(specs, family, layer, edge)
    assert after[specs[layer].name] == edge and after != before
    assert float(family.parameters["trust"]) == 1.0
    # For good: the next steps ask for less of it in vain.
    for i in range(3):
        down = {s.name: torch.full((s.full_rank,), 0.5 if i == layer else -0.05) for i, s in enumerate(specs)}
        family.update(_found(down), 0.3)
        ranks = family.cut(0.4, GENERATOR).ranks
        assert ranks[specs[layer].name] is None or ranks[specs[layer].name] >= edge
    assert family.tables()[specs[layer].name][edge - 1] > family.tables()[specs[layer].name][edge]


def test_a_cliff_is_told_by_a_single_window():
    specs, tables, budget, _ = _steep()
    family = NewtonMasks(specs, budget, tables, tables, rate=1.0, trust=1.0)
    layer = max(range(12), key=lambda i: family.allocation().ranks[specs[i].name] or 0)
    edge = family.allocation().ranks[specs[layer].name]
    down = {s.name: torch.full((s.full_rank,), 0.5 if i == layer else -0.05) for i, s in enumerate(specs)}
    family.cut(0.0, GENERATOR)
    family.update(MaskGradients(1.0, math.inf, down), 0.0)
    assert family.cut(0.1, GENERATOR).ranks[specs[layer].name] < edge
    behind = {s.name: torch.full((s.full_rank,), -0.3 if i == layer else -0.001) for i, s in enumerate(specs)}
    family.update(MaskGradients(30.0, math.inf, behind), 0.1)
    assert family.cut(0.2, GENERATOR).ranks[specs[layer].name] >= edge


def test_a_cliff_that_stays_is_gone_back_from():
    specs, tables, budget, _ = _steep()
    family = NewtonMasks(specs, budget, tables, tables, rate=1.0, trust=1.0)
    layer = max(range(12), key=lambda i: family.allocation().ranks[specs[i].name] or 0)
    before, _ = _over_a_cliff(specs, family, layer, family.allocation().ranks[specs[layer].name])
    behind = {s.name: torch.full((s.full_rank,), -0.001) for s in specs}
    family.update(_found(behind, 2.5), 0.2)
    assert family.cut(0.3, GENERATOR).ranks == before
    assert float(family.parameters["trust"]) == 0.5
