"""Sizes and variants of a decoder, read from its ``config.json`` for the graph builder.

A family is one entry of :data:`FAMILIES`. All families share Llama's module names; their differences are data here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ara.errors import UnsupportedModelError, first_line
from export.onnx.config_fields import ConfigFields, read_context, read_fields, wrong_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Activation = Literal["silu", "gelu", "gelu_tanh"]
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Rotary variants whose angles depend on the position alone, within the model's context.
_ROPES = ("default", "linear", "dynamic", "llama3", "yarn")
# GroupQueryAttention of ONNX Runtime rotates the whole head or its first part; both widths must be multiples of this.
_HEAD_MULTIPLE = 16


@dataclass(frozen=True, eq=False)
class Decoder:
    """Sizes and variants of a decoder-only model.

    Attributes:
        family: ``model_type`` of the config.
        hidden: width of the residual stream.
        layers: number of blocks.
        heads: query heads.
        kv_heads: key and value heads.
        head: width of a head.
        intermediate: width of the gated layer.
        vocabulary: rows of the embedding.
        context: number of positions.
        epsilon: added to the mean square in the norms.
        norm_offset: added to the norms' weights (Gemma stores w − 1).
        embedding_scale: factor on the embeddings.
        activation: function applied to the gate.
        head_norm: whether queries and keys are normed per head (Qwen3).
        tied: whether the head is the embedding.
        scale: factor on attention scores.
        windows: per block, size of its sliding window in tokens; ``None``: it attends to all positions.
        packed: whether q, k, v are one layer, and gate, up another (Phi-3).
        frequencies: (rotated / 2) float32, angle per position.
        rope_scale: factor on cosine and sine (YaRN).
        bos, pad: token ids; ``None`` where the model has none.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int
    vocabulary: int
    context: int
    epsilon: float
    norm_offset: float
    embedding_scale: float
    activation: Activation
    head_norm: bool
    tied: bool
    scale: float
    windows: tuple[int | None, ...]
    packed: bool
    frequencies: torch.Tensor
    rope_scale: float
    bos: int | None
    pad: int | None

    def rotary_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine of every position: (context, rotated / 2) float32 each."""
        angles = torch.arange(self.context, dtype=torch.float32)[:, None] * self.frequencies
        return angles.cos() * self.rope_scale, angles.sin() * self.rope_scale


@dataclass(frozen=True)
class Family:
    """The differences between families that share Llama's module names.

    Attributes:
        head_norm: queries and keys are normed per head.
        norm_offset: added to the norms' weights.
        scaled_embedding: embeddings are multiplied by √hidden.
        packed: q, k, v are one layer, and gate, up another.
        partial_rotation: the config's ``partial_rotary_factor`` applies.
        switched_windows: the config's ``use_sliding_window`` applies.
    """

    head_norm: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    packed: bool = False
    partial_rotation: bool = False
    switched_windows: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(switched_windows=True),
    "qwen3": Family(head_norm=True, switched_windows=True),
    "gemma": Family(norm_offset=1.0, scaled_embedding=True),
    "phi3": Family(packed=True, partial_rotation=True),
}


def read_decoder(config: PreTrainedConfig) -> Decoder:
    """Return the sizes and variants of a model.

    Raises:
        UnsupportedModelError: an unknown family, rotary variant, activation or head width; no number of positions.
        ModelError: a field is missing or invalid.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"the ONNX graph builder does not know the family {config.model_type!r}; "
            f"known are {', '.join(sorted(FAMILIES))}",
            "add an entry to FAMILIES in export/onnx/architecture.py (see CONTRIBUTING.md)",
        )
    fields = read_fields(config)
    if fields.use_bidirectional_attention:
        raise UnsupportedModelError("the model reads text in both directions", "only decoders can be exported")
    name = fields.hidden_act or fields.hidden_activation
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"the activation {name!r} is not known; known are {', '.join(sorted(_ACTIVATIONS))}",
            "add it to export/onnx/architecture.py and export/onnx/graph.py",
        )
    head = fields.head
    frequencies, rope_scale = _rotary(config, fields, family)
    rotated = 2 * len(frequencies)
    if head % _HEAD_MULTIPLE or rotated % _HEAD_MULTIPLE:
        raise UnsupportedModelError(
            f"heads are {head} wide and {rotated} of that is rotated; ONNX Runtime's GroupQueryAttention needs "
            f"multiples of {_HEAD_MULTIPLE}",
            "this model cannot be exported with fused attention",
        )
    return Decoder(
        family=config.model_type,
        hidden=fields.hidden_size,
        layers=fields.num_hidden_layers,
        heads=fields.num_attention_heads,
        kv_heads=fields.kv_heads,
        head=head,
        intermediate=fields.intermediate_size,
        vocabulary=fields.vocab_size,
        context=read_context(config),
        epsilon=fields.rms_norm_eps,
        norm_offset=family.norm_offset,
        embedding_scale=fields.hidden_size**0.5 if family.scaled_embedding else 1.0,
        activation=_ACTIVATIONS[name],
        head_norm=family.head_norm,
        tied=fields.tie_word_embeddings,
        scale=head**-0.5,
        windows=_windows(fields, family),
        packed=family.packed,
        frequencies=frequencies,
        rope_scale=rope_scale,
        bos=fields.bos_token_id,
        pad=fields.pad_token_id,
    )


def _rotary(config: PreTrainedConfig, fields: ConfigFields, family: Family) -> tuple[torch.Tensor, float]:
    """Return the angles per position and the factor on cosine and sine, by transformers' own formulas."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, kind = fields.rope_parameters, fields.rope_parameters.rope_type
    if kind not in _ROPES:
        raise UnsupportedModelError(
            f"rotary embeddings of type {kind!r} depend on more than the position; known are {', '.join(_ROPES)}",
            "this model cannot be exported exactly, so ARA does not export it",
        )
    if kind == "default":
        rotated = int(fields.head * (rope.partial_rotary_factor if family.partial_rotation else 1.0))
        return 1.0 / rope.rope_theta ** (torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated), 1.0
    # ``dynamic`` changes its angles only beyond the context, and an exported graph ends there.
    try:
        found, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        frequencies, factor = found.float(), float(scale)
    except Exception as error:  # missing or invalid fields raise errors of many classes
        raise wrong_config(f"rope_parameters of type {kind}: {type(error).__name__}: {first_line(error)}") from error
    if not (bool(frequencies.isfinite().all()) and math.isfinite(factor)):
        raise wrong_config(f"rope_parameters of type {kind} give angles that are not finite")
    return frequencies, factor


def _windows(fields: ConfigFields, family: Family) -> tuple[int | None, ...]:
    """Return the sliding window of each block, from ``sliding_window`` and ``layer_types``."""
    window = fields.sliding_window
    if family.switched_windows and not fields.use_sliding_window:
        window = None
    kinds = fields.layer_types or ["sliding_attention" if window else "full_attention"] * fields.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
