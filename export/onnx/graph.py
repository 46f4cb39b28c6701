"""Builds the decoder graph: one ONNX graph for prefill and decode, with ONNX Runtime's fused operators.

Inputs and outputs have the names that ONNX Runtime GenAI expects. A dense linear layer is one MatMul. A low-rank one is
MatMul A and what its layout adds (:mod:`export.onnx.low_rank`). Nodes and weights are named after their modules. Each
weight is read, converted and written on its own when the model is saved.

Shapes: b batch, s new tokens, p past tokens, t = p + s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from ara.errors import ModelError
from export.onnx.architecture import Decoder
from export.onnx.few_bits import TORCH_TYPES
from export.onnx.graph_options import GraphOptions
from export.onnx.linear_nodes import LinearNodes
from export.onnx.nodes import CONTRIB, IR_VERSION
from export.onnx.stored_weights import EMBEDDING, HEAD, Checkpoint


def build(checkpoint: Checkpoint, decoder: Decoder, options: GraphOptions) -> ir.Model:
    """Return the graph of a checkpoint; its weights are read when it is saved.

    Raises:
        ModelError: a tensor is missing, has the wrong shape, or has no place in the graph.
    """
    return _Builder(checkpoint, decoder, options).model()


class _Builder(LinearNodes):
    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, options: GraphOptions) -> None:
        super().__init__(checkpoint, options)
        self.decoder = decoder

    # -- the whole ----------------------------------------------------------------------------------------------

    def model(self) -> ir.Model:
        """Build the whole decoder: token ids, attention mask and cache in, logits and longer cache out."""
        decoder = self.decoder
        ids = self.input("input_ids", ir.DataType.INT64, ["b", "s"])
        mask = self.input("attention_mask", ir.DataType.INT64, ["b", "t"])
        past = [self._cache_inputs(layer) for layer in range(decoder.layers)]
        lengths = self._lengths(mask)
        cos, sin = decoder.rotary_tables()
        rotary = [
            self.constant("rotary.cos", cos.to(TORCH_TYPES[self.float]).numpy()),
            self.constant("rotary.sin", sin.to(TORCH_TYPES[self.float]).numpy()),
        ]
        stream = self.lookup(ids, EMBEDDING, decoder.vocabulary, decoder.hidden)
        if decoder.embedding_scale != 1:
            scale = self.constant("model.embed_tokens.scale", self._array(torch.tensor(decoder.embedding_scale)))
            stream = self.op("Mul", [stream, scale], "model.embed_tokens.scaled")
        delta: ir.Value | None = None
        presents: list[ir.Value] = []
        for layer in range(decoder.layers):
            block = f"model.layers.{layer}"
            normed, stream = self._norm(stream, delta, f"{block}.input_layernorm")
            attended, kept = self._attention(normed, f"{block}.self_attn", layer, past[layer], lengths, rotary)
            presents += kept
            normed, stream = self._norm(stream, attended, f"{block}.post_attention_layernorm")
            delta = self._gated(normed, f"{block}.mlp")
        normed, _ = self._norm(stream, delta, "model.norm")
        if self.options.last_logits:
            normed = self.op("Slice", [normed, *self.ints([-1], [2**31], [1])], "last_position")
        logits = self._head(normed)
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
                "the model has parts that export/onnx/graph.py does not know: it cannot be exported",
            )

    def _head(self, x: ir.Value) -> ir.Value:
        """Return the logits. A tied head multiplies by the embedding, which is stored once."""
        # A stored head is used even if the config says that it is tied, as transformers does.
        if not self.decoder.tied or self.checkpoint.has(f"{HEAD}.weight"):
            return self.linear(x, self._layer(HEAD, self.decoder.vocabulary, self.decoder.hidden))
        weight = f"{EMBEDDING}.weight"
        if self.options.precision == "int8" or EMBEDDING in self.checkpoint.rounded:
            return self._matmul(x, HEAD, weight)
        return self.op("FusedMatMul", [x, self.weight(weight)], HEAD, {"transB": 1}, domain=CONTRIB)

    # -- parts of a block ---------------------------------------------------------------------------------------

    def _norm(self, x: ir.Value, delta: ir.Value | None, path: str) -> tuple[ir.Value, ir.Value]:
        """Return norm(x + delta) and x + delta; ``None`` counts as zero."""
        gamma = self._gamma(f"{path}.weight", self.decoder.hidden)
        attributes: dict[str, Any] = {"epsilon": self.decoder.epsilon}
        if delta is None:
            return self._plain_norm(x, gamma, path), x
        normed, _, _, summed = self.ops(
            "SkipSimplifiedLayerNormalization", [x, delta, gamma], path, attributes, 4, CONTRIB
        )
        return normed, summed

    def _plain_norm(self, x: ir.Value, gamma: ir.Value, path: str) -> ir.Value:
        attributes = {"epsilon": self.decoder.epsilon, "axis": -1, "stash_type": 1}
        return self.op("SimplifiedLayerNormalization", [x, gamma], path, attributes)

    def _gamma(self, name: str, width: int) -> ir.Value:
        self.checkpoint.expect(name, width)
        offset = self.decoder.norm_offset
        return self.weight(name, (lambda w: w.float() + offset) if offset else None)

    def _attention(
        self,
        x: ir.Value,
        path: str,
        layer: int,
        past: Sequence[ir.Value],
        lengths: Sequence[ir.Value],
        rotary: Sequence[ir.Value],
    ) -> tuple[ir.Value, list[ir.Value]]:
        decoder = self.decoder
        query, key = decoder.heads * decoder.head, decoder.kv_heads * decoder.head
        projected: list[ir.Value | None]
        if decoder.packed:
            packed = self._layer(f"{path}.qkv_proj", query + 2 * key, decoder.hidden)
            projected = [self.linear(x, packed), None, None]
        else:
            widths = {"q_proj": query, "k_proj": key, "v_proj": key}
            layers = [self._layer(f"{path}.{name}", width, decoder.hidden) for name, width in widths.items()]
            projected = [*self.linears(x, layers, f"{path}.qkv")]
        if decoder.head_norm:
            assert projected[0] is not None and projected[1] is not None
            projected[0] = self._norm_heads(projected[0], decoder.heads, f"{path}.q_norm")
            projected[1] = self._norm_heads(projected[1], decoder.kv_heads, f"{path}.k_norm")
        attributes: dict[str, Any] = {
            "num_heads": decoder.heads,
            "kv_num_heads": decoder.kv_heads,
            "scale": decoder.scale,
            "do_rotary": 1,
        }
        window = decoder.windows[layer]
        if window is not None:
            attributes["local_window_size"] = window
        attended, *present = self.ops(
            "GroupQueryAttention", [*projected, *past, *lengths, *rotary], path, attributes, 3, CONTRIB
        )
        return self.linear(attended, self._layer(f"{path}.o_proj", decoder.hidden, query)), present

    def _norm_heads(self, x: ir.Value, heads: int, path: str) -> ir.Value:
        width = self.decoder.head
        gamma = self._gamma(f"{path}.weight", width)
        split = self.op("Reshape", [x, self.ints([0, 0, heads, width])[0]], f"{path}.split")
        normed = self._plain_norm(split, gamma, path)
        return self.op("Reshape", [normed, self.ints([0, 0, heads * width])[0]], f"{path}.joined")

    def _gated(self, x: ir.Value, path: str) -> ir.Value:
        decoder = self.decoder
        width = decoder.intermediate
        if decoder.packed:
            both = self.linear(x, self._layer(f"{path}.gate_up_proj", 2 * width, decoder.hidden))
            gate, up = self.split(both, [width, width], f"{path}.gate_up")
        else:
            layers = [self._layer(f"{path}.{name}", width, decoder.hidden) for name in ("gate_proj", "up_proj")]
            gate, up = self.linears(x, layers, f"{path}.gate_up")
        if decoder.activation == "silu":
            active = self.op("Mul", [gate, self.op("Sigmoid", [gate], f"{path}.sigmoid")], f"{path}.silu")
        else:
            approximate = "tanh" if decoder.activation == "gelu_tanh" else "none"
            active = self.op("Gelu", [gate], f"{path}.gelu", {"approximate": approximate})
        product = self.op("Mul", [active, up], f"{path}.gated")
        return self.linear(product, self._layer(f"{path}.down_proj", decoder.hidden, width))

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
