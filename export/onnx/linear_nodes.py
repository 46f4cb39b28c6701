"""Linear layers of the graph, dense or low-rank, with weights in float32, float16 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch

from export.onnx.few_bits import EIGHT_BITS, TORCH_TYPES, FewBitNodes
from export.onnx.low_rank import NODES
from export.onnx.nodes import CONTRIB
from export.onnx.quantize import BITS, BLOCK, quantize, scales_of
from export.onnx.stored_weights import LinearLayer, Rounding


class LinearNodes(FewBitNodes):
    """A graph with the linear layers and other weights of a checkpoint; see :class:`FewBitNodes` for the arguments."""

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
        owners = [name.removesuffix(".weight") for name in names]
        # A tied head is called by its own name. Merged matrices are all of one way, so the first one speaks for them.
        exact = self.is_exact(path if len(names) == 1 else owners[0])
        rounding = self.checkpoint.rounded.get(owners[0])
        if rounding is not None:
            return self.multiply_few_bits(x, path, owners, rounding, exact=exact)
        shapes = [self.checkpoint.shape(name) for name in names]
        m, n = sum(shape[0] for shape in shapes), shapes[0][1]

        def stacked() -> torch.Tensor:
            tensors = [self.checkpoint.tensor(name) for name in names]
            return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

        if exact:
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
        attributes = {"K": n, "N": m, "bits": BITS, "block_size": BLOCK, "accuracy_level": EIGHT_BITS}
        return self.op("MatMulNBits", [x, packed, scales], path, attributes, domain=CONTRIB)

    def _way(self, owner: str) -> tuple[Rounding | None, bool]:
        """Return how the graph holds a matrix; only matrices of one way can be merged."""
        return self.checkpoint.rounded.get(owner), self.is_exact(owner)

    def lookup(self, ids: ir.Value, path: str, m: int, n: int) -> ir.Value:
        """Return the rows (…, n) of token ids (…) in the embedding (m, n) at ``path``."""
        name = self.checkpoint.expect(f"{path}.weight", m, n)
        rounding = self.checkpoint.rounded.get(path)
        if rounding is None:
            return self.op("Gather", [self.weight(name), ids], path)
        self.used.add(name)
        return self.lookup_few_bits(ids, path, m, n, rounding)

    def exact_weight(self, name: str) -> ir.Value:
        """Return a tensor of the checkpoint under its own name, in float32 in any graph."""
        self.used.add(name)
        kind, read = ir.DataType.FLOAT, self.checkpoint.tensor
        return self.lazy(name, kind, self.checkpoint.shape(name), lambda: self._array(read(name), kind))

    def weight(self, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> ir.Value:
        """Return a tensor of the checkpoint under its own name."""
        self.used.add(name)
        return self.lazy(
            name,
            self.float,
            self.checkpoint.shape(name),
            lambda: self._array(change(self.checkpoint.tensor(name)) if change else self.checkpoint.tensor(name)),
        )
