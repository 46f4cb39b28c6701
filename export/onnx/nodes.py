"""Nodes and tensors of an ONNX graph: each node is named after its module, and weights are read when they are saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

OPSET = 21
# Version of the file format of a graph.
IR_VERSION = 10
CONTRIB = "com.microsoft"


class GraphNodes:
    """An ONNX graph to which inputs, nodes and tensors are added one by one.

    Args:
        graph: the graph; by default an empty one.
    """

    def __init__(self, graph: ir.Graph | None = None) -> None:
        empty = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, CONTRIB: 1}, name="decoder")
        self.graph = empty if graph is None else graph

    def input(self, name: str, kind: ir.DataType, shape: list[Any]) -> ir.Value:
        """Append an input of the graph."""
        value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        path: str,
        attributes: dict[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Append a node with one output and return that; see :meth:`ops`."""
        return self.ops(kind, inputs, path, attributes, 1, domain)[0]

    def ops(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        path: str,
        attributes: dict[str, Any] | None = None,
        outputs: int = 1,
        domain: str = "",
    ) -> list[ir.Value]:
        """Append a node and return its outputs.

        Args:
            kind: operator.
            inputs: ``None`` for an optional input that is left out.
            path: module that the node is named after; the kind is appended to it.
            attributes: of the operator.
            outputs: how many it has.
            domain: of the operator; ONNX's own by default.
        """
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs, name=f"{path}/{kind}")
        for i, value in enumerate(node.outputs):
            value.name = f"{path}/{kind}/output_{i}"
        self.append(node)
        return list(node.outputs)

    def append(self, node: ir.Node) -> None:
        """Append a node to the graph."""
        self.graph.append(node)

    def split(self, x: ir.Value, sizes: Sequence[int], path: str) -> list[ir.Value]:
        """Split the last axis."""
        lengths = self.ints(list(sizes))[0]
        return self.ops("Split", [x, lengths], path, {"axis": -1}, len(sizes))

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Return a tensor held in memory; a name that exists already gives the existing tensor."""
        if name not in self.graph.initializers:
            self.graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
        return self.graph.initializers[name]

    def ints(self, *values: list[int] | int) -> list[ir.Value]:
        """Return constants of int64: scalars and lists."""
        return [self.constant(f"ints/{np.array(value).tolist()}", np.array(value, np.int64)) for value in values]

    def lazy(self, name: str, kind: ir.DataType, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> ir.Value:
        """Return a tensor whose numbers ``make`` returns each time that they are read."""
        if name not in self.graph.initializers:
            tensor = ir.LazyTensor(lambda: ir.tensor(make(), name=name), dtype=kind, shape=ir.Shape(shape), name=name)
            self.graph.register_initializer(ir.val(name, const_value=tensor))
        return self.graph.initializers[name]
