"""Builds the decoder graph: one ONNX graph for prefill and decode, with ONNX Runtime's fused operators.

Inputs and outputs carry the names that ONNX Runtime GenAI expects. A dense linear layer is one MatMul; a factorised one
is MatMul A → MatMul B; a pivoted one MatMul A → MatMul C → Concat → Gather, which copies blocks or rows on CPUs
(:mod:`export.onnx.pivots`). Nodes and weights are named after their modules. Weights are lazy: each is read, converted
and written on its own when the model is saved.

Shapes: b batch, s new tokens, p past tokens, t = p + s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch

from ara.errors import ModelError, NumericalError
from export.onnx.architecture import Decoder
from export.onnx.pivots import BlockPivots, ordering
from export.onnx.quantize import BITS, BLOCK, quantize, scales_of
from export.onnx.report import Precision, Provider
from export.onnx.weights import Checkpoint, LinearLayer

OPSET = 21
_CONTRIB = "com.microsoft"
_FLOATS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}
_TORCH = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}


@dataclass(frozen=True)
class GraphOptions:
    """How the graph is to be.

    Attributes:
        precision: of the weights of linear layers.
        activations: ``fp32`` or ``fp16``: of everything else.
        provider: that is to run the graph.
        merge_shared_inputs: multiply the factors that read the same input in one go.
        last_logits: only the logits of the last position.
    """

    precision: Precision = "fp32"
    activations: Literal["fp32", "fp16"] = "fp32"
    provider: Provider = "cpu"
    merge_shared_inputs: bool = False
    last_logits: bool = False


def build(checkpoint: Checkpoint, decoder: Decoder, options: GraphOptions) -> ir.Model:
    """Return the graph of a checkpoint; its weights are read when it is saved.

    Raises:
        ModelError: a tensor is missing or has the wrong shape.
    """
    return _Builder(checkpoint, decoder, options).model()


class _Builder:
    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, options: GraphOptions) -> None:
        self.checkpoint: Checkpoint | BlockPivots = checkpoint
        # More pivots magnify rounding: by nothing to speak of in float32, by far too much in 8 bits.
        if checkpoint.pivoted and options.precision == "fp32":
            self.checkpoint = BlockPivots(checkpoint)
        self.decoder, self.options = decoder, options
        self.float = _FLOATS[options.activations]
        self.used: set[str] = set()
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, _CONTRIB: 1}, name="decoder")

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
            self.constant("rotary.cos", cos.to(_TORCH[self.float]).numpy()),
            self.constant("rotary.sin", sin.to(_TORCH[self.float]).numpy()),
        ]
        embedding = "model.embed_tokens.weight"
        table = self.weight(self.checkpoint.expect(embedding, decoder.vocabulary, decoder.hidden))
        stream = self.op("Gather", [table, ids], "model.embed_tokens")
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
            normed = self.op("Slice", [normed, *self._ints([-1], [2**31], [1])], "last_position")
        logits = self._head(normed, table)
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
        return ir.Model(self.graph, ir_version=10, producer_name="ara")

    def _refuse_leftovers(self) -> None:
        """Every tensor of the checkpoint must have found its place: one that has not is a part we do not know."""
        left = [name for name in self.checkpoint.names() if name not in self.used and not name.endswith(".inv_freq")]
        if left:
            raise ModelError(
                f"{len(left)} tensors of the checkpoint have no place in the graph, {left[0]} among them",
                "the model has parts that export/onnx/graph.py does not know: it cannot be exported",
            )

    def _head(self, x: ir.Value, table: ir.Value) -> ir.Value:
        """Return logits; a tied head multiplies by the embedding, which stays one tensor."""
        # A head of its own that is stored is used, whatever the config says: so does transformers.
        if not self.decoder.tied or self.checkpoint.has("lm_head.weight"):
            return self.linear(x, self._layer("lm_head", self.decoder.vocabulary, self.decoder.hidden))
        if self.options.precision == "int8":
            return self._matmul(x, "lm_head", "model.embed_tokens.weight")
        return self.op("FusedMatMul", [x, table], "lm_head", {"transB": 1}, domain=_CONTRIB)

    # -- parts of a block ---------------------------------------------------------------------------------------

    def _norm(self, x: ir.Value, delta: ir.Value | None, path: str) -> tuple[ir.Value, ir.Value]:
        """Return norm(x + delta) and x + delta; x where there is no delta."""
        gamma = self._gamma(f"{path}.weight", self.decoder.hidden)
        attributes: dict[str, Any] = {"epsilon": self.decoder.epsilon}
        if delta is None:
            return self._plain_norm(x, gamma, path), x
        normed, _, _, summed = self.ops(
            "SkipSimplifiedLayerNormalization", [x, delta, gamma], path, attributes, 4, _CONTRIB
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
            "GroupQueryAttention", [*projected, *past, *lengths, *rotary], path, attributes, 3, _CONTRIB
        )
        return self.linear(attended, self._layer(f"{path}.o_proj", decoder.hidden, query)), present

    def _norm_heads(self, x: ir.Value, heads: int, path: str) -> ir.Value:
        width = self.decoder.head
        gamma = self._gamma(f"{path}.weight", width)
        split = self.op("Reshape", [x, self._ints([0, 0, heads, width])[0]], f"{path}.split")
        normed = self._plain_norm(split, gamma, path)
        return self.op("Reshape", [normed, self._ints([0, 0, heads * width])[0]], f"{path}.joined")

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

    # -- linear layers ------------------------------------------------------------------------------------------

    def _layer(self, path: str, m: int, n: int) -> LinearLayer:
        return self.checkpoint.linear(path, m, n)

    def linear(self, x: ir.Value, layer: LinearLayer) -> ir.Value:
        """Return the output of a linear layer, (…, n) → (…, m)."""
        return self.linears(x, [layer], layer.path)[0]

    def linears(self, x: ir.Value, layers: Sequence[LinearLayer], path: str) -> list[ir.Value]:
        """Return the outputs of layers that read the same input, together named ``path``."""
        first = [f"{layer.path}.weight" if layer.rank is None else f"{layer.path}.A.weight" for layer in layers]
        if self.options.merge_shared_inputs and len(layers) > 1:
            sizes = [layer.m if layer.rank is None else layer.rank for layer in layers]
            inner = self.split(self._matmul(x, f"{path}.merged", *first), sizes, path)
        else:
            inner = [self._matmul(x, name.removesuffix(".weight"), name) for name in first]
        return [self._rest(h, layer) for h, layer in zip(inner, layers, strict=True)]

    def _rest(self, h: ir.Value, layer: LinearLayer) -> ir.Value:
        """Return what is left of a layer once its first matrix is multiplied."""
        y = h
        if layer.rank is not None and not layer.pivoted:
            y = self._matmul(h, f"{layer.path}.B", f"{layer.path}.B.weight")
        elif layer.rank is not None:
            others = self._matmul(h, f"{layer.path}.C", f"{layer.path}.C.weight")
            y = self.op("Concat", [h, others], f"{layer.path}.rows", {"axis": -1})
            order = self._order(layer)
            if layer.block > 1:
                apart, whole = self._ints([0, 0, layer.m // layer.block, layer.block], [0, 0, layer.m])
                blocks = self.op("Reshape", [y, apart], f"{layer.path}.blocks")
                ordered = self.op("Gather", [blocks, order], f"{layer.path}.ordered", {"axis": 2})
                y = self.op("Reshape", [ordered, whole], f"{layer.path}.whole")
            else:
                for kind, name, attributes in ordering(3, self.options.provider):
                    y = self.op(kind, [y, order] if kind == "Gather" else [y], f"{layer.path}.{name}", attributes)
        if layer.bias is not None:
            y = self.op("Add", [y, self.weight(layer.bias)], f"{layer.path}.biased")
        return y

    def _order(self, layer: LinearLayer) -> ir.Value:
        name = f"{layer.path}.order"
        self.used.add(name)
        kind = ir.DataType.INT32 if layer.block == 1 else ir.DataType.INT64
        return self.lazy(name, kind, (layer.m // layer.block,), lambda: self.checkpoint.tensor(name).numpy())

    def _matmul(self, x: ir.Value, path: str, *names: str) -> ir.Value:
        """Multiply by weights of the checkpoint, (out, in) each, that are put under each other."""
        self.used.update(names)
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
            lambda: quantize(stacked(), _TORCH[self.float]),
        )
        scales = self.lazy(
            f"{path}.scales", self.float, (m * blocks,), lambda: self._array(scales_of(stacked(), _TORCH[self.float]))
        )
        attributes = {"K": n, "N": m, "bits": BITS, "block_size": BLOCK, "accuracy_level": 4}
        return self.op("MatMulNBits", [x, packed, scales], path, attributes, domain=_CONTRIB)

    # -- inputs and lengths -------------------------------------------------------------------------------------

    def _cache_shape(self, length: str) -> list[Any]:
        return ["b", self.decoder.kv_heads, length, self.decoder.head]

    def _cache_inputs(self, layer: int) -> list[ir.Value]:
        names = (f"past_key_values.{layer}.key", f"past_key_values.{layer}.value")
        return [self.input(name, self.float, self._cache_shape("p")) for name in names]

    def _lengths(self, mask: ir.Value) -> list[ir.Value]:
        """Return the index of each row's last token, (b) int32, and t, a scalar int32: what the attention asks for."""
        axis, one, second = self._ints([1], 1, 1)
        int32 = {"to": ir.DataType.INT32.value}
        count = self.op("ReduceSum", [mask, axis], "lengths.count", {"keepdims": 0})
        last = self.op("Cast", [self.op("Sub", [count, one], "lengths.last")], "lengths.last_int32", int32)
        shape = self.op("Shape", [mask], "lengths.shape")
        total = self.op("Gather", [shape, second], "lengths.total", {"axis": 0})
        return [last, self.op("Cast", [total], "lengths.total_int32", int32)]

    # -- the graph ----------------------------------------------------------------------------------------------

    def input(self, name: str, kind: ir.DataType, shape: list[Any]) -> ir.Value:
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
        """Append a node called ``path`` (with the kind behind it) and return its outputs."""
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs, name=f"{path}/{kind}")
        for i, value in enumerate(node.outputs):
            value.name = f"{path}/{kind}/output_{i}"
        self.graph.append(node)
        return list(node.outputs)

    def split(self, x: ir.Value, sizes: Sequence[int], path: str) -> list[ir.Value]:
        """Split the last axis."""
        lengths = self._ints(list(sizes))[0]
        return self.ops("Split", [x, lengths], path, {"axis": -1}, len(sizes))

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Return a tensor held in memory; the one that is there already, if there is one of that name."""
        if name not in self.graph.initializers:
            self.graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
        return self.graph.initializers[name]

    def _ints(self, *values: list[int] | int) -> list[ir.Value]:
        return [self.constant(f"ints/{np.array(value).tolist()}", np.array(value, np.int64)) for value in values]

    def weight(self, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> ir.Value:
        """Return a tensor of the checkpoint under its own name."""
        self.used.add(name)
        return self.lazy(
            name,
            self.float,
            self.checkpoint.shape(name),
            lambda: self._array(change(self.checkpoint.tensor(name)) if change else self.checkpoint.tensor(name)),
        )

    def lazy(self, name: str, kind: ir.DataType, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> ir.Value:
        """Return a tensor that ``make`` yields whenever it is asked for."""
        if name not in self.graph.initializers:
            tensor = ir.LazyTensor(lambda: ir.tensor(make(), name=name), dtype=kind, shape=ir.Shape(shape), name=name)
            self.graph.register_initializer(ir.val(name, const_value=tensor))
        return self.graph.initializers[name]

    def _array(self, tensor: torch.Tensor) -> np.ndarray:
        """Return a tensor in the precision of the activations."""
        converted = tensor.to(_TORCH[self.float])
        narrowed = self.float == ir.DataType.FLOAT16 and tensor.dtype != torch.float16 and tensor.numel() > 0
        # The ends are looked at, not all numbers: a mask of them would be a copy more.
        if narrowed and not torch.stack(converted.aminmax()).isfinite().all():
            raise NumericalError("a weight is beyond the range of float16", "export with --precision fp32")
        found: np.ndarray = converted.contiguous().numpy()
        return found
