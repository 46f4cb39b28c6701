"""Pivots in blocks: the same matrix, whole blocks in the order, coefficients that stay small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ara.layouts.pivoted import pivot
from ara.progress import SILENT
from export.config import ExportConfig
from export.onnx.export_report import Provider
from export.onnx.pivots import BLOCK, BlockPivots, choose_blocks, in_blocks, ordering
from export.onnx.settings import resolve
from export.onnx.stored_weights import Checkpoint
from export.onnx.writing import write_onnx


def _matrix(a: torch.Tensor, c: torch.Tensor, order: torch.Tensor, size: int = 1) -> torch.Tensor:
    rows = torch.cat([a, c @ a])
    return rows.view(-1, size, rows.shape[1])[order.long()].flatten(0, 1)


def _random(m: int, n: int, k: int) -> Any:
    generator = torch.Generator().manual_seed(m + k)
    b = torch.randn(m, k, dtype=torch.float64, generator=generator)
    return pivot(torch.randn(k, n, dtype=torch.float64, generator=generator), b)


@pytest.mark.parametrize(
    ("m", "n", "k", "size"), [(96, 40, 32, 16), (96, 40, 37, 16), (48, 40, 1, 16), (64, 90, 55, 8), (384, 100, 208, 16)]
)
def test_it_is_the_same_matrix(m: int, n: int, k: int, size: int) -> None:
    made = _random(m, n, k)
    a, c, order = in_blocks(made.a, made.c, made.order, size)
    pivots = -(-k // size) * size
    assert a.shape == (pivots, n) and c.shape == (m - pivots, pivots) and order.shape == (m // size,)
    assert sorted(order.tolist()) == list(range(m // size))
    expected = _matrix(made.a, made.c, made.order)
    found = _matrix(a.double(), c.double(), order, size)
    assert (found - expected).norm() < 1e-6 * expected.norm()
    # Where there are more pivots than the rank, each is still a row of the matrix.
    blocks = expected.view(m // size, size, n)
    torch.testing.assert_close(
        a.double().view(-1, size, n)[0], blocks[int((order == 0).nonzero())], rtol=1e-5, atol=1e-5
    )


def test_coefficients_stay_small() -> None:
    """Blocks that are taken as they come do not come near that."""
    made, careless = _random(384, 100, 192), []
    _, c, _ = in_blocks(made.a, made.c, made.order)
    b = _matrix(torch.eye(192, dtype=torch.float64), made.c, made.order).view(24, 16, 192)
    for seed in range(4):
        mixed = b[torch.randperm(24, generator=torch.Generator().manual_seed(seed))].flatten(0, 1)
        careless.append(float(torch.linalg.solve(mixed[:192], mixed[192:], left=False).norm()))
    assert float(c.norm()) < min(careless) and float(c.norm()) < sum(careless) / 20


def test_blocks_that_add_nothing_are_not_chosen() -> None:
    b = torch.zeros(64, 20)
    b[16:32] = torch.randn(16, 20, generator=torch.Generator().manual_seed(0))
    b[48:52, 16:] = torch.eye(4)
    assert sorted(choose_blocks(b, 16)) == [1, 3]


def test_layers_that_are_no_whole_blocks_stay(checkpoint: Callable[..., Any]) -> None:
    made = checkpoint("llama", "pivoted")
    blocked, plain = BlockPivots(Checkpoint(made.folder)), Checkpoint(made.folder)
    hidden, kinds = made.model.config.hidden_size, set()
    for name, rank in plain.ranks.items():
        m, n = made.model.get_submodule(name).weight.shape
        layer = blocked.linear(name, m, n)
        assert layer.rank is not None and layer.block in (1, BLOCK)
        if m == hidden:  # 102
            assert layer == plain.linear(name, m, n)
            assert torch.equal(blocked.tensor(f"{name}.A.weight"), plain.tensor(f"{name}.A.weight"))
        kinds.add(layer.block)
        if layer.block == BLOCK:
            assert rank <= layer.rank < rank + BLOCK
            parts = [blocked.tensor(f"{name}.{part}") for part in ("A.weight", "C.weight", "order")]
            assert [tuple(part.shape) for part in parts] == [
                blocked.shape(f"{name}.{part}") for part in ("A.weight", "C.weight", "order")
            ]
            expected = made.model.get_submodule(name).weight
            torch.testing.assert_close(_matrix(*parts, BLOCK), expected, rtol=0, atol=1e-5)
    assert kinds == {1, BLOCK}


@pytest.mark.parametrize(("precision", "axis"), [("fp32", 2), ("int8", 0), ("fp16", 0)])
def test_only_float32_graphs_have_them(
    precision: str, axis: int, checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    config = resolve(ExportConfig(execution_provider="cpu", precision=precision, parity=False))
    write_onnx(Checkpoint(checkpoint("llama", "pivoted").folder), tmp_path, config, "0" * 64, SILENT)
    graph = ir.load(tmp_path / "model.onnx").graph
    (node,) = [node for node in graph if node.name == "model.layers.1.self_attn.q_proj.ordered/Gather"]
    assert node.attributes.get_int("axis") == axis


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
@pytest.mark.parametrize("shape", [(5, 12), (2, 5, 12)])
def test_ordering_is_indexing_the_last_axis(provider: Provider, shape: tuple[int, ...]) -> None:
    order, x = np.random.default_rng(0).permutation(12), np.random.default_rng(1).normal(size=shape).astype(np.float32)
    assert np.array_equal(_run(ordering(len(shape), provider), x, order), x[..., order])


def test_what_has_an_unknown_number_of_axes_is_gathered() -> None:
    assert [step[0] for step in ordering(None, "cpu")] == ["Gather"]
    assert [step[0] for step in ordering(3, "cpu")] == ["Transpose", "Gather", "Transpose"]
    assert [step[0] for step in ordering(3, "cuda")] == ["Gather"]


def _run(steps: list[tuple[str, str, dict[str, Any]]], x: np.ndarray, order: np.ndarray) -> np.ndarray:
    nodes, names = [], ["x"]
    for kind, name, attributes in steps:
        inputs = [names[-1], "order"] if kind == "Gather" else [names[-1]]
        nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        names.append(name)
    graph = helper.make_graph(
        nodes,
        "ordering",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, x.shape)],
        [numpy_helper.from_array(order.astype(np.int32), "order")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    found: np.ndarray = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    return found
