"""Linear layers of the graph, dense or low-rank, with weights in float32, float16 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch

from ara.errors import NumericalError
from ara.layouts.modeling_ara import NUMBERS
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
        sixteen: paths of matrices that a graph of precision int8 holds in float16; see :mod:`export.onnx.fallback`.
    """

    precision: Precision = "fp32"
    activations: Literal["fp32", "fp16"] = "fp32"
    provider: Provider = "cpu"
    merge_shared_inputs: bool = False
    last_logits: bool = False
    sixteen: frozenset[str] = frozenset()


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
        ways = {self._way(name.removesuffix(".weight")) for name in first}
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
        # A tied head is called by its own name. Merged matrices are all of one way, so the first one speaks for them.
        owner = path if len(names) == 1 else names[0].removesuffix(".weight")
        rounding = self.checkpoint.rounded.get(names[0].removesuffix(".weight"))
        if rounding is not None:
            return self._matmul_rounded(x, path, names, rounding)
        shapes = [self.checkpoint.shape(name) for name in names]
        m, n = sum(shape[0] for shape in shapes), shapes[0][1]

        def stacked() -> torch.Tensor:
            tensors = [self.checkpoint.tensor(name) for name in names]
            return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

        if self.options.precision != "int8" or owner in self.options.sixteen:
            kind = self.float if self.options.precision != "int8" else ir.DataType.FLOAT16
            weight = self.lazy(f"{path}.weight", kind, (n, m), lambda: self._array(stacked().T, kind))
            if kind != self.float:  # 16 bits on the disk; ONNX Runtime converts them once, when it loads the graph
                weight = self.op("Cast", [weight], f"{path}.weight", {"to": self.float.value})
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

    def _way(self, owner: str) -> tuple[Rounding | None, bool]:
        """Return how the graph holds a matrix; only matrices of one way can be merged."""
        return self.checkpoint.rounded.get(owner), owner in self.options.sixteen

    def _matmul_rounded(self, x: ir.Value, path: str, names: Sequence[str], rounding: Rounding) -> ir.Value:
        """Multiply by weights that the checkpoint stores in few bits, all in the same way, as they are stored."""
        shapes = [self.checkpoint.shape(name) for name in names]
        m, n = sum(shape[0] for shape in shapes), shapes[0][1]
        numbers = self._numbers(path, [name.removesuffix(".weight") for name in names], m, n, rounding)
        attributes = {
            "K": n,
            "N": m,
            "bits": rounding.bits,
            "block_size": rounding.block,
            "accuracy_level": _EXACT,
        }
        return self.op("MatMulNBits", [x, *numbers], path, attributes, domain=CONTRIB)

    def _numbers(self, path: str, owners: Sequence[str], m: int, n: int, rounding: Rounding) -> list[ir.Value]:
        """Return the numbers of matrices of few bits, stacked along the rows, in the shapes of MatMulNBits.

        Args:
            path: that the tensors of several matrices are named after. Those of one are named after it, so that an
                embedding and the head that is tied to it share them.
            owners: paths of the matrices.
            m: rows in all.
            n: columns.
            rounding: of all of them.

        Returns:
            Steps (m, blocks, bytes of a block), scales (m · blocks) and, if there are any, packed zero points, flat.
        """
        bits, block, zero_points = rounding
        blocks, name = -(-n // block), owners[0] if len(owners) == 1 else path

        def stored(part: str, *shape: int) -> torch.Tensor:
            return torch.cat([self.checkpoint.tensor(f"{one}.{part}") for one in owners]).reshape(shape)

        width = block * bits // 8
        found = [
            self.lazy(
                f"{name}.steps",
                ir.DataType.UINT8,
                (m, blocks, width),
                lambda: stored("steps", m, blocks, width).numpy(),
            ),
            self.lazy(f"{name}.scales", self.float, (m * blocks,), lambda: self._array(stored("scales", m * blocks))),
        ]
        if zero_points:
            count = m * -(-blocks * bits // 8)
            found.append(
                self.lazy(f"{name}.zeros", ir.DataType.UINT8, (count,), lambda: stored("zeros", count).numpy())
            )
        return found

    def lookup(self, ids: ir.Value, path: str, m: int, n: int) -> ir.Value:
        """Return the rows (…, n) of token ids (…) in the embedding (m, n) at ``path``."""
        name = self.checkpoint.expect(f"{path}.weight", m, n)
        rounding = self.checkpoint.rounded.get(path)
        if rounding is None:
            return self.op("Gather", [self.weight(name), ids], path)
        self.used.add(name)
        return self._lookup_rounded(ids, path, m, n, rounding)

    def _lookup_rounded(self, ids: ir.Value, path: str, m: int, n: int, rounding: Rounding) -> ir.Value:
        """Return rows (b, s, n) of an embedding of few bits, from the tensors that a tied head multiplies by.

        GatherBlockQuantized wants data, scales and zero points of as many axes. In 8 bits all of them get the three
        axes of the head's steps, so that these are in memory once. Zero points of 4 bits are packed along a row, which
        leaves two axes; there ONNX Runtime packs the head's steps anew anyway, and keeps the stored ones for this.
        """
        bits, block, _ = rounding
        blocks = -(-n // block)
        steps, *others = self._numbers(path, [path], m, n, rounding)
        apart = bits == 8
        shapes: list[list[int]] = [[m, blocks, 1], [m, blocks, 1]] if apart else [[m, blocks], [m, -1]]
        reshaped = [
            self.op("Reshape", [value, self.ints(shape)[0]], f"{path}.{part}")
            for value, shape, part in zip(others, shapes, NUMBERS[1:], strict=False)
        ]
        data = steps if apart else self.op("Reshape", [steps, self.ints([m, -1])[0]], f"{path}.steps")
        attributes = {"gather_axis": 0, "quantize_axis": 2 if apart else 1, "block_size": block, "bits": bits}
        rows = self.op("GatherBlockQuantized", [data, ids, *reshaped], path, attributes, domain=CONTRIB)
        if apart:
            rows = self.op("Reshape", [rows, self.ints([0, 0, blocks * block])[0]], f"{path}.joined")
        if blocks * block > n:
            rows = self.op("Slice", [rows, *self.ints([0], [n], [-1])], f"{path}.cut")
        return rows

    def weight(self, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> ir.Value:
        """Return a tensor of the checkpoint under its own name."""
        self.used.add(name)
        return self.lazy(
            name,
            self.float,
            self.checkpoint.shape(name),
            lambda: self._array(change(self.checkpoint.tensor(name)) if change else self.checkpoint.tensor(name)),
        )

    def _array(self, tensor: torch.Tensor, kind: ir.DataType | None = None) -> np.ndarray:
        """Return a tensor in the precision ``kind``, by default that of the activations."""
        kind = self.float if kind is None else kind
        converted = tensor.to(TORCH_TYPES[kind])
        narrowed = kind == ir.DataType.FLOAT16 and tensor.dtype != torch.float16 and tensor.numel() > 0
        # Smallest and largest number are enough: a mask over all numbers would take as much memory again.
        if narrowed and not torch.stack(converted.aminmax()).isfinite().all():
            raise NumericalError("a weight is beyond the range of float16", "export with --precision fp32")
        found: np.ndarray = converted.contiguous().numpy()
        return found
