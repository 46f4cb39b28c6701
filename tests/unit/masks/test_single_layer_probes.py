"""Probes of single layers against whole forward passes, and what they leave behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ara.decomposition.subspace import weighted_factors
from ara.errors import NumericalError
from ara.masks.context import TuningContext
from ara.masks.model import MaskedModel
from ara.masks.single_layer_probes import ProbeOptions, probe, probe_choices
from ara.models.weights import LinearSpec, find_blocks, find_linears
from ara.progress import SilentReporter
from ara.solver.problem import Budget
from tests.recorder import Recorder
from tests.tiny import FAMILIES, VOCABULARY, gemma_with_shared_keys, tiny_model
from tests.toy import LAYERS_PER_BLOCK, ToyModel, toy_problem

SHAPES = [(31, 20), (20, 31), (13, 45), (27, 27), (20, 20), (45, 13), (33, 21), (31, 31), (9, 40), (25, 14)]


@pytest.fixture
def context(tmp_path: Path) -> TuningContext:
    return toy_problem(tmp_path, SHAPES)[1]


def _some_ranks(model: MaskedModel) -> dict[str, list[int]]:
    return {spec.name: [1, spec.full_rank // 3] for spec in model.specs}


def _by_whole_passes(model: MaskedModel, windows: torch.Tensor, ranks: dict[str, list[int]], measure: str) -> dict:
    model.use_dense()
    teacher = model.scores(windows)
    losses: dict[str, list[float]] = {}
    for name, wanted in ranks.items():
        for rank in wanted:
            model.use_dense()
            model.use({name: rank})
            values = model.nll(windows) if measure == "nll" else model.kl(windows, teacher)
            losses.setdefault(name, []).append(values.mean().item())
    model.use_dense()
    return losses


def _masked(model: torch.nn.Module, folder: Path) -> MaskedModel:
    specs, tensors = find_linears(model), {}
    for spec in specs:
        weight = model.get_submodule(spec.name).weight.detach()
        factors = weighted_factors((weight if weight.shape == (spec.m, spec.n) else weight.T).double(), None)
        tensors |= {f"{spec.name}.A": factors.a.float(), f"{spec.name}.B": factors.b.float()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "all.safetensors")
    return MaskedModel(model, specs, {spec.name: folder / "all.safetensors" for spec in specs})


@pytest.mark.parametrize("measure", ["kl", "nll"])
def test_probes_are_those_of_whole_passes(context: TuningContext, measure: str) -> None:
    ranks = _some_ranks(context.model)
    expected = _by_whole_passes(context.model, context.train, ranks, measure)
    assert probe(context.model, context.train, ranks, measure) == expected
    if measure == "kl":
        assert min(values[0] for values in expected.values()) > 1e-3, "a cut that changes nothing shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_are_those_of_whole_passes_in_every_family(family: str, tmp_path: Path) -> None:
    model = _masked(tiny_model(family), tmp_path)
    windows = torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))
    ranks = {spec.name: [spec.full_rank // 3] for spec in model.specs}
    assert probe(model, windows, ranks, "kl") == _by_whole_passes(model, windows, ranks, "kl")


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
@pytest.mark.parametrize("measure", ["kl", "nll"])
def test_blocks_that_reuse_keys_and_values_of_earlier_ones_are_probed_by_whole_passes(
    kind: str, measure: str, tmp_path: Path
) -> None:
    model = _masked(gemma_with_shared_keys(kind), tmp_path)
    windows = torch.randint(50, (2, 11), generator=torch.Generator().manual_seed(0))
    # A layer of every block, not all of each: these families have many.
    ranks = {spec.name: [spec.full_rank // 3] for spec in model.specs if spec.kind.endswith(("q_proj", "down_proj"))}
    recorder = Recorder()
    assert probe(model, windows, ranks, measure, recorder) == _by_whole_passes(model, windows, ranks, measure)
    (said,) = recorder.facts
    assert said.startswith("3 of 4 blocks were probed by passes through the whole model")


class _Tuples(ToyModel):
    """Its blocks return tuples, and each has a forward of its own, as accelerate's hooks give it one."""

    def __init__(self) -> None:
        super().__init__(SHAPES)
        for block in self.blocks:
            block.forward = self._in_a_tuple(block.forward)

    @staticmethod
    def _in_a_tuple(forward: Any) -> Any:
        return lambda x: (forward(x), None)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        x = self.embedding[input_ids]
        for block in self.blocks:
            x = block(x)[0]
        return SimpleNamespace(logits=x @ self.head.T)


def test_blocks_may_return_tuples(tmp_path: Path) -> None:
    model = _masked(_Tuples().eval(), tmp_path)
    own = [vars(block)["forward"] for block in model.model.blocks]
    windows = torch.randint(19, (3, 8), generator=torch.Generator().manual_seed(0))
    ranks = _some_ranks(model)
    assert probe(model, windows, ranks, "nll") == _by_whole_passes(model, windows, ranks, "nll")
    assert [vars(block)["forward"] for block in model.model.blocks] == own


def test_the_blocks_before_the_probed_layer_do_not_run(context: TuningContext) -> None:
    model = context.model
    _, blocks = find_blocks(model.model)
    assert len(blocks) == 3
    runs: Counter[int] = Counter()
    for index, block in enumerate(blocks):
        # Counted inside the block: what stands in for it never gets there.
        next(block.children()).register_forward_pre_hook(lambda *_, index=index: runs.update([index]))
    probe(model, context.train, {name: [1, 2, 3] for name in model.layers}, "kl")
    probes = [3 * sum(spec.layer == index for spec in model.specs) for index in range(3)]
    assert probes == [3 * LAYERS_PER_BLOCK, 3 * LAYERS_PER_BLOCK, 3 * 2]
    # Once for the dense model, then for the probes of a block itself and of those before it, each of which begins with
    # a look whether the blocks before may be left out.
    assert [runs[index] for index in range(3)] == [1 + index + sum(probes[: index + 1]) for index in range(3)]


class _Refusing(SilentReporter):
    """Stands for Ctrl-C in the second block."""

    def __init__(self) -> None:
        self.left = 2 * LAYERS_PER_BLOCK + 1

    @contextmanager
    def bar(self, label: str, total: float) -> Iterator[Any]:
        yield self

    def advance(self, amount: float = 1) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("interrupted", [False, True])
def test_nothing_is_left_behind(context: TuningContext, interrupted: bool) -> None:
    model = context.model
    before = model.scores(context.held_out).logits
    model.use(dict.fromkeys(model.layers, 3))
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            probe(model, context.train, _some_ranks(model), "kl", _Refusing())
    else:
        probe(model, context.train, _some_ranks(model), "kl")
    assert torch.equal(model.scores(context.held_out).logits, before), "dense, and every block runs again"
    for block in find_blocks(model.model)[1]:
        assert "forward" not in vars(block)
        assert not block._forward_hooks


def test_the_order_asked_for_is_kept(context: TuningContext) -> None:
    names = [spec.name for spec in reversed(context.model.specs)]
    losses = probe(context.model, context.train, {name: [2, 1] for name in names}, "nll")
    assert list(losses) == names
    rising = probe(context.model, context.train, {name: [1, 2] for name in names}, "nll")
    assert losses == {name: values[::-1] for name, values in rising.items()}


def test_layers_without_ranks_cost_nothing(context: TuningContext) -> None:
    last = context.model.specs[-1].name
    assert probe(context.model, context.train, {last: []}, "kl") == {last: []}


def test_a_loss_that_is_not_finite_is_an_error(context: TuningContext) -> None:
    name = context.model.specs[3].name
    context.model.layers[name].a = context.model.layers[name].a * torch.nan
    with pytest.raises(NumericalError, match=rf"with {name} at rank 2 the loss is nan"):
        probe(context.model, context.train, {name: [2]}, "nll")


@pytest.mark.parametrize(
    ("rank_multiple", "min_rank", "expected"),
    [
        (1, 1, [1, 7, 14, 21, 28]),  # i/5 of 84·60/(84 + 60) = 35, and at least 1
        (8, 1, [8, 16, 24]),  # 8 stands for 0, 7 and 14
        (1, 20, [20, 21, 28]),
        (100, 1, []),  # only dense
    ],
)
def test_probed_ranks_are_evenly_spaced_choices(
    tmp_path: Path, rank_multiple: int, min_rank: int, expected: list[int]
) -> None:
    modules, context = toy_problem(tmp_path, [(84, 60), (1, 1)])
    specs: list[LinearSpec] = [module.spec for module in modules]
    budget = Budget(10**6, rank_multiple, min_rank)
    first, second = probe_choices(context, specs, budget, ProbeOptions(ratios=5, windows=2), "kl")
    choices = budget.choices(specs[0])
    assert [choices[at].rank for at in first] == expected
    assert second == {}
    assert list(first.values()) == _by_whole_passes(
        context.model, context.train[:2], {specs[0].name: expected}, "kl"
    ).get(specs[0].name, [])
