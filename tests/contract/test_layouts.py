"""What every registered layout must do; a new file is tested by being registered."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ara import layouts
from ara.allocation.uniform import Uniform
from ara.decomposition.plain import Plain
from ara.errors import UsageError
from ara.layout_names import DEFAULT_LAYOUT, LAYOUT_NAMES
from ara.layouts import LAYOUTS, layout_named
from ara.layouts.base import Layout, Number
from ara.layouts.modeling_ara import CHECKPOINT_FORMAT, LAYERS, CompressedLinear
from ara.models.checkpoint import load, save_checkpoint
from ara.models.low_rank import apply_factors, low_rank_layers
from ara.models.weights import LinearSpec, find_linears
from ara.registry import Entry, Registry
from ara.solver.problem import Budget, Module
from export.onnx.low_rank import NODES
from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer

NAMES = LAYOUTS.names()
# m, n, k
SHAPES = [(1, 19, 1), (23, 1, 1), (37, 41, 1), (37, 41, 20), (41, 37, 36), (20, 60, 19), (60, 20, 20), (33, 33, 33)]


@pytest.fixture(params=NAMES)
def layout(request: pytest.FixtureRequest) -> Layout:
    return layout_named(request.param)


def factors(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return A (k, n), B (m, k) and a bias (m), float64."""
    generator = torch.Generator().manual_seed(100 * m + n)
    a, b, bias = (torch.randn(*shape, generator=generator).double() for shape in ((k, n), (m, k), (m,)))
    return a, b / k**0.5, bias


# -- the registry ---------------------------------------------------------------------------------------------------


def test_every_table_of_layouts_has_the_same_names() -> None:
    assert tuple(NAMES) == LAYOUT_NAMES == tuple(LAYERS)
    assert DEFAULT_LAYOUT in NAMES and set(NODES) == set(NAMES)
    for name in NAMES:
        assert layout_named(name).module is LAYERS[name]
        assert layout_named(name) is layout_named(name)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown layout 'factor': .*known are factors, pivoted"):
        layout_named("factor")


def test_names_are_listed_without_torch() -> None:
    code = "import sys; from ara.layouts import LAYOUTS; print(*LAYOUTS.names()); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == NAMES


def test_the_formats_of_checkpoints_begin_at_one(layout: Layout) -> None:
    assert 1 <= layout.module.since <= CHECKPOINT_FORMAT


# -- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_a_rank_costs_the_parameters_of_its_layer(layout: Layout, m: int, n: int, k: int) -> None:
    a, b, _ = factors(m, n, k)
    layer = layout.build(a, b)
    assert (layer.in_features, layer.out_features, layer.rank) == (n, m, k)
    assert layout.cost(m, n, k) == sum(parameter.numel() for parameter in layer.parameters())


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 19), (2, 2), (3, 2), (37, 41), (84, 60), (60, 84)])
def test_each_rank_costs_more_and_the_top_rank_is_the_last_below_dense(layout: Layout, m: int, n: int) -> None:
    costs = [layout.cost(m, n, k) for k in range(min(m, n) + 1)]
    assert costs[0] == 0 and costs == sorted(set(costs))
    assert layout.top_rank(m, n) == sum(cost < m * n for cost in costs[1:])
    ranks = torch.arange(min(m, n) + 1, dtype=torch.float64)
    assert layout.cost(m, n, ranks).tolist() == costs
    assert layout.cost(m, n, 0.5) == float(layout.cost(m, n, torch.tensor(0.5)))


# -- build, store, multiply -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_what_is_stored_are_the_tensors_of_the_layer(layout: Layout, m: int, n: int, k: int, has_bias: bool) -> None:
    a, b, bias = factors(m, n, k)
    layer = layout.build(a, b, bias if has_bias else None)
    stored = layout.store(m, n, k)
    assert set(layout.indices) < set(stored) and layout.bias not in stored
    expected = {**stored, layout.bias: (m,)} if has_bias else stored
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == expected
    assert {name for name, tensor in layer.state_dict().items() if not tensor.is_floating_point()} == {*layout.indices}
    assert layer.problem() is None and not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_stored_tensors_give_factors_of_the_same_matrix_back(layout: Layout, m: int, n: int, k: int) -> None:
    a, b, _ = factors(m, n, k)
    down, up = layout.join(layout.split(a, b))
    assert down.shape == (k, n) and up.shape == (m, k) and down.dtype == torch.float64
    torch.testing.assert_close(up @ down, b @ a)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_a_layer_multiplies_by_the_product_of_its_factors(layout: Layout, m: int, n: int, k: int) -> None:
    a, b, bias = factors(m, n, k)
    x = torch.randn(2, 7, n, generator=torch.Generator().manual_seed(0)).double()
    layer = layout.build(a, b, bias, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ (b @ a).T + bias)
    torch.testing.assert_close(layer.weight, b @ a)
    assert layer.bias is not None and torch.equal(layer.bias, bias)
    assert layout.build(a, b).bias is None
    assert f"rank={k}" in repr(layer)


@pytest.mark.parametrize(("m", "n"), [(37, 41), (41, 37), (33, 33), (1, 19), (23, 1)])
def test_full_rank_reproduces_the_layer(layout: Layout, m: int, n: int) -> None:
    linear = nn.Linear(n, m).double()
    made = Plain().decompose(linear.weight.detach(), None)
    assert linear.bias is not None
    layer = layout.build(made.a, made.b, linear.bias.detach(), dtype=torch.float64)
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), linear(x))


def test_stored_tensors_are_held_without_a_copy_and_multiplied_in_the_dtype_asked_for(layout: Layout) -> None:
    a, b, bias = factors(23, 31, 5)
    tensors = {**layout.build(a, b, dtype=torch.bfloat16).state_dict(), layout.bias: bias.bfloat16()}
    layer = layout.hold(tensors, 23)
    assert all(tensor.data_ptr() == tensors[name].data_ptr() for name, tensor in layer.state_dict().items())
    for dtype, off in ((torch.float64, 0.02), (torch.bfloat16, 0.03)):
        product = layout.multiply(tensors, 23, dtype)
        assert product.dtype == dtype
        torch.testing.assert_close(product, layer.product(dtype), rtol=0, atol=0)
        assert (product.double() - b @ a).norm() < off * (b @ a).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_rounded_to_the_dtype_once(layout: Layout, dtype: torch.dtype) -> None:
    a, b, _ = factors(23, 31, 5)
    exact = layout.split(a, b)
    for name, tensor in layout.build(a, b, dtype=dtype).state_dict().items():
        assert tensor.is_contiguous()
        assert torch.equal(tensor, exact[name] if name in layout.indices else exact[name].to(dtype))


# -- checkpoints ----------------------------------------------------------------------------------------------------


def factor_file(model: PreTrainedModel, linears: list[LinearSpec], path: Path) -> dict[str, Path]:
    tensors = {}
    for spec in linears:
        made = Plain().decompose(spec.weight.read(model), None)
        tensors[f"{spec.name}.A"] = made.a.float().contiguous()
        tensors[f"{spec.name}.B"] = made.b.float().contiguous()
    save_file(tensors, path)
    return {spec.name: path for spec in linears}


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(4, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def round_trip(name: str, family: str, root: Path) -> None:
    """Build the layers of a model, store them, load them, and compare names, shapes and logits."""
    model = tiny_model(family)
    linears = find_linears(model)
    ranks = {spec.name: spec.full_rank // 2 - spec.layer for spec in linears[1:]}
    apply_factors(model, ranks, factor_file(model, linears, root / "factors.safetensors"), name)  # type: ignore[arg-type]
    folder = root / "checkpoint"
    save_checkpoint(model, tiny_tokenizer(), folder, ranks=ranks, provenance={}, layout=name)  # type: ignore[arg-type]
    stored = {key: tuple(tensor.shape) for key, tensor in load_file(folder / "model.safetensors").items()}
    for spec in linears[1:]:
        for part, shape in layout_named(name).store(spec.m, spec.n, ranks[spec.name]).items():
            assert stored[f"{spec.name}.{part}"] == shape
    loaded = load(folder, device="cpu")
    assert low_rank_layers(loaded) == ranks
    assert torch.equal(logits(loaded), logits(model))


# With and without biases; GPT-2's layers are transposed.
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_gives_the_same_model_back(name: str, family: str, tmp_path: Path) -> None:
    round_trip(name, family, tmp_path)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_pieces_of_processes_add_up(layout: Layout, m: int, n: int, k: int) -> None:
    a, b, _ = factors(m, n, k)
    check_pieces(layout, a, b)


def check_pieces(layout: Layout, a: torch.Tensor, b: torch.Tensor) -> None:
    """Cut a layer into two pieces along outputs and inputs, and compare the sums of their outputs with those of B A."""
    (m, n), tensors = (len(b), a.shape[1]), layout.split(a, b)
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(1)).double()
    outputs = []
    # A process may hold several ranges of outputs.
    for rows in ([slice(0, m // 3), slice(2 * m // 3, m)], [slice(m // 3, 2 * m // 3)]):
        total = torch.zeros(3, sum(span.stop - span.start for span in rows)).double()
        for columns in (slice(0, n // 2), slice(n // 2, n)):
            piece = layout.cut(tensors, rows, columns)
            h = x[:, columns] @ piece.first.T
            found = torch.cat(
                [*([h] if piece.kept else []), *([] if piece.second is None else [h @ piece.second.T])], -1
            )
            total += found if piece.order is None else found[:, piece.order]
        outputs.append(total)
    expected = x @ (b @ a).T
    expected = [torch.cat([expected[:, : m // 3], expected[:, 2 * m // 3 :]], -1), expected[:, m // 3 : 2 * m // 3]]
    for found, one in zip(outputs, expected, strict=True):
        torch.testing.assert_close(found, one)


# -- a layout of a test's own ---------------------------------------------------------------------------------------


class ScaledLinear(CompressedLinear):
    """y = B (s ∘ (A x)) + bias, with a scale s (k)."""

    since = 1

    def _grow(self, out_features: int, rank: int, bias: bool, device: torch.device, dtype: torch.dtype | None) -> None:
        self.scale = nn.Parameter(torch.ones(rank, device=device, dtype=dtype))
        self.B = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @property
    def out_features(self) -> int:
        return self.B.out_features

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        return self.B.bias

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.B.weight.to(dtype) * self.scale.to(dtype)) @ self.A.weight.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.B(self.A(x) * self.scale)
        return found


class ScaledLayout(Layout):
    """Rows of A of length one, and their lengths beside them."""

    module = ScaledLinear
    bias = "B.bias"

    def cost(self, m: int, n: int, k: Number) -> Number:
        return k * (m + n + 1)

    def store(self, m: int, n: int, k: int) -> dict[str, tuple[int, ...]]:
        return {"A.weight": (k, n), "B.weight": (m, k), "scale": (k,)}

    def split(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        lengths = a.norm(dim=1)
        return {"A.weight": a / lengths[:, None], "B.weight": b, "scale": lengths}

    def join(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return tensors["A.weight"] * tensors["scale"][:, None], tensors["B.weight"]


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Register a layout, and return its name."""
    entry = Entry("scaled", "rows of length one, and their lengths", f"{__name__}:ScaledLayout")
    monkeypatch.setattr(layouts, "LAYOUTS", Registry("layout", [*LAYOUTS, entry]))
    monkeypatch.setitem(LAYERS, "scaled", ScaledLinear)
    yield "scaled"
    layout_named.cache_clear()


def test_a_new_layout_needs_nothing_but_its_class_and_its_lines_in_the_tables(scaled: str, tmp_path: Path) -> None:
    specs = [LinearSpec(f"b.{i}", i, "l", m, n, scaled) for i, (m, n) in enumerate([(37, 41), (60, 20)])]  # type: ignore[arg-type]
    assert [spec.cost(3) for spec in specs] == [3 * 79, 3 * 81]
    assert [spec.top_rank for spec in specs] == [19, 14]
    modules = [Module(spec, torch.linspace(1, 0.1, spec.full_rank, dtype=torch.float64)) for spec in specs]
    budget = Budget.for_keep(specs, 0.5)
    allocation = Uniform().allocate(modules, budget)
    assert budget.limit - 79 < allocation.cost <= budget.limit
    for spec in specs:
        a, b, _ = factors(spec.m, spec.n, allocation.low_rank()[spec.name])
        layer = layout_named(scaled).build(a, b, dtype=torch.float64)
        torch.testing.assert_close(layer.weight, b @ a)
        check_pieces(layout_named(scaled), a, b)
        assert sum(parameter.numel() for parameter in layer.parameters()) == spec.cost(layer.rank)
    round_trip(scaled, "qwen2", tmp_path)
