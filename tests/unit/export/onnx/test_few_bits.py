"""Matrices of few bits in a graph: which form their products have, and what ONNX Runtime makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from ara.layouts.grid import Grid
from export.onnx.architecture import read_decoder
from export.onnx.few_bits import count_expanded
from export.onnx.graph import build
from export.onnx.graph_options import GraphOptions
from export.onnx.stored_weights import Checkpoint
from tests.exportable import exported

GRIDS = [Grid(8, 32, True), Grid(8, 16, False), Grid(4, 32, True)]


def products(made: Any, **options: Any) -> dict[str, tuple[str, int | None]]:
    """Return path → operator and ``accuracy_level`` of the products with matrices of few bits."""
    checkpoint = Checkpoint(made.folder)
    model = build(checkpoint, read_decoder(made.model.config), GraphOptions(**options))
    found = {}
    for node in model.graph:
        path, level = (node.name or "").rpartition("/")[0], node.attributes.get("accuracy_level")
        if node.op_type in ("MatMul", "FusedMatMul", "MatMulNBits") and path in checkpoint.rounded:
            found[path] = node.op_type, level.as_int() if level else None
    assert set(found) == set(checkpoint.rounded)
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_precision_has_its_form(grid: Grid, checkpoint: Callable[..., Any]) -> None:
    made = checkpoint("llama", "factors", grid=grid)
    exact = ("FusedMatMul", None) if grid.bits == 8 else ("MatMulNBits", 0)
    assert set(products(made).values()) == {exact}
    assert set(products(made, precision="fp16", activations="fp16").values()) == {exact}
    found = products(made, precision="int8")
    assert set(found.values()) == {("MatMulNBits", 4)}
    some = frozenset(list(found)[:3])
    mixed = products(made, precision="int8", exact=some)
    assert mixed == {**found, **dict.fromkeys(some, exact)}
    # On CUDA nothing is expanded: MatMulNBits has kernels that do not round inputs.
    for precision in ("fp16", "int8"):
        kinds = products(made, precision=precision, activations="fp16", provider="cuda").values()
        assert {kind for kind, _ in kinds} == {"MatMulNBits"}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
def test_onnx_runtime_expands_weights_when_it_loads_the_graph(
    grid: Grid, precision: str, checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """Otherwise every pass would compute them. Rows end in the middle of a block."""
    made = checkpoint("llama", "pivoted", grid=grid, embedding=grid, tie_word_embeddings=True)
    about = exported(made.folder, tmp_path / "out", precision=precision)
    rounded = Checkpoint(made.folder).rounded
    written = ir.load(tmp_path / "out" / "model.onnx")
    assert about["expanded"] == count_expanded(written) == len(rounded)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(str(tmp_path / "out" / "model.onnx"), options, providers=["CPUExecutionProvider"])
    optimised = ir.load(tmp_path / "optimised.onnx")
    assert count_expanded(optimised) == 0
    # Only the embedding, whose rows are looked up, still has its steps.
    left = [name for name in optimised.graph.initializers if name.endswith(".steps")]
    assert left == ["model.embed_tokens.steps"]


def test_expanded_weights_are_those_of_torch(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    made = checkpoint("llama", "factors", grid=GRIDS[0])
    exported(made.folder, tmp_path / "out", precision="fp32")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(str(tmp_path / "out" / "model.onnx"), options, providers=["CPUExecutionProvider"])
    source, found = Checkpoint(made.folder), 0
    for node in ir.load(tmp_path / "optimised.onnx").graph:
        path = (node.name or "").rpartition("/")[0]
        if node.op_type == "FusedMatMul" and path in source.rounded:
            assert node.inputs[1] is not None and node.inputs[1].const_value is not None
            weight = torch.tensor(node.inputs[1].const_value.numpy())
            layer = source.tensor(f"{path}.weight")[:, : weight.shape[1]]
            assert torch.equal(weight, layer)
            found += 1
    assert found == len(source.rounded)
