"""The paper's form: its masks, its penalties against their definitions, and the trap below break-even."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from ara.masks.loop import train
from ara.masks.paper import Guidance, PaperStaircase, shares_of, start_at
from ara.masks.staircase import Atoms, paper_atoms
from ara.masks.state import TrainingSettings
from ara.models.weights import LinearSpec
from ara.solver.problem import Allocation, Budget
from tests.toy import toy_problem

SHAPES = [(84, 60), (28, 60), (37, 41), (40, 40), (92, 60), (77, 6)]


def specs_of(shapes: list[tuple[int, int]]) -> list[LinearSpec]:
    return [LinearSpec(f"blocks.0.l{i}", 0, f"l{i}", m, n) for i, (m, n) in enumerate(shapes)]


def spectra_of(specs: list[LinearSpec]) -> dict[str, torch.Tensor]:
    """Return spectra that fall at different rates, from slowly to fast."""
    return {spec.name: torch.arange(1, spec.full_rank + 1).double() ** -(0.3 + 0.5 * i) for i, spec in enumerate(specs)}


def family_at(
    shares: list[float], keep: float = 0.6, weights: tuple[float, float] = (100, 10), count: int = 100, **budget: int
) -> PaperStaircase:
    """Return a family over :data:`SHAPES` whose expected ranks give these R, after its first cut."""
    specs = specs_of(SHAPES)
    atoms = paper_atoms(specs, count)
    start = start_at(atoms, {spec.name: share for spec, share in zip(specs, shares, strict=True)})
    limit = Budget.for_keep(specs, keep, **budget)
    family = PaperStaircase(atoms, spectra_of(specs), limit, start, *weights)
    cut(family)
    return family


def cut(family: PaperStaircase) -> dict[str, int | None]:
    ranks = family.cut(0.0, torch.Generator()).ranks
    assert ranks is not None
    return dict(ranks)


def expected_ranks(atoms: Atoms, theta: torch.Tensor) -> list[float]:
    return (atoms.alpha(theta) * atoms.ranks).sum(1).tolist()


@pytest.mark.parametrize("count", [1, 3, 10, 100])
@pytest.mark.parametrize("width", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.99, 1.01])
def test_the_start_has_the_expected_rank_that_was_asked_for(count: int, width: float, share: float) -> None:
    specs = specs_of(SHAPES)
    atoms = paper_atoms(specs, count)
    theta = start_at(atoms, {spec.name: share for spec in specs}, width)
    assert theta.dtype == torch.float64 and theta.shape == atoms.ranks.shape
    assert torch.isfinite(theta).all()
    for i, (spec, rank) in enumerate(zip(specs, expected_ranks(atoms, theta), strict=True)):
        first = float(atoms.ranks[i, 0])
        if first < spec.full_rank:
            wanted = share * spec.m * spec.n / (spec.m + spec.n)
            assert rank == pytest.approx(min(max(wanted, first + 1e-3), spec.full_rank - 1e-3), rel=1e-6)


@pytest.mark.parametrize("share", [1e-9, 50.0])
def test_a_start_at_the_edge_can_still_move(share: float) -> None:
    specs = specs_of(SHAPES)
    atoms = paper_atoms(specs, 100)
    theta = start_at(atoms, {spec.name: share for spec in specs}).requires_grad_()
    (atoms.alpha(theta) * atoms.ranks).sum().backward()
    assert theta.grad is not None
    assert (theta.grad.abs().amax(1) > 1e-5).all()


def test_the_start_from_ranks_is_cut_at_these_ranks() -> None:
    specs = specs_of(SHAPES)
    ranks = dict(zip((spec.name for spec in specs), [20, None, 3, 19, None, 2], strict=True))
    atoms = paper_atoms(specs, 100)
    family = PaperStaircase(
        atoms, spectra_of(specs), Budget.for_keep(specs, 0.6), start_at(atoms, shares_of(specs, ranks))
    )
    assert cut(family) == ranks


def test_masks_fall_monotonely_and_sum_to_the_expected_rank() -> None:
    family = family_at([0.3, 0.5, 0.7, 0.9, 1.1, 1.01])
    masks = family.cut(0.0, torch.Generator()).masks
    for spec, rank in zip(family.atoms.specs, family.expected.tolist(), strict=True):
        mask = masks[spec.name].detach()
        assert mask.shape == (spec.full_rank,) and mask.dtype == torch.float32
        assert (mask.diff() <= 0).all()
        assert float(mask.sum()) == pytest.approx(rank, rel=1e-5)


def test_a_layer_is_dense_from_break_even_on_and_never_rounded_up_to_it() -> None:
    below, above = cut(family_at([0.9999] * 6)), cut(family_at([1.0001] * 6))
    assert set(above.values()) == {None}
    for spec in specs_of(SHAPES):
        rank = below[spec.name]
        assert rank is not None
        assert rank * (spec.m + spec.n) < spec.m * spec.n <= (rank + 1) * (spec.m + spec.n)


# Below R_t, between R_t and 1, dense.
MIXED = [0.11, 0.47, 0.93, 0.97, 1.04, 0.99]


@pytest.mark.parametrize("weights", [(100, 0), (0, 10), (3, 5)])
def test_the_gradient_of_the_penalty_is_that_of_its_value(weights: tuple[float, float]) -> None:
    family = family_at(MIXED, weights=weights, count=12)

    def penalty(theta: torch.Tensor) -> torch.Tensor:
        family.parameters["theta"] = theta
        cut(family)
        return family.penalty()

    theta = family.parameters["theta"].detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(penalty, theta)
    (gradient,) = torch.autograd.grad(penalty(theta), theta)
    assert gradient[4].eq(0).all(), "a dense layer feels neither term"
    assert gradient[3].abs().max() > 0


def test_the_budget_term_charges_dense_layers_their_weight() -> None:
    family = family_at(MIXED, weights=(7, 0))
    charged = sum(min(share, 1) * spec.m * spec.n for share, spec in zip(MIXED, family.atoms.specs, strict=True))
    wanted = 7 * (charged / family.budget.limit - 1) ** 2
    assert family.penalty().item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_budget_term_presses_towards_the_budget_from_both_sides(sign: int) -> None:
    family = family_at([0.6 + sign * 0.1] * 6, weights=(100, 0))
    before = family.expected.detach()
    (gradient,) = torch.autograd.grad(family.penalty(), family.parameters["theta"])
    after = torch.tensor(expected_ranks(family.atoms, family.parameters["theta"].detach() - 0.01 * gradient))
    assert (sign * (after - before) < 0).all()


def test_a_layer_that_must_stay_dense_is_so_whatever_its_scores() -> None:
    specs = specs_of(SHAPES)
    atoms, limit = paper_atoms(specs, 100), Budget.for_keep(specs, 0.7, dense=frozenset([specs[2].name]))
    start = start_at(atoms, {spec.name: 0.4 for spec in specs})
    family = PaperStaircase(atoms, spectra_of(specs), limit, start, 7, 3)
    assert [rank is None for rank in cut(family).values()] == [i == 2 for i in range(6)]
    charged = sum((1 if i == 2 else 0.4) * spec.m * spec.n for i, spec in enumerate(specs))
    guidance = family.guidance(torch.where(torch.arange(6) == 2, family.break_even, family.expected)).item()
    wanted = 7 * (charged / limit.limit - 1) ** 2 + 3 * guidance
    assert family.penalty().item() == pytest.approx(wanted, rel=1e-4)
    (gradient,) = torch.autograd.grad(family.penalty(), family.parameters["theta"])
    assert gradient[2].eq(0).all() and gradient[3].abs().max() > 0
    assert family.allocation().ranks[specs[2].name] is None


def gain(spec: LinearSpec, spectrum: torch.Tensor, rank: float) -> float:
    """Return the share of energy kept at a rank that need not be whole."""
    whole = int(rank)
    part = spectrum[:whole].sum() + (rank - whole) * (spectrum[whole] if whole < len(spectrum) else 0)
    return float(part / spectrum.sum())


def envelope(spec: LinearSpec, spectrum: torch.Tensor, share: float) -> float:
    """Return the least concave function above the gain: the highest chord over ``share``, of all pairs of points."""
    even = spec.m * spec.n / (spec.m + spec.n)
    points = [(k / even, gain(spec, spectrum, k)) for k in range(1, math.ceil(even))] + [(1.0, 1.0)]
    return max(
        y0 + (y1 - y0) * (share - x0) / (x1 - x0)
        for (x0, y0), (x1, y1) in itertools.combinations(points, 2)
        if x0 <= share <= x1
    )


@pytest.mark.parametrize("shape", [(84, 60), (28, 60), (40, 40)])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.8, 2.0])
def test_guidance_is_the_gain_less_its_concave_envelope(shape: tuple[int, int], decay: float) -> None:
    (spec,) = specs_of([shape])
    spectrum = torch.arange(1, spec.full_rank + 1).double() ** -decay
    guidance = Guidance([spec], {spec.name: spectrum})
    even = spec.m * spec.n / (spec.m + spec.n)
    seen = set()
    for step in range(400):
        rank = 1 + (even - 1) * step / 400
        missing = envelope(spec, spectrum, rank / even) - gain(spec, spectrum, rank)
        assert guidance(torch.tensor([rank], dtype=torch.float64)).item() == pytest.approx(-missing, abs=1e-12)
        seen.add(missing > 1e-9)
    assert seen == {True, False}
    assert guidance(torch.tensor([even], dtype=torch.float64)).item() == 0


def test_guidance_weighs_layers_by_their_parameters() -> None:
    specs = specs_of(SHAPES)[:3]
    spectra = spectra_of(specs)
    ranks = [0.97 * spec.m * spec.n / (spec.m + spec.n) for spec in specs]
    alone = [
        Guidance([spec], spectra)(torch.tensor([rank], dtype=torch.float64))
        for spec, rank in zip(specs, ranks, strict=True)
    ]
    sizes = [spec.m * spec.n for spec in specs]
    wanted = sum(size * value.item() for size, value in zip(sizes, alone, strict=True)) / sum(sizes)
    assert Guidance(specs, spectra)(torch.tensor(ranks, dtype=torch.float64)).item() == pytest.approx(wanted)


@pytest.mark.parametrize("spectrum", [torch.zeros(40), torch.ones(3).repeat_interleave(40)[:40], torch.eye(40)[0]])
def test_guidance_of_flat_empty_and_short_spectra_is_finite(spectrum: torch.Tensor) -> None:
    spec = specs_of([(40, 40)])[0]
    guidance = Guidance([spec], {spec.name: spectrum})
    for rank in (1.0, 1.5, 10.0, 19.99, 20.0):
        value = guidance(torch.tensor([rank], dtype=torch.float64))
        assert -1 <= value.item() <= 0


def test_layers_without_a_rank_that_pays_have_no_guidance() -> None:
    specs = specs_of([(1, 19), (2, 2), (37, 41)])
    guidance = Guidance(specs, {spec.name: torch.ones(spec.full_rank) for spec in specs})
    assert guidance.slope[:2].eq(0).all()
    even = torch.tensor([spec.m * spec.n / (spec.m + spec.n) for spec in specs], dtype=torch.float64)
    assert guidance(even).item() == 0


class OneModule:
    """A 40 × 40 layer, dense from rank 20 on, whose energies fall by a fifth from component to component.

    Energy kept is all that counts, at a price per R. Below break-even its slope falls to 0.06; the chord to (1, 1) has
    at least 0.14. At a price of 0.1 dense is best, and there is a second, local optimum near R = 0.87.
    """

    PRICE = 0.1

    def __init__(self, share: float, budget_weight: float, guidance_weight: float, keep: float = 0.8) -> None:
        self.spec = specs_of([(40, 40)])[0]
        spectrum = 0.8 ** torch.arange(40).double()
        self.energies = (spectrum / spectrum.sum()).float()
        atoms = paper_atoms([self.spec], 100)
        self.family = PaperStaircase(
            atoms,
            {self.spec.name: spectrum},
            Budget.for_keep([self.spec], keep),
            start_at(atoms, {self.spec.name: share}),
            budget_weight,
            guidance_weight,
        )

    def descend(self, price: float = 0.0, steps: int = 400) -> float:
        """Minimise −(gain as straight-through sees it) + price · min(R, 1) + penalty; return R."""
        optimiser = torch.optim.Adam(self.family.parameters.values(), lr=0.1)
        for _ in range(steps):
            masks = self.family.cut(0.0, torch.Generator()).masks
            share = self.family.expected / self.family.break_even
            charged = torch.where(share < 1, share, 1)
            loss = -(masks[self.spec.name] * self.energies).sum() + price * charged.sum() + self.family.penalty()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        self.family.cut(0.0, torch.Generator())
        return self.family.expected.item() / self.family.break_even.item()

    def value(self, share: float) -> float:
        """Return what the layer really gains at R, less the price."""
        if share >= 1:
            return 1 - self.PRICE
        return gain(self.spec, self.energies.double(), 20 * share) - self.PRICE * share


def test_without_guidance_a_layer_sticks_below_break_even_and_with_it_becomes_dense() -> None:
    alone = OneModule(0.9, 0, 0)
    stuck = alone.descend(OneModule.PRICE)
    assert 0.8 < stuck < 0.95
    guided = OneModule(0.9, 0, 1)
    assert guided.descend(OneModule.PRICE) >= 1
    assert cut(guided.family) == {guided.spec.name: None}
    assert guided.value(1.0) > max(guided.value(step / 1000) for step in range(50, 1000)) > alone.value(stuck) - 0.001


def test_guidance_does_not_make_a_layer_dense_that_should_not_be() -> None:
    module = OneModule(0.9, 0, 1)
    assert module.descend(price=0.2) < 0.8


def test_a_dense_layer_feels_neither_the_budget_nor_the_guidance() -> None:
    assert OneModule(1.01, 1, 1, keep=0.6).descend() >= 1
    below, above = family_at([1 - 1e-7] * 6), family_at([1 + 1e-7] * 6)
    felt, none = (torch.autograd.grad(f.penalty(), f.parameters["theta"], allow_unused=True)[0] for f in (below, above))
    assert felt.abs().max() > 0.01 and (none is None or not none.any())


def steps_left(allocation: Allocation, budget: Budget) -> tuple[int, list[int]]:
    """Return what an allocation leaves of the budget, and what its layers' next steps would cost."""
    specs = specs_of(SHAPES)
    costs = [budget.choices(spec) for spec in specs]
    steps = []
    for spec, options in zip(specs, costs, strict=True):
        at = [choice.rank for choice in options].index(allocation.ranks[spec.name])
        if at + 1 < len(options):
            steps.append(options[at + 1].cost - options[at].cost)
    return budget.limit - allocation.parameters(specs), steps


@pytest.mark.parametrize("keep", [0.45, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("shares", [[0.5] * 6, [0.2, 0.9, 0.4, 0.6, 0.8, 0.5], [0.3, 1.2, 0.4, 0.9, 0.5, 1.05]])
def test_the_rescaled_ranks_meet_the_budget_and_keep_their_proportions(
    shares: list[float], multiple: int, keep: float
) -> None:
    family = family_at(shares, keep, rank_multiple=multiple)
    allocation = family.allocation()
    left, steps = steps_left(allocation, family.budget)
    assert 0 <= left < min(steps)
    ranks, trained = allocation.ranks, cut(family)
    assert all(ranks[name] is None for name, rank in trained.items() if rank is None)
    factors = []
    for spec in family.atoms.specs:
        rank, before = ranks[spec.name], trained[spec.name]
        highest = max((choice.rank or 0 for choice in family.budget.choices(spec)), default=0)
        if rank is not None and before is not None and multiple < rank < highest:
            factors.append(((rank - multiple) / before, (rank + multiple) / before))
    assert max(low for low, _ in factors) <= min(high for _, high in factors), "one factor for all"


def test_dense_layers_without_room_become_low_rank_the_least_sure_first() -> None:
    shares = [1.3, 1.02, 1.2, 1.4, 1.1, 0.5]
    dense = [spec.m * spec.n for spec in specs_of(SHAPES)]
    for keep in (0.3, 0.5, 0.7, 0.9):
        family = family_at(shares, keep)
        ranks = list(family.allocation().ranks.values())
        by_share = sorted(range(5), key=lambda i: shares[i])
        kept = [ranks[i] is None for i in by_share]
        assert kept == sorted(kept) and not all(kept), (keep, ranks)
        first_dense = kept.index(True) if any(kept) else 5
        low = [*by_share[:first_dense], 5]
        least = sum(sum(SHAPES[i]) for i in low)
        # One more dense layer would not have left the least ranks of the others.
        last = by_share[first_dense - 1]
        others = sum(dense[i] for i in range(6) if i not in low)
        assert others + dense[last] + least - sum(SHAPES[last]) > family.budget.limit


def test_the_form_trains(tmp_path: Path) -> None:
    modules, context = toy_problem(tmp_path, [(37, 41), (28, 60), (60, 28), (37, 41)])
    specs = [module.spec for module in modules]
    atoms, budget = paper_atoms(specs, 20), Budget.for_keep(specs, 0.6)
    start = start_at(atoms, {spec.name: 0.6 for spec in specs})
    family = PaperStaircase(atoms, {module.spec.name: module.spectrum for module in modules}, budget, start)
    settings = TrainingSettings(steps=4, batch=2, learning_rate=0.1, check_every=2)
    state = train(family, context.model, context.train, context.held_out, settings)
    assert len(state.log) == 5 and state.log[-1].held_out is not None
    assert not torch.equal(family.parameters["theta"].detach(), start)
    assert Allocation.of_ranks(specs, state.best).cost <= budget.limit
    assert state.best_held_out <= state.log[0].held_out
