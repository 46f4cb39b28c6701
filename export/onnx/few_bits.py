"""Matrices that the checkpoint stores in few bits, with the numbers that it stores: products and lookups.

A product has one of three forms:

- **Rounded inputs:** MatMulNBits, which rounds the inputs to 8 bits in blocks. This is the fastest form; precision int8
  has it.
- **Packed:** MatMulNBits with the inputs as they are.
- **Expanded:** the product with float weights, which ONNX Runtime computes from the stored numbers once, when it loads
  the graph. They take the memory of float weights.

The last two are exact. On a CPU, packed 4 bits are about as fast as float weights. Packed 8 bits take up to thirty
times as long (``benchmarks/products.py``), because ONNX Runtime expands them in every pass. So they are expanded there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch

from ara.errors import NumericalError
from ara.layouts.modeling_ara import NUMBERS
from export.onnx.export_report import Provider
from export.onnx.graph_options import GraphOptions
from export.onnx.low_rank import NODES, LowRankGraph
from export.onnx.nodes import CONTRIB
from export.onnx.stored_weights import Checkpoint, Rounding

# ``accuracy_level`` of MatMulNBits on a CPU: inputs as they are, or rounded to 8 bits in blocks as long as those of the
# weights. On CUDA it has no effect.
EXACT, EIGHT_BITS = 0, 4
_FLOATS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}
_TO_FLOAT = {"to": ir.DataType.FLOAT.value}
TORCH_TYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}


def is_expanded(rounding: Rounding, provider: Provider) -> bool:
    """Tell whether exact products with a matrix of few bits are those with float weights."""
    return provider == "cpu" and rounding.bits == 8


def count_expanded(model: ir.Model) -> int:
    """Return the number of products with expanded matrices in a graph."""
    return sum(
        node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.UINT8
        for node in model.graph
        if (node.name or "").endswith(".steps/Cast")
    )


class FewBitNodes(LowRankGraph):
    """A graph with the matrices of few bits of a checkpoint.

    Args:
        checkpoint: compressed or dense.
        options: precision and provider.
    """

    def __init__(self, checkpoint: Checkpoint, options: GraphOptions) -> None:
        super().__init__()
        self.checkpoint = NODES[checkpoint.layout].view(checkpoint, options.precision)
        self.options = options
        self.provider = options.provider
        self.axes = 3  # batch, tokens, width
        self.float = _FLOATS[options.activations]
        self.used = set()

    def is_exact(self, path: str) -> bool:
        """Tell whether the inputs of the matrix that is multiplied at ``path`` are not rounded."""
        return self.options.precision != "int8" or path in self.options.exact

    def multiply_few_bits(
        self, x: ir.Value, path: str, owners: Sequence[str], rounding: Rounding, *, exact: bool
    ) -> ir.Value:
        """Multiply by matrices of few bits, stacked along the outputs.

        Args:
            x: (…, n).
            path: that the nodes are named after.
            owners: paths of the matrices, all stored in the same way.
            rounding: that way.
            exact: whether x is not rounded.
        """
        shapes = [self.checkpoint.shape(f"{owner}.weight") for owner in owners]
        m, n = sum(shape[0] for shape in shapes), shapes[0][1]
        numbers = self._numbers(path, owners, m, n, rounding)
        if exact and is_expanded(rounding, self.provider):
            weight = self._expand(path, numbers, m, n, rounding)
            return self.op("FusedMatMul", [x, weight], path, {"transB": 1}, domain=CONTRIB)
        attributes = {
            "K": n,
            "N": m,
            "bits": rounding.bits,
            "block_size": rounding.block,
            "accuracy_level": EXACT if exact else EIGHT_BITS,
        }
        return self.op("MatMulNBits", [x, *numbers], path, attributes, domain=CONTRIB)

    def _expand(self, path: str, numbers: Sequence[ir.Value], m: int, n: int, rounding: Rounding) -> ir.Value:
        """Return the weights (m, n) of a matrix of 8 bits: (steps − zero points) · scales, computed in float32.

        All inputs are constant, so ONNX Runtime computes these nodes once. It would not do that with a
        DequantizeLinear, which it turns into MatMulNBits.

        Args:
            path: that the nodes are named after.
            numbers: as :meth:`_numbers` returns them.
            m: rows.
            n: columns.
            rounding: of the matrix.
        """
        blocks = -(-n // rounding.block)
        per_block = self.ints([m, blocks, 1])[0]
        steps, scales, *rest = numbers
        weights = self.op("Cast", [steps], f"{path}.steps", _TO_FLOAT)
        if rest:
            zeros = self.op("Reshape", [rest[0], per_block], f"{path}.zeros")
            middle = self.op("Cast", [zeros], f"{path}.zeros", _TO_FLOAT)
        else:
            middle = self.constant(f"middle/{rounding.bits}", np.array(1 << (rounding.bits - 1), np.float32))
        scales = self.op("Reshape", [scales, per_block], f"{path}.scales")
        if self.float != ir.DataType.FLOAT:
            scales = self.op("Cast", [scales], f"{path}.scales", _TO_FLOAT)
        weights = self.op("Mul", [self.op("Sub", [weights, middle], f"{path}.steps"), scales], f"{path}.weight")
        weights = self.op("Reshape", [weights, self.ints([m, blocks * rounding.block])[0]], f"{path}.weight")
        if blocks * rounding.block > n:
            weights = self.op("Slice", [weights, *self.ints([0], [n], [1])], f"{path}.weight")
        if self.float != ir.DataType.FLOAT:
            weights = self.op("Cast", [weights], f"{path}.weight", {"to": self.float.value})
        return weights

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

    def lookup_few_bits(self, ids: ir.Value, path: str, m: int, n: int, rounding: Rounding) -> ir.Value:
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
