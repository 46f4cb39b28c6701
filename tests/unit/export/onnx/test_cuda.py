"""Graphs for CUDA have only nodes for which ONNX Runtime's CUDA provider has a kernel; no GPU is needed to tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from ara.layouts.grid import Grid
from ara.progress import SILENT
from export.config import ExportConfig
from export.onnx.architecture import read_decoder
from export.onnx.graph import build
from export.onnx.graph_options import GraphOptions
from export.onnx.stored_weights import Checkpoint
from export.onnx.writing import write_onnx
from tests.decoders import BASIC, DECODERS
from tests.kernels import NoKernel, require_kernels

LAYOUTS = [None, "factors", "pivoted"]
# Both bits, with and without zero points, and the shortest and longest block of ``ara quantise``.
GRIDS = [Grid(8, 16, False), Grid(8, 32, True), Grid(4, 32, True), Grid(4, 256, False)]
# Of three neighbouring layers one has 8 bits, one is not rounded, and one has 4 bits.
MIXED = (GRIDS[0], None, GRIDS[2])
MERGED = {"merge_shared_inputs": True, "last_logits": True}


def graph(made: Any, **options: Any) -> ir.Model:
    """Build the graph for CUDA, as :func:`for_cuda` does, without writing its weights."""
    settings = GraphOptions(**{"precision": "fp16", "activations": "fp16", "provider": "cuda", **options})
    return build(Checkpoint(made.folder), read_decoder(made.model.config), settings)


def for_cuda(made: Any, folder: Path, **settings: Any) -> ir.Model:
    """Export for CUDA. The config is resolved by hand, because ``resolve`` refuses CUDA where it is not installed."""
    config = ExportConfig(**{"execution_provider": "cuda", "precision": "fp16", "parity": False, **settings})
    folder.mkdir()
    write_onnx(Checkpoint(made.folder), folder, config, "0" * 64, SILENT)
    return ir.load(folder / "model.onnx")


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, layout) for family in BASIC for layout in LAYOUTS] + [(family, "factors") for family in DECODERS],
)
def test_every_node_has_a_kernel(family: str, layout: str | None, checkpoint: Callable[..., Any]) -> None:
    made = checkpoint(family, layout)
    for options in ({}, MERGED, {"precision": "int8"}):
        require_kernels(graph(made, **options))


@pytest.mark.parametrize(
    ("family", "layout", "grid"),
    [(family, layout, GRIDS[2]) for family in BASIC for layout in LAYOUTS]
    + [("llama", layout, grid) for layout in LAYOUTS for grid in GRIDS if grid != GRIDS[2]],
    ids=str,
)
def test_every_node_of_few_bits_has_a_kernel(
    family: str, layout: str | None, grid: Grid, checkpoint: Callable[..., Any]
) -> None:
    made = checkpoint(family, layout, grid=grid)
    for options in ({}, MERGED, {"precision": "int8"}):
        model = graph(made, **options)
        require_kernels(model)
        assert any(node.op_type == "MatMulNBits" for node in model.graph)


@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
def test_every_node_of_an_embedding_of_few_bits_has_a_kernel(grid: Grid, checkpoint: Callable[..., Any]) -> None:
    model = graph(checkpoint("llama", None, embedding=grid, tie_word_embeddings=True))
    require_kernels(model)
    assert any(node.op_type == "GatherBlockQuantized" for node in model.graph)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_node_of_a_mixture_has_a_kernel(layout: str | None, checkpoint: Callable[..., Any]) -> None:
    """Matrices of 16, 8 and 4 bits and a rounded embedding in one graph, as ``ara allocate --size`` chooses them."""
    made = checkpoint("llama", layout, grid=MIXED, embedding=GRIDS[1], tie_word_embeddings=True)
    for options in ({}, MERGED):
        model = graph(made, **options)
        require_kernels(model)
        products = [node for node in model.graph if node.op_type == "MatMulNBits"]
        assert {node.attributes["bits"].value for node in products} == {4, 8}
        assert any(node.op_type in ("MatMul", "FusedMatMul") for node in model.graph)
        assert any(node.op_type == "GatherBlockQuantized" for node in model.graph)


@pytest.mark.parametrize("grid", [None, GRIDS[2]], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_node_of_an_int8_graph_with_exact_products_has_a_kernel(
    layout: str | None, grid: Grid | None, checkpoint: Callable[..., Any]
) -> None:
    """As :mod:`export.onnx.fallback` writes it: some matrices in 8 bits, others in 16 or as they are stored."""
    made = checkpoint("llama", layout) if grid is None else checkpoint("llama", layout, grid=grid)
    linears = [path for path, module in made.model.named_modules() if isinstance(module, torch.nn.Linear)]
    model = graph(made, precision="int8", exact=frozenset(linears[::2]))
    require_kernels(model)
    kinds = {node.op_type for node in model.graph}
    assert "MatMulNBits" in kinds and (grid is not None or kinds & {"MatMul", "FusedMatMul"})


@pytest.mark.parametrize(
    "changes",
    [{"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}, {"hidden_act": "gelu"}],
    ids=str,
)
def test_every_node_of_a_variant_has_a_kernel(changes: dict[str, Any], checkpoint: Callable[..., Any]) -> None:
    require_kernels(graph(checkpoint("llama", **changes)))


def test_every_node_of_an_export_has_a_kernel(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """The exported file has the nodes of the graphs above."""
    made = checkpoint("llama", "pivoted")
    written = for_cuda(made, tmp_path / "out")
    require_kernels(written)
    assert [node.op_type for node in written.graph] == [node.op_type for node in graph(made).graph]


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
def test_every_node_of_a_rewritten_graph_has_a_kernel(
    layout: str, checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    for_cuda(checkpoint("qwen2", None), tmp_path / "dense")
    dense = str(tmp_path / "dense" / "model.onnx")
    require_kernels(for_cuda(checkpoint("qwen2", layout), tmp_path / "out", rewrite=dense, precision=None))


# -- what has no kernel is found ----------------------------------------------------------------------------------


def test_attention_in_float32_has_none(checkpoint: Callable[..., Any]) -> None:
    """The combination that ``settings.resolve`` refuses."""
    with pytest.raises(NoKernel, match=r"self_attn/GroupQueryAttention: query is FLOAT, expected BFLOAT16 or FLOAT16"):
        require_kernels(graph(checkpoint("llama"), activations="fp32", precision="fp32"))


def _unknown(node: ir.Node) -> None:
    node.op_type = "Det"


def _other_indices(node: ir.Node) -> None:
    node.inputs[1].dtype = ir.DataType.INT16


def _mixed(node: ir.Node) -> None:
    node.inputs[1].dtype = ir.DataType.FLOAT


def _few_bits(node: ir.Node) -> None:
    node.attributes["bits"] = ir.AttrInt64("bits", 2)


def _complex(node: ir.Node) -> None:
    node.attributes["to"] = ir.AttrInt64("to", ir.DataType.COMPLEX64.value)


@pytest.mark.parametrize(
    ("kind", "spoil", "complaint"),
    [
        ("Sigmoid", _unknown, "Det is not in cuda_kernels.toml"),
        ("Slice", _other_indices, "starts is INT16, expected INT32 or INT64"),
        ("MatMul", _mixed, "B is FLOAT, expected FLOAT16"),
        ("MatMulNBits", _few_bits, "bits is 2, expected 4 or 8"),
        ("Cast", _complex, "to is COMPLEX64, expected BFLOAT16"),
    ],
)
def test_a_node_without_a_kernel_is_found(
    kind: str, spoil: Callable[[ir.Node], None], complaint: str, checkpoint: Callable[..., Any]
) -> None:
    model = graph(checkpoint("llama", grid=GRIDS[0]), **MERGED)
    require_kernels(model)
    spoil(next(node for node in model.graph if node.op_type == kind))
    with pytest.raises(NoKernel, match=complaint):
        require_kernels(model)


def test_an_operator_that_is_newer_than_its_kernel_is_found(checkpoint: Callable[..., Any]) -> None:
    model = graph(checkpoint("llama"))
    model.graph.opset_imports[""] = 24
    with pytest.raises(NoKernel, match=r"version 24 of Cast, expected 23\+ or 21-22"):
        require_kernels(model)
