"""Settings of a graph that is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from export.onnx.export_report import Precision, Provider


@dataclass(frozen=True)
class GraphOptions:
    """Settings of the graph.

    Attributes:
        precision: of the weights of linear layers.
        activations: precision of everything else: ``fp32`` or ``fp16``.
        provider: where the graph will run.
        merge_shared_inputs: compute the products with the first matrices of q, k, v, and of gate, up, as one.
        last_logits: only the logits of the last position.
        exact: paths of matrices that a graph of precision int8 multiplies exactly; see :mod:`export.onnx.fallback`.
    """

    precision: Precision = "fp32"
    activations: Literal["fp32", "fp16"] = "fp32"
    provider: Provider = "cpu"
    merge_shared_inputs: bool = False
    last_logits: bool = False
    exact: frozenset[str] = frozenset()
