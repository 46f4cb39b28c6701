"""Nodes of low-rank layers: from h = A x, the product with the first matrix, to the output; one class per layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import onnx_ir as ir

from ara.layout_names import LayoutName
from export.onnx.export_report import Precision, Provider
from export.onnx.nodes import GraphNodes
from export.onnx.pivots import BlockPivots, ordering
from export.onnx.stored_weights import Checkpoint, LinearLayer


class LowRankGraph(GraphNodes, ABC):
    """A graph that gets low-rank layers: one that is built, or one of another exporter.

    Attributes:
        checkpoint: holds the weights.
        provider: where the graph will run.
        axes: number of axes of a layer's output; ``None`` if unknown.
        used: names of the checkpoint's tensors that the graph has.
    """

    checkpoint: Checkpoint | BlockPivots
    provider: Provider
    axes: int | None
    used: set[str]

    @abstractmethod
    def multiply(self, x: ir.Value, path: str) -> ir.Value:
        """Return the product of x (…, n) with the matrix (m, n) that the checkpoint stores as ``<path>.weight``."""

    def indices(self, name: str, kind: ir.DataType) -> ir.Value:
        """Return the indices that the checkpoint stores as ``name``."""
        self.used.add(name)
        return self.lazy(name, kind, self.checkpoint.shape(name), lambda: self.checkpoint.tensor(name).numpy())


class LowRankNodes(ABC):
    """How a graph computes the low-rank layers of one layout."""

    def view(self, checkpoint: Checkpoint, precision: Precision) -> Checkpoint | BlockPivots:
        """Return the checkpoint as a graph of this precision reads it."""
        return checkpoint

    @abstractmethod
    def output(self, graph: LowRankGraph, h: ir.Value, layer: LinearLayer) -> ir.Value:
        """Return the output (…, m) of a layer without its bias, from h (…, k)."""


class FactorsNodes(LowRankNodes):
    """MatMul B."""

    def output(self, graph: LowRankGraph, h: ir.Value, layer: LinearLayer) -> ir.Value:
        """Return B h."""
        return graph.multiply(h, f"{layer.path}.B")


class PivotedNodes(LowRankNodes):
    """MatMul C → Concat → Gather; the Gather copies blocks or rows on CPUs, see :mod:`export.onnx.pivots`."""

    def view(self, checkpoint: Checkpoint, precision: Precision) -> Checkpoint | BlockPivots:
        """Return the checkpoint with pivots in blocks, for a float32 graph."""
        # More pivots magnify rounding errors: hardly in float32, far too much in 8 bits.
        return BlockPivots(checkpoint) if precision == "fp32" and not checkpoint.rounded else checkpoint

    def output(self, graph: LowRankGraph, h: ir.Value, layer: LinearLayer) -> ir.Value:
        """Return [h; C h], put in order."""
        others = graph.multiply(h, f"{layer.path}.C")
        y = graph.op("Concat", [h, others], f"{layer.path}.rows", {"axis": -1})
        order = graph.indices(f"{layer.path}.order", ir.DataType.INT32 if layer.block == 1 else ir.DataType.INT64)
        if layer.block > 1:
            apart, whole = graph.ints([0, 0, layer.m // layer.block, layer.block], [0, 0, layer.m])
            blocks = graph.op("Reshape", [y, apart], f"{layer.path}.blocks")
            ordered = graph.op("Gather", [blocks, order], f"{layer.path}.ordered", {"axis": 2})
            return graph.op("Reshape", [ordered, whole], f"{layer.path}.whole")
        for kind, name, attributes in ordering(graph.axes, graph.provider):
            y = graph.op(kind, [y, order] if kind == "Gather" else [y], f"{layer.path}.{name}", attributes)
        return y


NODES: Mapping[LayoutName, LowRankNodes] = {"factors": FactorsNodes(), "pivoted": PivotedNodes()}
