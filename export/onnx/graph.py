"""Builds the decoder graph: one ONNX graph for prefill and decode, with ONNX Runtime's fused operators.

Inputs and outputs have the names that ONNX Runtime GenAI expects. A dense linear layer is one MatMul. A low-rank one is
MatMul A and what its layout adds (:mod:`export.onnx.low_rank`). Nodes and weights are named after their modules. Each
weight is read, converted and written on its own when the model is saved. The parts of a block are in
:mod:`export.onnx.block_nodes`.

Shapes: b batch, s new tokens, p past tokens, t = p + s.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ara.errors import ModelError
from export.onnx.architecture import Decoder
from export.onnx.block_nodes import BlockNodes
from export.onnx.families import Positions
from export.onnx.graph_options import GraphOptions
from export.onnx.nodes import CONTRIB, IR_VERSION
from export.onnx.stored_weights import Checkpoint


def build(checkpoint: Checkpoint, decoder: Decoder, options: GraphOptions) -> ir.Model:
    """Return the graph of a checkpoint; its weights are read when it is saved.

    Raises:
        ModelError: a tensor is missing, has the wrong shape, or has no place in the graph.
    """
    return GraphBuilder(checkpoint, decoder, options).model()


class GraphBuilder(BlockNodes):
    """Builds a whole graph; see :class:`export.onnx.block_nodes.BlockNodes` for the arguments."""

    def model(self) -> ir.Model:
        """Build the whole decoder: token ids, attention mask and cache in, logits and longer cache out."""
        decoder = self.decoder
        ids = self.input("input_ids", ir.DataType.INT64, ["b", "s"])
        mask = self.input("attention_mask", ir.DataType.INT64, ["b", "t"])
        past = [self._cache_inputs(layer) for layer in range(decoder.layers)]
        lengths = self._lengths(mask)
        stream, delta = self._embedded(ids, mask), None
        presents: list[ir.Value] = []
        for layer in range(decoder.layers):
            stream, delta, present = self.block(stream, delta, layer, past[layer], lengths)
            presents += present
        normed, _ = self.norm(stream, delta, self.names.norm)
        if self.options.last_logits:
            normed = self.op("Slice", [normed, *self.ints([-1], [2**31], [1])], "last_position")
        logits = self.scaled(self._head(normed), decoder.logit_scale, "logits")
        logits = self.capped(logits, decoder.logit_cap, "logits")
        for value, name, kind, shape in [
            (logits, "logits", self.float, ["b", 1 if self.options.last_logits else "s", decoder.vocabulary]),
            *(
                (value, f"present.{i // 2}.{'key' if i % 2 == 0 else 'value'}", self.float, self._cache_shape("t"))
                for i, value in enumerate(presents)
            ),
        ]:
            value.name, value.dtype, value.shape = name, kind, ir.Shape(shape)
            self.graph.outputs.append(value)
        self._refuse_leftovers()
        return ir.Model(self.graph, ir_version=IR_VERSION, producer_name="ara")

    def _refuse_leftovers(self) -> None:
        """Refuse a checkpoint with a tensor that the graph does not use: a part of the model is not known here."""
        left = [name for name in self.checkpoint.names() if name not in self.used and not name.endswith(".inv_freq")]
        if left:
            raise ModelError(
                f"{len(left)} tensors of the checkpoint have no place in the graph, {left[0]} among them",
                "the model has parts that export/onnx/families.py does not know: it cannot be exported",
            )

    # -- before and after the blocks ----------------------------------------------------------------------------

    def _embedded(self, ids: ir.Value, mask: ir.Value) -> ir.Value:
        """Return the embeddings (b, s, hidden) of tokens and, where they are learned, of their positions."""
        decoder, path = self.decoder, self.names.embedding
        found = self.lookup(ids, path, decoder.vocabulary, decoder.hidden)
        found = self.scaled(found, decoder.embedding_scale, path)
        if (positions := self.family.positions) is not None:
            rows = self._positions(ids, mask, positions)
            learned = self.lookup(rows, positions.path, decoder.context + positions.offset, decoder.hidden)
            found = self.op("Add", [found, learned], f"{positions.path}.added")
        return found

    def _positions(self, ids: ir.Value, mask: ir.Value, positions: Positions) -> ir.Value:
        """Return each new token's row (b, s) in the embedding of positions. Padding does not count."""
        path = positions.path
        tokens, before, end, axis = self.ints(1, positions.offset - 1, [2**31], [1])
        count = self.op("CumSum", [mask, tokens], f"{path}.count")
        rows = self.op("Add", [count, before], f"{path}.row")
        new = self.op("Shape", [ids], f"{path}.new", {"start": 1, "end": 2})
        return self.op("Slice", [rows, self.op("Neg", [new], f"{path}.start"), end, axis], f"{path}.rows")

    def _head(self, x: ir.Value) -> ir.Value:
        """Return the product with the head. A tied head multiplies by the embedding, which is stored once."""
        head = self.names.head
        # A stored head is used even if the config says that it is tied, as transformers does.
        if not self.decoder.tied or self.checkpoint.has(f"{head}.weight"):
            return self.linear(x, self.checkpoint.linear(head, self.decoder.vocabulary, self.decoder.hidden))
        weight = f"{self.names.embedding}.weight"
        if self.options.precision == "int8" or self.names.embedding in self.checkpoint.rounded:
            return self._matmul(x, head, weight)
        return self.op("FusedMatMul", [x, self.weight(weight)], head, {"transB": 1}, domain=CONTRIB)

    # -- inputs and lengths -------------------------------------------------------------------------------------

    def _cache_shape(self, length: str) -> list[Any]:
        return ["b", self.decoder.kv_heads, length, self.decoder.head]

    def _cache_inputs(self, layer: int) -> list[ir.Value]:
        names = (f"past_key_values.{layer}.key", f"past_key_values.{layer}.value")
        return [self.input(name, self.float, self._cache_shape("p")) for name in names]

    def _lengths(self, mask: ir.Value) -> list[ir.Value]:
        """Return the inputs of the attention: index of each row's last token, (b) int32, and t, a scalar int32."""
        axis, one, second = self.ints([1], 1, 1)
        int32 = {"to": ir.DataType.INT32.value}
        count = self.op("ReduceSum", [mask, axis], "lengths.count", {"keepdims": 0})
        last = self.op("Cast", [self.op("Sub", [count, one], "lengths.last")], "lengths.last_int32", int32)
        shape = self.op("Shape", [mask], "lengths.shape")
        total = self.op("Gather", [shape, second], "lengths.total", {"axis": 0})
        return [last, self.op("Cast", [total], "lengths.total_int32", int32)]
