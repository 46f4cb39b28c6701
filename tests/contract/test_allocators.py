"""What every registered allocator must do; a new file is tested by being registered."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ara.allocation import ALLOCATORS
from ara.allocation.base import Allocation, Allocator, Module
from ara.allocation.budget import Budget
from ara.decomposition.base import MethodOptions
from ara.errors import UsageError
from ara.models.linears import LinearSpec

NAMES = ALLOCATORS.names()
# A Llama block with grouped queries (84, 28, 28), GPT-2's packed one, and shapes with hardly any rank below break-even.
GQA = [(84, 60), (28, 60), (28, 60), (60, 84), (92, 60), (92, 60), (60, 92)]
PACKED = [(180, 60), (60, 60), (92, 60), (60, 92)]
ODD = [(1, 19), (3, 2), (2, 2), (77, 6), (37, 41)]
MODELS = {"gqa": GQA * 3, "packed": PACKED * 2, "odd": ODD, "all": GQA + PACKED + ODD, "one": [(37, 41)]}
KEEPS = [0.05, 0.1, 0.2, 0.35, 0.5, 0.6, 0.75, 0.8, 0.9, 0.97, 0.999]


def _modules(shapes: list[tuple[int, int]], seed: int = 0, scale: float = 1.0) -> list[Module]:
    """Return layers with spectra of very different decay and size."""
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for index, (m, n) in enumerate(shapes):
        r = min(m, n)
        decay = 3 * torch.rand((), generator=generator, dtype=torch.float64)
        size = 10 ** (4 * torch.rand((), generator=generator, dtype=torch.float64) - 2)
        noise = 0.5 + torch.rand(r, generator=generator, dtype=torch.float64)
        spectrum = (scale * size * noise * torch.arange(1, r + 1) ** -decay).sort(descending=True).values
        modules.append(Module(LinearSpec(f"blocks.{index // 7}.l{index}", index // 7, f"l{index}", m, n), spectrum))
    return modules


def _allocate(name: str, modules: list[Module], budget: Budget) -> Allocation:
    allocator: Allocator = ALLOCATORS.load(name)()
    return allocator.allocate(modules, budget)


def _specs(modules: list[Module]) -> list[LinearSpec]:
    return [module.spec for module in modules]


def _cost(spec: LinearSpec, rank: int | None) -> int:
    return spec.m * spec.n if rank is None else rank * (spec.m + spec.n)


def _check(allocation: Allocation, modules: list[Module], budget: Budget) -> None:
    """Hold an allocation against the promises of :meth:`Allocator.allocate`, counted anew."""
    specs = _specs(modules)
    assert list(allocation.ranks) == [spec.name for spec in specs]
    left = budget.parameters
    steps = []
    for spec in specs:
        rank = allocation.ranks[spec.name]
        left -= _cost(spec, rank)
        if rank is None:
            continue
        assert type(rank) is int
        assert rank >= max(budget.min_rank, 1)
        assert rank % budget.rank_multiple == 0
        assert rank * (spec.m + spec.n) < spec.m * spec.n
        larger = (rank + budget.rank_multiple) * (spec.m + spec.n)
        steps.append(min(larger, spec.m * spec.n) - _cost(spec, rank))
    assert left >= 0, "over the budget"
    assert not steps or left < min(steps), "a rank step was left unspent"


def _budget(modules: list[Module], keep: float, rank_multiple: int = 1, min_rank: int = 1) -> Budget:
    """Return the budget of ``keep``, or the least feasible one."""
    specs = _specs(modules)
    try:
        return Budget.for_keep(specs, keep, rank_multiple, min_rank)
    except UsageError as error:
        return Budget.for_keep(specs, _suggested(error), rank_multiple, min_rank)


def _suggested(error: UsageError) -> float:
    found = re.search(r"--keep (\d\.\d+)", error.hint or "")
    assert found, error.hint
    return float(found.group(1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rank_multiple", [1, 8, 16])
@pytest.mark.parametrize("min_rank", [1, 5])
def test_the_budget_is_met_exactly(name: str, model: str, rank_multiple: int, min_rank: int) -> None:
    modules = _modules(MODELS[model])
    for keep in KEEPS:
        budget = _budget(modules, keep, rank_multiple, min_rank)
        _check(_allocate(name, modules, budget), modules, budget)


_SHAPE = st.tuples(st.integers(1, 90), st.integers(1, 90))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shapes=st.lists(_SHAPE, min_size=1, max_size=9),
    keep=st.floats(0.01, 1.0),
    rank_multiple=st.sampled_from([1, 1, 2, 3, 8, 16, 100]),
    min_rank=st.sampled_from([1, 1, 2, 7, 40, 1000]),
    seed=st.integers(0, 1000),
)
@example(shapes=[(1, 1), (90, 90)], keep=0.01, rank_multiple=1, min_rank=1, seed=0)
def test_the_budget_is_met_for_any_shapes(
    name: str, shapes: list[tuple[int, int]], keep: float, rank_multiple: int, min_rank: int, seed: int
) -> None:
    modules = _modules(shapes, seed)
    budget = _budget(modules, keep, rank_multiple, min_rank)
    _check(_allocate(name, modules, budget), modules, budget)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    shapes=st.lists(_SHAPE, min_size=1, max_size=9),
    keep=st.floats(0.0001, 1.0),
    rank_multiple=st.sampled_from([1, 2, 8, 16]),
    min_rank=st.sampled_from([1, 7, 40]),
)
def test_an_impossible_budget_suggests_one_that_works(
    shapes: list[tuple[int, int]], keep: float, rank_multiple: int, min_rank: int
) -> None:
    specs = _specs(_modules(shapes))
    least = 0
    for spec in specs:
        first = -(-max(min_rank, rank_multiple) // rank_multiple) * rank_multiple
        least += min(_cost(spec, first), spec.m * spec.n)
    dense = sum(spec.m * spec.n for spec in specs)
    try:
        budget = Budget.for_keep(specs, keep, rank_multiple, min_rank)
    except UsageError as error:
        assert least > keep * dense - 1e-6
        message = str(error)
        assert f"keep {keep:g} allows {int(keep * dense + 1e-6):,} parameters" in message
        assert f"already cost {least:,}" in message
        suggested = _suggested(error)
        assert suggested <= 1
        assert Budget.for_keep(specs, suggested, rank_multiple, min_rank).parameters >= least
    else:
        assert least <= budget.parameters <= keep * dense + 1e-6


def test_an_impossible_budget_is_refused() -> None:
    modules = _modules(GQA)
    with pytest.raises(UsageError, match=r"keep 0\.1 allows .*at least 1, multiples of 16") as caught:
        Budget.for_keep(_specs(modules), 0.1, rank_multiple=16)
    assert caught.value.exit_code == 2
    assert "--min-rank" in (caught.value.hint or "")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rank_multiple", [1, 8])
def test_keep_1_leaves_everything_dense(name: str, model: str, rank_multiple: int) -> None:
    modules = _modules(MODELS[model])
    budget = Budget.for_keep(_specs(modules), 1.0, rank_multiple)
    allocation = _allocate(name, modules, budget)
    assert set(allocation.ranks.values()) == {None}
    assert allocation.keep(_specs(modules)) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank_multiple", [1, 8])
def test_more_keep_never_costs_less(name: str, rank_multiple: int) -> None:
    modules = _modules(MODELS["all"])
    specs = _specs(modules)
    # One step of the dearest layer apart: closer budgets may be met more or less snugly.
    apart = rank_multiple * max(spec.rank_cost for spec in specs) / sum(spec.dense_cost for spec in specs)
    keeps = [0.2 + apart * i for i in range(int(0.8 / apart) + 1)]
    costs = [_allocate(name, modules, _budget(modules, k, rank_multiple)).cost(specs) for k in keeps]
    assert len(keeps) > 15 and costs == sorted(costs) and costs[0] < costs[-1]


@pytest.mark.parametrize("name", NAMES)
def test_same_input_same_ranks(name: str) -> None:
    modules = _modules(MODELS["all"])
    budget = _budget(modules, 0.6)
    torch.manual_seed(1)
    first = _allocate(name, modules, budget)
    torch.manual_seed(2)
    assert _allocate(name, _modules(MODELS["all"]), budget) == first


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_flat_and_empty_spectra_are_fine(name: str, value: float) -> None:
    modules = [Module(module.spec, torch.full_like(module.spectrum, value)) for module in _modules(GQA)]
    for keep in (0.3, 0.8):
        budget = _budget(modules, keep)
        _check(_allocate(name, modules, budget), modules, budget)


@pytest.mark.parametrize("name", NAMES)
def test_options_are_documented_and_unknown_ones_refused(name: str) -> None:
    options = ALLOCATORS.load(name).Options
    assert issubclass(options, MethodOptions)
    options()
    for field, info in options.model_fields.items():
        assert info.description, field
    with pytest.raises(ValueError, match="no_such_option"):
        options(no_such_option=1)


@pytest.mark.parametrize("name", NAMES)
def test_the_entry_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    entry = ALLOCATORS.entry(name)
    assert entry.title and entry.paper
    assert len(entry.title) < 80 and not entry.title.endswith(".")
    assert issubclass(entry.load(), Allocator)


def test_an_unknown_name_answers_with_near_matches_and_the_list() -> None:
    with pytest.raises(UsageError, match=f"did you mean uniform.*known are {', '.join(NAMES)}"):
        ALLOCATORS.load("unifrom")
