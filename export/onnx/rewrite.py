"""Puts the factors of a checkpoint into an ONNX graph of the dense model that another exporter wrote.

Each linear layer of the graph must be a MatMul or Gemm node with its own weight. Node or weight must be named after the
module, as exporters write it: ``/model/layers.0/mlp/up_proj/MatMul``. Everything else stays unchanged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ara.errors import AraError, ModelError, first_line
from ara.files import open_regular
from ara.layouts import layout_named
from export.onnx.export_report import Provider
from export.onnx.low_rank import NODES, LowRankGraph
from export.onnx.stored_weights import Checkpoint, LinearLayer

_FLOATS = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}
# Least cosine between the dense weight and the product of the factors. A truncated layer is far above it; the weight of
# another layer is near 0.
_LEAST_COSINE = 0.3
_DENSE = "name the .onnx file of a dense export"


def load_graph(path: Path) -> ir.Model:
    """Read a graph; its weights stay on the disk until they are needed.

    Raises:
        ModelError: not a file, not an ONNX graph, or its weights are missing or outside its folder.
    """
    try:
        open_regular(path).close()
        # Absolute, because weights are looked for in the folder of this path.
        model = ir.load(path.absolute())
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})", _DENSE) from None
    except Exception as error:  # protobuf's and onnx-ir's exceptions share no base class
        cause: BaseException = error
        while cause.__cause__ is not None:  # onnx-ir wraps the error once per level of the graph
            cause = cause.__cause__
        raise ModelError(f"{path} cannot be read as ONNX: {first_line(cause)}", _DENSE) from error
    with graph_errors(path):
        for tensor in _external(model):
            _check_external(tensor, path)
    return model


@contextmanager
def graph_errors(path: Path) -> Iterator[None]:
    """Turn the errors that onnx-ir and numpy raise over another exporter's graph into one that names its file.

    Raises:
        ModelError: instead of these errors.
    """
    try:
        yield
    except (AraError, OSError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"{path} cannot be rewritten: {type(error).__name__}: {first_line(error)}",
            "the graph may be damaged: export the dense model again, or leave --rewrite out",
        ) from error


def _external(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Yield every tensor that lies in another file: initialisers and attributes, also of subgraphs and functions."""
    bodies = [model.graph, *model.functions.values()]
    while bodies:
        body = bodies.pop()
        tensors: list[Any] = [value.const_value for value in getattr(body, "initializers", {}).values()]
        for attribute in (attribute for node in body for attribute in node.attributes.values()):
            found = attribute.value if isinstance(attribute.value, list | tuple) else [attribute.value]
            tensors += found
            bodies += [value for value in found if isinstance(value, ir.Graph)]
        yield from (tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor))


def _check_external(tensor: ir.ExternalTensor, path: Path) -> None:
    """Check that a tensor is completely inside a file of the graph's folder, as ONNX requires. The file is not read."""
    folder, location = path.parent.resolve(), Path(tensor.location)
    file = (folder / location).resolve()
    if location.is_absolute() or ".." in location.parts or not file.is_relative_to(folder):
        raise ModelError(
            f"{path} takes the weight {tensor.name} from {str(location)!r}, outside its folder",
            "do not use it: weights belong in the folder of their graph",
        )
    try:
        with open_regular(file) as opened:
            size = os.fstat(opened.fileno()).st_size
    except OSError as error:
        raise ModelError(f"{file}, the weights of {path}, cannot be read ({error.strerror})", _DENSE) from None
    end = (tensor.offset or 0) + tensor.nbytes
    if end > size:
        raise ModelError(
            f"{file} has {size:,} bytes, {tensor.name} of {path} would end at {end:,}", "copy the file again"
        )


def rewrite(
    model: ir.Model, checkpoint: Checkpoint, provider: Provider = "cpu", advance: Callable[[], None] = lambda: None
) -> list[str]:
    """Replace the dense linear layers of ``model`` by the checkpoint's low-rank ones, in place.

    Args:
        model: a graph of the dense model.
        checkpoint: compressed.
        provider: where the graph will run.
        advance: called once per layer.

    Returns:
        The modules replaced, in the order of the checkpoint.

    Raises:
        ModelError: a layer is not found, found twice, or has another shape or other weights; a matrix of few bits that
            is not replaced.
    """
    others = [path for path in checkpoint.rounded if path.rpartition(".")[0] not in checkpoint.ranks]
    if others:
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        raise ModelError(
            f"{others[0]}{more} has few bits in the checkpoint and is no part of a low-rank layer: the graph would "
            "keep its own numbers",
            "leave --rewrite out: ara then builds the graph",
        )
    nodes = _linear_nodes(model.graph)
    missing = [path for path in checkpoint.ranks if path not in nodes]
    if missing:
        raise ModelError(
            f"the graph has no MatMul or Gemm of its own for {len(missing)} of {len(checkpoint.ranks)} layers, "
            f"{missing[0]} among them",
            "export the dense model unquantised, unpacked and with module names, or leave --rewrite out",
        )
    for path in checkpoint.ranks:
        _replace(model.graph, nodes[path], checkpoint, path, provider)
        advance()
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        if not model.graph.initializers[name].is_graph_output():
            del model.graph.initializers[name]
    model.graph.sort()
    return list(checkpoint.ranks)


def _linear_nodes(graph: ir.Graph) -> dict[str, ir.Node]:
    """Return module path → node, for nodes that multiply by a weight; two nodes of one module are a ``ModelError``."""
    found: dict[str, ir.Node] = {}
    for node in graph:
        if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
            continue
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if weight is None or weight.const_value is None:
            continue
        for name in {_module(node.name or ""), _module(weight.name or "")} - {""}:
            if name in found and found[name] is not node:
                raise ModelError(
                    f"the graph has two nodes for {name}", "leave --rewrite out: ara then builds the graph"
                )
            found[name] = node
    return found


def _module(name: str) -> str:
    """Return the module path that a node or weight is named after, or an empty text."""
    name = name.strip("/").replace("/", ".")
    return re.sub(r"(\.(MatMul|Gemm|weight|output_\d+|MatMul_\d+))+$", "", name)


def _replace(graph: ir.Graph, node: ir.Node, checkpoint: Checkpoint, path: str, provider: Provider) -> None:
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None and weight.shape is not None
    if node.op_type == "Gemm" and (
        bool(node.attributes.get_int("transA", 0))
        or node.attributes.get_float("alpha", 1.0) != 1
        or node.attributes.get_float("beta", 1.0) != 1
    ):
        raise ModelError(
            f"the Gemm of {path} has transA, alpha or beta", "leave --rewrite out: ara then builds the graph"
        )
    swapped = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    sides = [int(side) for side in weight.const_value.shape]  # type: ignore[arg-type]
    if len(sides) != 2:
        raise ModelError(f"{path} is no matrix in the graph: its shape is {sides}", _DENSE)
    m, n = sides if swapped else reversed(sides)
    layer = checkpoint.linear(path, m, n)
    stored = weight.const_value.dtype
    if stored not in _FLOATS:
        raise ModelError(f"{path} is {stored} in the graph", "rewrite a graph in float32 or float16")
    dense = torch.tensor(weight.const_value.numpy()).double()
    _check(dense if swapped else dense.T, checkpoint, layer)

    new = _Replacement(graph, checkpoint, stored, _axes(node), provider)
    assert node.inputs[0] is not None and layer.layout is not None
    y = NODES[layer.layout].output(new, new.multiply(node.inputs[0], f"{path}.A"), layer)
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if bias is not None:
        y = new.op("Add", [y, bias], f"{path}.biased")
    old = node.outputs[0]
    y.type, y.shape, y.name = old.type, old.shape, old.name
    ir.convenience.replace_nodes_and_values(graph, node, [node], new.nodes, [old], [y])


class _Replacement(LowRankGraph):
    """Collects the nodes that replace a linear layer of another exporter's graph; the graph gets their weights at once.

    Args:
        graph: of the other exporter.
        checkpoint: holds the factors.
        dtype: of the replaced weight.
        axes: number of axes of the layer's input; ``None`` if unknown.
        provider: where the graph will run.
    """

    def __init__(
        self, graph: ir.Graph, checkpoint: Checkpoint, dtype: ir.DataType, axes: int | None, provider: Provider
    ) -> None:
        super().__init__(graph)
        self.checkpoint, self.dtype, self.axes, self.provider = checkpoint, dtype, axes, provider
        self.used = set()
        self.nodes: list[ir.Node] = []

    def append(self, node: ir.Node) -> None:
        """Collect a node."""
        self.nodes.append(node)

    def lazy(self, name: str, kind: ir.DataType, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> ir.Value:
        """Return a new tensor; see :meth:`GraphNodes.lazy`."""
        if name in self.graph.initializers:
            raise ModelError(f"the graph has a weight {name} of its own", _DENSE)
        return super().lazy(name, kind, shape, make)

    def multiply(self, x: ir.Value, path: str) -> ir.Value:
        """Multiply by the matrix that the checkpoint stores as ``<path>.weight``."""
        name, kind = f"{path}.weight", _FLOATS[self.dtype]
        m, n = self.checkpoint.shape(name)
        weight = self.lazy(
            name, self.dtype, (n, m), lambda: self.checkpoint.tensor(name).T.to(kind).contiguous().numpy()
        )
        return self.op("MatMul", [x, weight], path)


def _axes(node: ir.Node) -> int | None:
    """Return the number of axes of a linear layer's input, or ``None`` if the graph does not tell."""
    if node.op_type == "Gemm":
        return 2
    shapes = (value.shape for value in (node.inputs[0], node.outputs[0]) if value is not None)
    return next((len(shape) for shape in shapes if shape is not None), None)


def _check(dense: torch.Tensor, checkpoint: Checkpoint, layer: LinearLayer) -> None:
    """Check that the factors approximate this weight, (m, n) float64."""
    assert layer.layout is not None and layer.rank is not None
    layout = layout_named(layer.layout)
    names = layout.store(layer.m, layer.n, layer.rank)
    tensors = {name: checkpoint.tensor(f"{layer.path}.{name}") for name in names}
    product = layout.multiply(tensors, layer.m, torch.float64)
    cosine = float((dense * product).sum() / (dense.norm() * product.norm()).clamp_min(1e-300))
    if not cosine >= _LEAST_COSINE:
        raise ModelError(
            f"the weight of {layer.path} in the graph is not the one that was factorised (cosine {cosine:.2f})",
            "rewrite an export of the model that the checkpoint was made from",
        )
