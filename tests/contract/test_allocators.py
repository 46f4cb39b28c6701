"""What every registered allocator must do; a new file is tested by being registered."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ara.allocation import ALLOCATORS
from ara.allocation.base import Allocator
from ara.decomposition.base import MethodOptions
from ara.errors import UsageError
from ara.layout_names import LAYOUT_NAMES, LayoutName
from ara.masks.context import TuningContext
from ara.models.weights import LinearSpec
from ara.solver.problem import Allocation, Budget, Module
from ara.solver.times import ShapeTimes, TimeTable
from tests.toy import toy_problem

NAMES = ALLOCATORS.names()
# Those that look at the model are asked fewer questions, about a toy model, with options that make them fast.
LOOKING = [name for name in NAMES if ALLOCATORS.load(name).needs_model]
BLIND = [name for name in NAMES if name not in LOOKING]
FAST: dict[str, dict[str, Any]] = {
    "ara": {"steps": 2, "batch": 3, "atoms": 8},
    "strs": {"ratios": 3, "windows": 2},
    "dp-kl": {"ratios": 3, "windows": 2},
    "gumbel": {"steps": 2},
    "tanh": {"steps": 2},
}
# A Llama block with grouped queries (84, 28, 28), GPT-2's packed one, and shapes with hardly any rank below break-even.
GQA = [(84, 60), (28, 60), (28, 60), (60, 84), (92, 60), (92, 60), (60, 92)]
PACKED = [(180, 60), (60, 60), (92, 60), (60, 92)]
ODD = [(1, 19), (3, 2), (2, 2), (77, 6), (37, 41)]
MODELS = {"gqa": GQA * 3, "packed": PACKED * 2, "odd": ODD, "all": GQA + PACKED + ODD, "one": [(37, 41)]}
KEEPS = [0.05, 0.1, 0.2, 0.35, 0.5, 0.6, 0.75, 0.8, 0.9, 0.97, 0.999]
FEW_KEEPS = {1: [0.35], 8: [0.6], 16: [0.8]}  # by rank multiple


class Problems:
    """The layers that an allocator is tried on; where it looks at the model, they are a toy model's, made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[Any, tuple[list[Module], TuningContext]] = {}

    def of(self, name: str, shapes: list[tuple[int, int]], seed: int = 0) -> tuple[list[Module], TuningContext | None]:
        if name in BLIND:
            return _modules(shapes, seed), None
        key = (*shapes, seed)
        if key not in self._made:
            folder = self._folder / str(len(self._made))
            folder.mkdir()
            self._made[key] = toy_problem(folder, shapes, seed)
        return self._made[key]


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Problems:
    return Problems(tmp_path_factory.mktemp("toys"))


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


def _allocate(name: str, modules: list[Module], budget: Budget, context: TuningContext | None = None) -> Allocation:
    method = ALLOCATORS.load(name)
    allocator: Allocator = method(method.Options(**FAST.get(name, {})))
    return allocator.allocate(modules, budget, context)


def _specs(modules: list[Module]) -> list[LinearSpec]:
    return [module.spec for module in modules]


def _cost(spec: LinearSpec, rank: int | None) -> int:
    if rank is None:
        return spec.m * spec.n
    return rank * (spec.m + spec.n) if spec.layout == "factors" else rank * spec.n + (spec.m - rank) * rank


def _pivoted(modules: list[Module]) -> list[Module]:
    return [Module(replace(module.spec, layout="pivoted"), module.spectrum) for module in modules]


def _check(allocation: Allocation, modules: list[Module], budget: Budget) -> None:
    """Hold an allocation against the promises of :meth:`Allocator.allocate`, counted anew."""
    specs = _specs(modules)
    assert list(allocation.ranks) == [spec.name for spec in specs]
    left = budget.limit
    steps = []
    for spec in specs:
        rank = allocation.ranks[spec.name]
        left -= _cost(spec, rank)
        if rank is None:
            continue
        assert type(rank) is int
        assert rank >= max(budget.min_rank, 1)
        assert rank % budget.rank_multiple == 0
        assert _cost(spec, rank) < spec.m * spec.n
        higher = rank + budget.rank_multiple
        larger = _cost(spec, higher) if higher < min(spec.m, spec.n) else spec.m * spec.n
        assert spec.name not in budget.dense
        assert _cost(spec, rank) >= budget.min_keep * spec.m * spec.n - 1e-6
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
def test_the_budget_is_met_exactly(
    problems: Problems, name: str, model: str, rank_multiple: int, min_rank: int
) -> None:
    modules, context = problems.of(name, MODELS[model])
    for keep in KEEPS if name in BLIND else FEW_KEEPS[rank_multiple]:
        budget = _budget(modules, keep, rank_multiple, min_rank)
        _check(_allocate(name, modules, budget, context), modules, budget)


@pytest.mark.parametrize("name", [name for name in NAMES if "pivoted" in ALLOCATORS.load(name).layouts])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rank_multiple", [1, 8])
def test_the_budget_is_met_exactly_with_pivoted_layers(
    problems: Problems, name: str, model: str, rank_multiple: int
) -> None:
    modules, context = problems.of(name, MODELS[model])
    modules = _pivoted(modules)
    for keep in KEEPS if name in BLIND else FEW_KEEPS[rank_multiple]:
        budget = _budget(modules, keep, rank_multiple)
        _check(_allocate(name, modules, budget, context), modules, budget)


@pytest.mark.parametrize(("name", "layout"), [(n, layout) for n in NAMES for layout in ALLOCATORS.load(n).layouts])
def test_excluded_layers_stay_dense_and_every_layer_keeps_its_floor(problems: Problems, name: str, layout: str) -> None:
    modules, context = problems.of(name, MODELS["gqa"])
    if layout == "pivoted":
        modules = _pivoted(modules)
    dense = frozenset(modules[i].spec.name for i in (3, 6, 10))
    budget = Budget.for_keep(_specs(modules), 0.7, rank_multiple=2, min_keep=0.45, dense=dense)
    allocation = _allocate(name, modules, budget, context)
    _check(allocation, modules, budget)
    assert {layer for layer, rank in allocation.ranks.items() if rank is None} >= dense
    assert any(rank is not None for rank in allocation.ranks.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank_multiple", [1, 8])
def test_a_budget_in_bytes_is_met_by_the_ranks_of_as_many_parameters(
    problems: Problems, name: str, rank_multiple: int
) -> None:
    modules, context = problems.of(name, MODELS["gqa"])
    budget = _budget(modules, 0.6, rank_multiple)
    each = modules[0].spec.bits // 8
    in_bytes = replace(budget, limit=each * budget.limit, unit="bytes")
    wanted, found = (_allocate(name, modules, limit, context) for limit in (budget, in_bytes))
    assert found.ranks == wanted.ranks
    assert {n: choice.cost for n, choice in found.choices.items()} == {
        n: each * choice.cost for n, choice in wanted.choices.items()
    }
    assert all(choice.bits == modules[0].spec.bits for choice in found.choices.values())


@pytest.mark.parametrize("name", [name for name in NAMES if "latency" in ALLOCATORS.load(name).objectives])
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_a_budget_of_time_is_met_and_layers_stay_dense_where_ranks_are_slower(
    problems: Problems, name: str, layout: LayoutName
) -> None:
    modules, context = problems.of(name, MODELS["gqa"])
    modules = _pivoted(modules) if layout == "pivoted" else modules
    specs = _specs(modules)
    slow = specs[3].m, specs[3].n
    times = {}
    for spec in specs:
        fee = 10**7 if (spec.m, spec.n) == slow else 300  # of two products instead of one
        ranks = {k: 7 * _cost(spec, k) + fee for k in range(1, spec.top_rank + 1)}
        times[spec.m, spec.n] = ShapeTimes(7 * _cost(spec, None), ranks)
    budget = Budget.for_keep(specs, 0.8, times=TimeTable(times))
    allocation = _allocate(name, modules, budget, context)
    spent = sum(times[spec.m, spec.n].at(allocation.ranks[spec.name]) for spec in specs)
    assert 0.9 * budget.limit < spent == allocation.cost <= budget.limit
    assert all(allocation.ranks[spec.name] is None for spec in specs if (spec.m, spec.n) == slow)
    assert any(rank is not None for rank in allocation.ranks.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_method_that_chooses_ranks_alone_refuses_several_bit_widths(problems: Problems, name: str) -> None:
    modules, context = problems.of(name, MODELS["one"])
    with pytest.raises(ValueError, match="chooses ranks alone, the budget offers 2 bit widths"):
        _allocate(name, modules, Budget(10**6, unit="bytes", bits=(4, 8)), context)


_SHAPE = st.tuples(st.integers(1, 90), st.integers(1, 90))
_any_problem = given(
    shapes=st.lists(_SHAPE, min_size=1, max_size=9),
    keep=st.floats(0.01, 1.0),
    rank_multiple=st.sampled_from([1, 1, 2, 3, 8, 16, 100]),
    min_rank=st.sampled_from([1, 1, 2, 7, 40, 1000]),
    seed=st.integers(0, 1000),
)
_smallest = example(shapes=[(1, 1), (90, 90)], keep=0.01, rank_multiple=1, min_rank=1, seed=0)


@pytest.mark.parametrize("name", BLIND)
@settings(max_examples=60, deadline=None, derandomize=True)
@_any_problem
@_smallest
def test_the_budget_is_met_for_any_shapes(
    problems: Problems, name: str, shapes: list[tuple[int, int]], **asked
) -> None:
    _meets_any_budget(problems, name, shapes, **asked)


@pytest.mark.parametrize("name", LOOKING)
@settings(max_examples=8, deadline=None, derandomize=True)
@_any_problem
@_smallest
def test_the_budget_is_met_for_models_of_any_shapes(
    problems: Problems, name: str, shapes: list[tuple[int, int]], **asked
) -> None:
    _meets_any_budget(problems, name, shapes, **asked)


def _meets_any_budget(
    problems: Problems,
    name: str,
    shapes: list[tuple[int, int]],
    keep: float,
    rank_multiple: int,
    min_rank: int,
    seed: int,
) -> None:
    modules, context = problems.of(name, shapes, seed)
    budget = _budget(modules, keep, rank_multiple, min_rank)
    _check(_allocate(name, modules, budget, context), modules, budget)


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
        assert Budget.for_keep(specs, suggested, rank_multiple, min_rank).limit >= least
    else:
        assert least <= budget.limit <= keep * dense + 1e-6


def test_an_impossible_budget_is_refused() -> None:
    modules = _modules(GQA)
    with pytest.raises(UsageError, match=r"keep 0\.1 allows .*at least 1, multiples of 16") as caught:
        Budget.for_keep(_specs(modules), 0.1, rank_multiple=16)
    assert caught.value.exit_code == 2
    assert "--min-rank" in (caught.value.hint or "")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rank_multiple", [1, 8])
def test_keep_1_leaves_everything_dense(problems: Problems, name: str, model: str, rank_multiple: int) -> None:
    modules, context = problems.of(name, MODELS[model])
    budget = Budget.for_keep(_specs(modules), 1.0, rank_multiple)
    allocation = _allocate(name, modules, budget, context)
    assert set(allocation.ranks.values()) == {None}
    assert allocation.keep(_specs(modules)) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank_multiple", [1, 8])
def test_more_keep_never_costs_less(problems: Problems, name: str, rank_multiple: int) -> None:
    modules, context = problems.of(name, MODELS["all"])
    specs = _specs(modules)
    # One step of the dearest layer apart: closer budgets may be met more or less snugly.
    apart = rank_multiple * max((spec.m + spec.n) for spec in specs) / sum(spec.dense_cost for spec in specs)
    keeps = [0.2 + apart * i for i in range(int(0.8 / apart) + 1)]
    assert len(keeps) > 15
    if name in LOOKING:
        keeps = keeps[:: len(keeps) // 5]
    costs = [_allocate(name, modules, _budget(modules, k, rank_multiple), context).parameters(specs) for k in keeps]
    assert costs == sorted(costs) and costs[0] < costs[-1]


@pytest.mark.parametrize("name", NAMES)
def test_same_input_same_ranks(problems: Problems, name: str) -> None:
    modules, context = problems.of(name, MODELS["all"])
    budget = _budget(modules, 0.6)
    torch.manual_seed(1)
    first = _allocate(name, modules, budget, context)
    torch.manual_seed(2)
    again, context = problems.of(name, MODELS["all"])
    assert _allocate(name, again, budget, context) == first


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_flat_and_empty_spectra_are_fine(problems: Problems, name: str, value: float) -> None:
    modules, context = problems.of(name, GQA)
    modules = [Module(module.spec, torch.full_like(module.spectrum, value)) for module in modules]
    for keep in (0.3, 0.8):
        budget = _budget(modules, keep)
        _check(_allocate(name, modules, budget, context), modules, budget)


@pytest.mark.parametrize("name", LOOKING)
def test_the_model_is_left_as_it_was(problems: Problems, name: str) -> None:
    modules, context = problems.of(name, GQA)
    assert context is not None
    before = context.model.scores(context.train).logits
    _allocate(name, modules, _budget(modules, 0.6), context)
    _is_dense(context, before)


@pytest.mark.parametrize("name", LOOKING)
def test_the_model_is_left_as_it_was_by_an_interruption(problems: Problems, name: str) -> None:
    modules, context = problems.of(name, GQA)
    assert context is not None
    before = context.model.scores(context.train).logits
    passes = 0

    def interrupt(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 2:
            raise _Interrupted

    # In the midst of the second pass: by then most methods have cut something.
    hook = context.model.layers[modules[-1].spec.name].register_forward_hook(interrupt)
    try:
        with pytest.raises(_Interrupted):
            _allocate(name, modules, _budget(modules, 0.6), context)
    finally:
        hook.remove()
    _is_dense(context, before)


class _Interrupted(Exception):
    pass


def _is_dense(context: TuningContext, logits: torch.Tensor) -> None:
    """Hold the model against the ``logits`` (w, t, v) that it gave for the training windows before."""
    assert all(layer.rank is None and not layer.soft for layer in context.model.layers.values())
    assert not any(parameter.requires_grad for parameter in context.model.model.parameters())
    assert torch.equal(context.model.scores(context.train).logits, logits)


@pytest.mark.parametrize("name", LOOKING)
def test_without_a_model_nothing_is_guessed(name: str) -> None:
    modules = _modules(GQA)
    with pytest.raises(AssertionError):
        _allocate(name, modules, _budget(modules, 0.6))


def test_fast_options_are_those_of_allocators_that_look_at_the_model() -> None:
    assert set(FAST) <= set(LOOKING)


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
