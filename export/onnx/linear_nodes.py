"""Linear layers of the graph, dense or low-rank, with weights in float32, float16 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch

from ara.errors import NumericalError
from export.onnx.export_report import Precision, Provider
from export.onnx.low_rank import NODES, LowRankGraph
from export.onnx.nodes import CONTRIB
from export.onnx.quantize import BITS, BLOCK, quantize, scales_of
from export.onnx.stored_weights import Checkpoint, LinearLayer, Rounding

_FLOATS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}
TORCH_TYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}


# MatMulNBits leaves the activations as they are. With 4 it rounds them to 8 bits, which is faster on a CPU and too
# coarse for pivoted layers, whose outputs are combinations of rounded ones.
_EXACT = 0


@dataclass(frozen=True)
class GraphOptions:
    """Settings of the graph.

    Attributes:
        precision: of the weights of linear layers.
        activations: precision of everything else: ``fp32`` or ``fp16``.
        provider: where the graph will run.
        merge_shared_inputs: compute the products with the first matrices of q, k, v, and of gate, up, as one.
        last_logits: only the logits of the last position.
    """

    precision: Precision = "fp32"
    activations: Literal["fp32", "fp16"] = "fp32"
    provider: Provider = "cpu"
    merge_shared_inputs: bool = False
    last_logits: bool = False


class LinearNodes(LowRankGraph):
    """A graph with the linear layers and other weights of a checkpoint.

    Args:
        checkpoint: compressed or dense.
        options: precision, provider, merged products.
    """

    def __init__(self, checkpoint: Checkpoint, options: GraphOptions) -> None:
        super().__init__()
        self.checkpoint = NODES[checkpoint.layout].view(checkpoint, options.precision)
        self.options = options
        self.provider = options.provider
        self.axes = 3  # batch, tokens, width
        self.float = _FLOATS[options.activations]
        self.used = set()

    def _layer(self, path: str, m: int, n: int) -> LinearLayer:
        """Return how the checkpoint stores a linear layer of m outputs and n inputs."""
        return self.checkpoint.linear(path, m, n)

    def linear(self, x: ir.Value, layer: LinearLayer) -> ir.Value:
        """Return the output of a linear layer, (…, n) → (…, m)."""
        return self.linears(x, [layer], layer.path)[0]

    def linears(self, x: ir.Value, layers: Sequence[LinearLayer], path: str) -> list[ir.Value]:
        """Return the outputs of layers with the same input x (…, n); merged products are named after ``path``."""
        first = [f"{layer.path}.weight" if layer.rank is None else f"{layer.path}.A.weight" for layer in layers]
        ways = {self.checkpoint.rounded.get(name.removesuffix(".weight")) for name in first}
        if self.options.merge_shared_inputs and len(layers) > 1 and len(ways) == 1:
            sizes = [layer.m if layer.rank is None else layer.rank for layer in layers]
            inner = self.split(self._matmul(x, f"{path}.merged", *first), sizes, path)
        else:
            inner = [self._matmul(x, name.removesuffix(".weight"), name) for name in first]
        return [self._rest(h, layer) for h, layer in zip(inner, layers, strict=True)]

    def _rest(self, h: ir.Value, layer: LinearLayer) -> ir.Value:
        """Return the output (…, m) of a layer from h, the product with its first matrix."""
        y = h if layer.layout is None else NODES[layer.layout].output(self, h, layer)
        if layer.bias is not None:
            y = self.op("Add", [y, self.weight(layer.bias)], f"{layer.path}.biased")
        return y

    def multiply(self, x: ir.Value, path: str) -> ir.Value:
        """Multiply by the matrix that the checkpoint stores as ``<path>.weight``."""
        return self._matmul(x, path, f"{path}.weight")

    def _matmul(self, x: ir.Value, path: str, *names: str) -> ir.Value:
        """Multiply by weights of the checkpoint, each (out, in), stacked along the outputs."""
        self.used.update(names)
        rounding = self.checkpoint.rounded.get(names[0].removesuffix(".weight"))
        if rounding is not None:
            return self._matmul_rounded(x, path, names, rounding)
        shapes = [self.checkpoint.shape(name) for name in names]
        m, n = sum(shape[0] for shape in shapes), shapes[0][1]

        def stacked() -> torch.Tensor:
            tensors = [self.checkpoint.tensor(name) for name in names]
            return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

        if self.options.precision != "int8":
            weight = self.lazy(f"{path}.weight", self.float, (n, m), lambda: self._array(stacked().T))
            return self.op("MatMul", [x, weight], path)
        blocks = -(-n // BLOCK)
        packed = self.lazy(
            f"{path}.weight_quantized",
            ir.DataType.UINT8,
            (m, blocks, BLOCK),
            lambda: quantize(stacked(), TORCH_TYPES[self.float]),
        )
        scales = self.lazy(
            f"{path}.scales",
            self.float,
            (m * blocks,),
            lambda: self._array(scales_of(stacked(), TORCH_TYPES[self.float])),
        )
        attributes = {"K": n, "N": m, "bits": BITS, "block_size": BLOCK, "accuracy_level": 4}
        return self.op("MatMulNBits", [x, packed, scales], path, attributes, domain=CONTRIB)

    def _matmul_rounded(self, x: ir.Value, path: str, names: Sequence[str], rounding: Rounding) -> ir.Value:
        """Multiply by weights that the checkpoint stores in few bits, all in the same way, as they are stored."""
        bits, block, zero_points = rounding
        shapes = [self.checkpoint.shape(name) for name in names]
        m, n = sum(shape[0] for shape in shapes), shapes[0][1]
        blocks, paths = -(-n // block), [name.removesuffix(".weight") for name in names]

        def numbers(part: str, *shape: int) -> np.ndarray:
            tensors = [self.checkpoint.tensor(f"{one}.{part}") for one in paths]
            found: np.ndarray = torch.cat(tensors).reshape(shape).numpy()
            return found

        width = block * bits // 8
        packed = self.lazy(
            f"{path}.steps", ir.DataType.UINT8, (m, blocks, width), lambda: numbers("steps", m, blocks, width)
        )
        scales = self.lazy(
            f"{path}.scales",
            self.float,
            (m * blocks,),
            lambda: self._array(torch.from_numpy(numbers("scales", m * blocks))),
        )
        inputs = [x, packed, scales]
        if zero_points:
            count = m * -(-blocks * bits // 8)
            inputs.append(self.lazy(f"{path}.zeros", ir.DataType.UINT8, (count,), lambda: numbers("zeros", count)))
        attributes = {"K": n, "N": m, "bits": bits, "block_size": block, "accuracy_level": _EXACT}
        return self.op("MatMulNBits", inputs, path, attributes, domain=CONTRIB)

    def weight(self, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> ir.Value:
        """Return a tensor of the checkpoint under its own name."""
        self.used.add(name)
        return self.lazy(
            name,
            self.float,
            self.checkpoint.shape(name),
            lambda: self._array(change(self.checkpoint.tensor(name)) if change else self.checkpoint.tensor(name)),
        )

    def _array(self, tensor: torch.Tensor) -> np.ndarray:
        """Return a tensor in the precision of the activations."""
        converted = tensor.to(TORCH_TYPES[self.float])
        narrowed = self.float == ir.DataType.FLOAT16 and tensor.dtype != torch.float16 and tensor.numel() > 0
        # Smallest and largest number are enough: a mask over all numbers would take as much memory again.
        if narrowed and not torch.stack(converted.aminmax()).isfinite().all():
            raise NumericalError("a weight is beyond the range of float16", "export with --precision fp32")
        found: np.ndarray = converted.contiguous().numpy()
        return found
