"""The parts of a block in a graph: norms, attention with its cache, and the MLP, as the family's record says.

Shapes: b batch, s new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch

from export.onnx.architecture import Decoder
from export.onnx.graph_options import GraphOptions
from export.onnx.linear_nodes import LinearNodes
from export.onnx.nodes import CONTRIB
from export.onnx.stored_weights import Checkpoint, LinearLayer

# Norm that also adds two inputs, and norm of one: kind of :class:`export.onnx.families.Norm` → operators.
_NORMS = {
    "rms": ("SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"),
    "layer": ("SkipLayerNormalization", "LayerNormalization"),
}


class BlockNodes(LinearNodes):
    """A graph with the parts of a decoder's blocks.

    Args:
        checkpoint: compressed or dense.
        decoder: its sizes and variants.
        options: precision and provider.
    """

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, options: GraphOptions) -> None:
        super().__init__(checkpoint, options)
        self.decoder = decoder
        self.family = decoder.family
        self.names = decoder.family.names

    def block(
        self,
        stream: ir.Value,
        delta: ir.Value | None,
        layer: int,
        past: Sequence[ir.Value],
        lengths: Sequence[ir.Value],
    ) -> tuple[ir.Value, ir.Value, list[ir.Value]]:
        """Append a block.

        Args:
            stream: (b, s, hidden).
            delta: what must still be added to it; ``None``: nothing.
            layer: index of the block.
            past: its caches, keys and values.
            lengths: inputs of the attention, the last index of each row and the longest length.

        Returns:
            The stream and what must still be added to it, and the longer caches.
        """
        path, decoder = f"{self.names.blocks}.{layer}", self.decoder
        normed, stream = self._enter(stream, delta, path, "before_attention")
        attended, present = self._attention(normed, f"{path}.{self.names.attention}", layer, past, lengths)
        attended = self._leave(attended, path, "after_attention")
        if not decoder.parallel:
            normed, stream = self._enter(stream, attended, path, "before_mlp")
        elif not (self.family.parallel and self.family.parallel.one_norm):
            normed, _ = self._enter(stream, None, path, "before_mlp")
        mixture = decoder.mixture
        made = self._mixture(normed, path) if mixture and mixture.blocks[layer] else self._mlp(normed, path)
        delta = self._leave(made, path, "after_mlp")
        if decoder.parallel:
            delta = self.op("Add", [attended, delta], f"{path}.both")
        return stream, delta, present

    def _enter(
        self, stream: ir.Value, delta: ir.Value | None, path: str, place: Literal["before_attention", "before_mlp"]
    ) -> tuple[ir.Value, ir.Value]:
        """Return what attention or MLP reads, and the stream with ``delta``."""
        name = getattr(self.family.places, place)
        if name is not None:
            return self.norm(stream, delta, f"{path}.{name}")
        summed = stream if delta is None else self.op("Add", [stream, delta], f"{path}.{place}")
        return summed, summed

    def _leave(self, x: ir.Value, path: str, place: Literal["after_attention", "after_mlp"]) -> ir.Value:
        """Return what attention or MLP adds to the stream, from its output."""
        name = getattr(self.family.places, place)
        if name is not None:
            x = self.norm(x, None, f"{path}.{name}")[0]
        return self.scaled(x, self.decoder.residual_scale, f"{path}.{place}")

    def scaled(self, x: ir.Value, factor: float, path: str) -> ir.Value:
        """Multiply by a number."""
        return x if factor == 1 else self.op("Mul", [x, self._number(factor, f"{path}.scale")], f"{path}.scaled")

    def capped(self, x: ir.Value, cap: float | None, path: str) -> ir.Value:
        """Return c · tanh(x / c)."""
        if cap is None:
            return x
        ratio = self.op("Mul", [x, self._number(1 / cap, f"{path}.inverse_cap")], f"{path}.ratio")
        bent = self.op("Tanh", [ratio], f"{path}.bent")
        return self.op("Mul", [bent, self._number(cap, f"{path}.cap")], f"{path}.capped")

    def _number(self, value: float, name: str) -> ir.Value:
        return self.constant(name, self._array(torch.tensor(value)))

    # -- norms --------------------------------------------------------------------------------------------------

    def norm(self, x: ir.Value, delta: ir.Value | None, path: str) -> tuple[ir.Value, ir.Value]:
        """Return norm(x + delta) and x + delta.

        Args:
            x: (b, s, hidden).
            delta: the same shape; ``None`` counts as zero.
            path: of the norm.
        """
        if delta is None:
            return self._plain_norm(x, path, self.decoder.hidden), x
        kind, attributes = _NORMS[self.family.norm.kind][0], {"epsilon": self.decoder.epsilon}
        inputs = [x, delta, *self._norm_weights(path, self.decoder.hidden)]
        normed, _, _, summed = self.ops(kind, inputs, path, attributes, 4, CONTRIB)
        return normed, summed

    def _plain_norm(self, x: ir.Value, path: str, width: int, *, weighted: bool = True) -> ir.Value:
        """Return the norm of x over its last axis, which has ``width`` numbers."""
        weights = self._norm_weights(path, width) if weighted else [self._ones(width)]
        attributes = {"epsilon": self.decoder.epsilon, "axis": -1, "stash_type": 1}
        return self.op(_NORMS[self.family.norm.kind][1], [x, *weights], path, attributes)

    def _norm_weights(self, path: str, width: int) -> list[ir.Value]:
        """Return weights and, where there are any, biases of a norm: (width) each."""
        if not self.family.norm.weighted:
            return [self._ones(width)]
        biases = [f"{path}.bias"] if self.checkpoint.has(f"{path}.bias") else []
        return [self._gamma(f"{path}.weight", width), *(self.weight(self.checkpoint.expect(n, width)) for n in biases)]

    def _gamma(self, name: str, *shape: int) -> ir.Value:
        self.checkpoint.expect(name, *shape)
        offset = self.family.norm.offset
        return self.weight(name, (lambda w: w.float() + offset) if offset else None)

    def _ones(self, width: int) -> ir.Value:
        return self.constant(f"ones/{width}", self._array(torch.ones(width)))

    # -- attention ----------------------------------------------------------------------------------------------

    def _attention(
        self, x: ir.Value, path: str, layer: int, past: Sequence[ir.Value], lengths: Sequence[ir.Value]
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Return the output (b, s, hidden) of the attention, and its longer caches."""
        decoder = self.decoder
        attributes: dict[str, Any] = {
            "num_heads": decoder.heads,
            "kv_num_heads": decoder.kv_heads,
            "scale": decoder.attention_scale,
        }
        window, rotation = decoder.windows[layer], decoder.rotations[layer]
        tables: list[ir.Value] = []
        if rotation is not None:
            assert self.family.rotation is not None
            attributes["do_rotary"] = 1
            if self.family.rotation.interleaved:
                attributes["rotary_interleaved"] = 1
            tables = self._rotary_tables(rotation)
        if window is not None:
            attributes["local_window_size"] = window
        if decoder.attention_cap is not None:
            attributes["softcap"] = decoder.attention_cap
        inputs = [*self._projected(x, path), *past, *lengths, *tables]
        attended, *present = self.ops("GroupQueryAttention", inputs, path, attributes, 3, CONTRIB)
        output = self._in_block(f"{path}.{self.names.output}", decoder.hidden, decoder.heads * decoder.head)
        return self.linear(attended, output), present

    def _projected(self, x: ir.Value, path: str) -> list[ir.Value | None]:
        """Return queries, keys and values; or all three as one, and twice ``None``."""
        decoder = self.decoder
        query, key = decoder.heads * decoder.head, decoder.kv_heads * decoder.head
        widths = [query, key, key] if len(self.names.qkv) == 3 else [query + 2 * key]
        layers = [
            self._in_block(f"{path}.{name}", width, decoder.hidden)
            for name, width in zip(self.names.qkv, widths, strict=True)
        ]
        values = self.linears(x, layers, f"{path}.qkv")
        if self.family.qkv_by_head:
            values = [self._parts_first(values[0], f"{path}.qkv")]
        if len(values) == 1:
            return [values[0], None, None]
        if (norm := decoder.head_norm) is not None:
            values[0] = self._norm_heads(values[0], decoder.heads, f"{path}.{norm.query}")
            values[1] = self._norm_heads(values[1], decoder.kv_heads, f"{path}.{norm.key}")
        return [*values]

    def _parts_first(self, x: ir.Value, path: str) -> ir.Value:
        """Reorder the last axis from (head, part, width) to (part, head, width); parts are query, key and value."""
        heads, width = self.decoder.heads, self.decoder.head
        apart, whole = self.ints([0, 0, heads, 3, width], [0, 0, heads * 3 * width])
        split = self.op("Reshape", [x, apart], f"{path}.split")
        ordered = self.op("Transpose", [split], f"{path}.ordered", {"perm": [0, 1, 3, 2, 4]})
        return self.op("Reshape", [ordered, whole], f"{path}.joined")

    def _norm_heads(self, x: ir.Value, heads: int, path: str) -> ir.Value:
        """Return the normed queries or keys, (b, s, heads · width)."""
        assert self.decoder.head_norm is not None
        width, over = self.decoder.head, self.decoder.head_norm.over
        if over == "width":
            return self._plain_norm(x, path, heads * width)
        split = self.op("Reshape", [x, self.ints([0, 0, heads, width])[0]], f"{path}.split")
        normed = self._plain_norm(split, path, width, weighted=over == "head")
        if over == "each":
            normed = self.op("Mul", [normed, self._gamma(f"{path}.weight", heads, width)], f"{path}.weighted")
        return self.op("Reshape", [normed, self.ints([0, 0, heads * width])[0]], f"{path}.joined")

    def _rotary_tables(self, name: str) -> list[ir.Value]:
        """Return cosine and sine of every position; each is stored once."""
        prefix = f"rotary.{name}." if name else "rotary."
        found = self.graph.initializers
        if f"{prefix}cos" not in found:
            for part, table in zip(("cos", "sin"), self.decoder.rotary_tables(name), strict=True):
                self.constant(f"{prefix}{part}", self._array(table))
        return [found[f"{prefix}cos"], found[f"{prefix}sin"]]

    # -- the MLP ------------------------------------------------------------------------------------------------

    def _mlp(self, x: ir.Value, block: str) -> ir.Value:
        """Return the output (b, s, hidden) of the MLP."""
        path = ".".join(filter(None, (block, self.names.mlp)))
        return self._feed_forward(x, path, path, self.names.up, self.names.down, self.decoder.intermediate)

    def _feed_forward(self, x: ir.Value, path: str, inside: str, up: Sequence[str], down: str, width: int) -> ir.Value:
        """Return the output (…, hidden) of layers up to ``width`` numbers, an activation and a layer down.

        Args:
            x: (…, hidden).
            path: of the nodes.
            inside: module of the layers.
            up: names of the first layers: gate and up, or one layer.
            down: name of the last one.
            width: between them.
        """
        hidden, gated = self.decoder.hidden, self.family.gated
        each = width * (2 if gated and len(up) == 1 else 1)
        layers = [self._in_block(f"{inside}.{name}", each, hidden) for name in up]
        first, *rest = self.linears(x, layers, f"{path}.gate_up")
        if gated and not rest:
            first, *rest = self.split(first, [width, width], f"{path}.gate_up")
        inner = self._activated(first, path)
        if rest:
            inner = self.op("Mul", [inner, rest[0]], f"{path}.gated")
        return self.linear(inner, self._in_block(f"{inside}.{down}", hidden, width))

    # -- mixtures of experts ------------------------------------------------------------------------------------

    def _mixture(self, x: ir.Value, block: str) -> ir.Value:
        """Return the output (b, s, hidden) of a mixture of experts. Every expert reads the tokens that chose it."""
        sizes, record, hidden = self.decoder.mixture, self.family.mixture, self.decoder.hidden
        assert sizes is not None and record is not None
        path = f"{block}.{self.names.mlp}"
        inside = f"{path}.{record.path}"
        rows, column, axis = self.ints([-1, hidden], 0, [1])
        flat = self.op("Reshape", [x, rows], f"{path}.tokens")
        weights, indices = self._routes(flat, f"{path}.{record.router}")
        # In float32, as ONNX Runtime adds to rows in float16 on no CPU.
        exact = self._cast(flat, ir.DataType.FLOAT, f"{path}.exact")
        total = self.op("Sub", [exact, exact], f"{path}.start")
        for expert in range(sizes.experts):
            name = f"{inside}.{expert}"
            # ONNX Runtime has no kernel for Equal of this version on CUDA.
            differs = self.op("Sub", [indices, self.ints(expert)[0]], f"{name}.difference")
            others = self.op("Cast", [differs], f"{name}.others", {"to": ir.DataType.BOOL.value})
            chose = self.op("Not", [others], f"{name}.chose")
            places = self.op("Transpose", [self.op("NonZero", [chose], f"{name}.found")], f"{name}.places")
            tokens = self.op("Gather", [places, column], f"{name}.rows", {"axis": 1})
            read = self.op("Gather", [flat, tokens], f"{name}.read", {"axis": 0})
            made = self._feed_forward(
                read, name, inside, (f"gate_up_proj.{expert}",), f"down_proj.{expert}", sizes.width
            )
            made = self._cast(made, ir.DataType.FLOAT, f"{name}.exact")
            weight = self.op("GatherND", [weights, places], f"{name}.weight")
            made = self.op("Mul", [made, self.op("Unsqueeze", [weight, axis], f"{name}.column")], f"{name}.weighted")
            at = self.op("Unsqueeze", [tokens, axis], f"{name}.at")
            total = self.op("ScatterND", [total, at, made], f"{name}.total", {"reduction": "add"})
        total = self._cast(total, self.float, f"{path}.rounded")
        if record.shared is not None:
            assert sizes.shared is not None
            total = self.op("Add", [total, self._shared_expert(flat, path, record.shared, sizes.shared)], f"{path}.all")
        shape = self.op("Shape", [x], f"{path}.shape")
        return self.op("Reshape", [total, shape], f"{path}.joined")

    def _routes(self, flat: ir.Value, path: str) -> tuple[ir.Value, ir.Value]:
        """Return the weights (t, c) and the numbers (t, c) int64 of the experts that the tokens choose, in float32."""
        sizes, record = self.decoder.mixture, self.family.mixture
        assert sizes is not None and record is not None
        name = self.checkpoint.expect(f"{path}.weight", sizes.experts, self.decoder.hidden)
        scores = self.op("FusedMatMul", [flat, self.weight(name)], path, {"transB": 1}, domain=CONTRIB)
        scores = self._cast(scores, ir.DataType.FLOAT, f"{path}.scores")
        if record.weights == "softmax":
            shares = self.op("Softmax", [scores], f"{path}.shares", {"axis": -1})
        else:
            shares = self.op("Sigmoid", [scores], f"{path}.shares")
        count, axis = self.ints([sizes.chosen], [1])
        ranked = shares
        if record.correction is not None:
            bias = self.exact_weight(self.checkpoint.expect(f"{path}.{record.correction}", sizes.experts))
            ranked = self.op("Add", [shares, bias], f"{path}.ranked")
        weights, indices = self.ops("TopK", [ranked, count], f"{path}.chosen", {"axis": -1}, 2)
        if ranked is not shares:
            places = self.op("Unsqueeze", [indices, self.ints([2])[0]], f"{path}.places")
            weights = self.op("GatherND", [shares, places], f"{path}.weights", {"batch_dims": 1})
        if sizes.normalised:
            total = self.op("ReduceSum", [weights, axis], f"{path}.sum", {"keepdims": 1})
            weights = self.op("Div", [weights, total], f"{path}.normalised")
        if sizes.scale != 1:
            factor = self.constant(f"{path}.factor", np.array(sizes.scale, np.float32))
            weights = self.op("Mul", [weights, factor], f"{path}.scaled")
        return weights, indices

    def _cast(self, x: ir.Value, kind: ir.DataType, path: str) -> ir.Value:
        """Return x, which has the graph's precision or float32, in one of the two."""
        return x if self.float == ir.DataType.FLOAT else self.op("Cast", [x], path, {"to": kind.value})

    def _shared_expert(self, flat: ir.Value, path: str, name: str, width: int) -> ir.Value:
        """Return the output (t, hidden) of the expert for all tokens, weighed by its gate if it has one."""
        assert self.family.mixture is not None
        inside, gate = f"{path}.{name}", f"{path}.{name}_gate"
        made = self._feed_forward(flat, inside, inside, self.names.up, self.names.down, width)
        if not self.family.mixture.shared_gate:
            return made
        share = self.op("Sigmoid", [self.linear(flat, self._in_block(gate, 1, self.decoder.hidden))], f"{gate}.share")
        return self.op("Mul", [made, share], f"{inside}.weighted")

    def _activated(self, x: ir.Value, path: str) -> ir.Value:
        match self.decoder.activation:
            case "silu":
                return self.op("Mul", [x, self.op("Sigmoid", [x], f"{path}.sigmoid")], f"{path}.silu")
            case "gelu":
                return self.op("Gelu", [x], f"{path}.gelu", {"approximate": "none"})
            case "gelu_tanh":
                return self.op("Gelu", [x], f"{path}.gelu", {"approximate": "tanh"})
            case "relu":
                return self.op("Relu", [x], f"{path}.relu")
            case "relu2":
                positive = self.op("Relu", [x], f"{path}.relu")
                return self.op("Mul", [positive, positive], f"{path}.squared")

    def _in_block(self, path: str, m: int, n: int) -> LinearLayer:
        """Return how the checkpoint stores a linear layer of a block, of m outputs and n inputs."""
        return self.checkpoint.linear(path, m, n, transposed=self.family.transposed)
