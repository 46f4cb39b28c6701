"""The cost of rounding a matrix: against the KL divergence of a model in which that matrix is rounded, and ORT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from ara.layouts.grid import Grid
from ara.models.checkpoint import load
from ara.models.likelihood import divergence
from ara.quantisation.nearest import round_to_nearest
from ara.quantisation.storing import numbers_of
from export.onnx.few_bits import EIGHT_BITS
from export.onnx.nodes import CONTRIB, GraphNodes
from export.onnx.quantize import BITS, BLOCK, rounded
from export.onnx.rounding_cost import Eight, rounding_costs


def text(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(4, 250, (rows, tokens), generator=torch.Generator().manual_seed(1))


def linears(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def everywhere(model: nn.Module, inputs: int | None = BLOCK, *, weights: bool = True) -> dict[str, Eight]:
    return dict.fromkeys(linears(model), Eight(weights, inputs))


@torch.no_grad()
def kl_with(model: nn.Module, ids: torch.Tensor, what: dict[str, Eight]) -> float:
    """Return the mean KL when these modules compute as an int8 graph does."""
    expected = model(input_ids=ids, use_cache=False).logits[:, :-1]

    def eight(module: nn.Linear, args: Any, output: torch.Tensor, how: Eight) -> torch.Tensor:
        x = args[0].flatten(0, -2)
        x = x if how.inputs is None else rounded(x, BITS, how.inputs)
        y = x @ (rounded(module.weight, BITS) if how.weights else module.weight).T
        return y.view(output.shape) + (0 if module.bias is None else module.bias)

    hooks = [model.get_submodule(path).register_forward_hook(partial(eight, how=how)) for path, how in what.items()]
    ours = model(input_ids=ids, use_cache=False).logits[:, :-1]
    for hook in hooks:
        hook.remove()
    return float(divergence(expected.flatten(0, 1), ours.flatten(0, 1))[0].mean())


@pytest.mark.parametrize("how", [Eight(True, BLOCK), Eight(True, None), Eight(False, 32)], ids=str)
@pytest.mark.parametrize("layout", ["factors", "pivoted"])
def test_costs_are_the_divergence_of_rounding(layout: str, how: Eight, checkpoint: Callable[..., Any]) -> None:
    model, ids = load(checkpoint("llama", layout).folder, "cpu", "float32"), text(24, 60)
    what = everywhere(model, how.inputs, weights=how.weights)
    costs = rounding_costs(model, ids, what)
    largest = sorted(costs, key=costs.__getitem__)[-3:]
    for path in [*largest, "lm_head", "model.layers.0.self_attn.v_proj.A"]:
        assert costs[path] == pytest.approx(kl_with(model, ids, {path: how}), rel=0.5), path
    assert sum(costs.values()) == pytest.approx(kl_with(model, ids, what), rel=0.35)


def test_asked_for_matrices_get_a_cost_and_always_the_same(checkpoint: Callable[..., Any]) -> None:
    model, ids = load(checkpoint("llama", "pivoted").folder, "cpu", "float32"), text(2, 20)
    costs = rounding_costs(model, ids, everywhere(model))
    assert set(costs) == set(linears(model)) and "lm_head" in costs and min(costs.values()) > 0
    assert rounding_costs(model, ids, everywhere(model)) == costs
    some = ["lm_head", "model.layers.1.self_attn.k_proj.A"]
    assert rounding_costs(model, ids, dict.fromkeys(some, Eight(True, BLOCK))) == {path: costs[path] for path in some}


def test_a_matrix_that_rounding_leaves_as_it_is_costs_nothing(checkpoint: Callable[..., Any]) -> None:
    model = load(checkpoint("llama", "factors").folder, "cpu", "float32")
    path = "model.layers.1.mlp.down_proj.B"
    module = model.get_submodule(path)
    assert isinstance(module, nn.Linear)
    with torch.no_grad():
        module.weight.copy_(torch.randint(-127, 128, module.weight.shape).float())
        module.weight[:, ::BLOCK] = 127
    costs = rounding_costs(model, text(2, 20), everywhere(model, None))
    assert costs.pop(path) == pytest.approx(0, abs=1e-12) and min(costs.values()) > 0


@pytest.mark.parametrize(("m", "n"), [(40, 64), (33, 50), (9, 300)])
@pytest.mark.parametrize(
    "grid", [Grid(8, 16, False), Grid(8, 32, True), Grid(8, 128, True), Grid(4, 32, True)], ids=str
)
def test_onnx_runtime_rounds_inputs_as_the_estimate_does(m: int, n: int, grid: Grid) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, n, generator=generator), torch.randn(m, n, generator=generator)
    matrix = round_to_nearest(weight, grid)
    nodes = GraphNodes()
    attributes = {"K": n, "N": m, "bits": grid.bits, "block_size": grid.block, "accuracy_level": EIGHT_BITS}
    stored = {name: tensor.flatten() for name, tensor in numbers_of(matrix).items()}
    stored["steps"] = stored["steps"].view(m, grid.blocks(n), -1)
    stored["scales"] = stored["scales"].float()
    numbers = [nodes.constant(name, tensor.numpy()) for name, tensor in stored.items()]
    y = nodes.op(
        "MatMulNBits", [nodes.input("x", ir.DataType.FLOAT, ["t", n]), *numbers], "y", attributes, domain=CONTRIB
    )
    y.dtype, y.shape = ir.DataType.FLOAT, ir.Shape(["t", m])
    nodes.graph.outputs.append(y)
    proto = ir.to_proto(ir.Model(nodes.graph, ir_version=10)).SerializeToString()
    (found,) = ort.InferenceSession(proto, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    ours = rounded(x, BITS, grid.block) @ matrix.weight().T
    off = np.abs(found - ours.numpy()).max()
    assert off < 0.1 * float((ours - x @ matrix.weight().T).abs().max())
