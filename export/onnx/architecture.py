"""Sizes and variants of a decoder, read from its ``config.json`` for the graph builder.

How families differ is data in :mod:`export.onnx.families`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ara.errors import UnsupportedModelError, first_line
from export.onnx.config_fields import ConfigFields, Rope, read_context, read_fields, wrong_config
from export.onnx.families import FAMILIES, Family, HeadNorm, Power

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
# Rotary variants whose angles depend on the position alone, within the model's context.
_ROPES = ("default", "linear", "dynamic", "llama3", "yarn")
# GroupQueryAttention of ONNX Runtime rotates the whole head or its first part; both widths must be multiples of this.
_HEAD_MULTIPLE = 16
# Types of blocks in ``layer_types``: attention to all positions, or to those in the window.
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, eq=False)
class Rotary:
    """The angles of a rotary embedding.

    Attributes:
        frequencies: (rotated / 2) float32, angle per position.
        scale: factor on cosine and sine (YaRN).
    """

    frequencies: torch.Tensor
    scale: float


@dataclass(frozen=True)
class MixtureSizes:
    """Sizes of mixtures of experts.

    Attributes:
        experts: their number.
        chosen: how many a token gets.
        width: of an expert.
        shared: width of the expert for all tokens; ``None``: there is none.
        normalised: whether the weights of a token's experts are divided by their sum.
        scale: factor of these weights.
        blocks: per block, whether it has a mixture; else it has an MLP.
    """

    experts: int
    chosen: int
    width: int
    shared: int | None
    normalised: bool
    scale: float
    blocks: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Decoder:
    """Sizes and variants of a decoder-only model.

    Attributes:
        model_type: of the config.
        family: its record.
        hidden: width of the residual stream.
        layers: number of blocks.
        heads: query heads.
        kv_heads: key and value heads.
        head: width of a head.
        intermediate: width of the MLP.
        vocabulary: rows of the embedding.
        context: number of positions.
        epsilon: added to the mean square in the norms.
        mixture: of experts, if blocks have one.
        activation: function in the MLP and in experts.
        head_norm: norms of queries and keys, if there are any.
        parallel: whether attention and MLP of a block read the same stream.
        tied: whether the head is the embedding.
        attention_scale: factor on attention scores.
        attention_cap: limit of attention scores; ``None``: there is none.
        embedding_scale: factor on the embeddings.
        residual_scale: factor on the outputs of attention and MLP.
        logit_scale: factor on the logits.
        logit_cap: limit of the logits; ``None``: there is none.
        windows: per block, size of its sliding window in tokens; ``None``: it attends to all positions.
        rotary: name → rotary embedding. The name is the type of the blocks that use it, or empty for all types.
        rotations: per block, name of its rotary embedding; ``None``: it does not rotate.
        bos, pad: token ids; ``None`` where the model has none.
    """

    model_type: str
    family: Family
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int
    vocabulary: int
    context: int
    epsilon: float
    mixture: MixtureSizes | None
    activation: Activation
    head_norm: HeadNorm | None
    parallel: bool
    tied: bool
    attention_scale: float
    attention_cap: float | None
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    logit_cap: float | None
    windows: tuple[int | None, ...]
    rotary: Mapping[str, Rotary]
    rotations: tuple[str | None, ...]
    bos: int | None
    pad: int | None

    def rotary_tables(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine of every position: (context, rotated / 2) float32 each."""
        rotary = self.rotary[name]
        angles = torch.arange(self.context, dtype=torch.float32)[:, None] * rotary.frequencies
        return angles.cos() * rotary.scale, angles.sin() * rotary.scale


def read_decoder(config: PreTrainedConfig) -> Decoder:
    """Return the sizes and variants of a model.

    Raises:
        UnsupportedModelError: an unknown family, rotary variant, activation, type of block or head width; a value that
            no graph can have; no number of positions.
        ModelError: a field is missing or invalid.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"the ONNX graph builder does not know the family {config.model_type!r}; "
            f"known are {', '.join(sorted(FAMILIES))}",
            "add an entry to FAMILIES in export/onnx/families.py (see CONTRIBUTING.md)",
        )
    fields = read_fields(config, family)
    if fields.use_bidirectional_attention:
        raise UnsupportedModelError("the model reads text in both directions", "only decoders can be exported")
    if fields.activation not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"the activation {fields.activation!r} is not known; known are {', '.join(sorted(_ACTIVATIONS))}",
            "add it to export/onnx/architecture.py and export/onnx/block_nodes.py",
        )
    windows = _windows(fields, family)
    rotations = _rotations(fields, family, windows)
    names = sorted({name for name in rotations if name is not None})
    rotary = {name: _rotary(config, fields, family, name) for name in names}
    _check_widths(fields.head, rotary)
    head_norm, parallel = family.head_norm, family.parallel
    return Decoder(
        model_type=config.model_type,
        family=family,
        hidden=fields.hidden_size,
        layers=fields.num_hidden_layers,
        heads=fields.num_attention_heads,
        kv_heads=fields.kv_heads,
        head=fields.head,
        intermediate=fields.intermediate or 4 * fields.hidden_size,
        vocabulary=fields.vocab_size,
        context=read_context(config),
        epsilon=fields.epsilon,
        mixture=_mixture(fields, family),
        activation=_ACTIVATIONS[fields.activation],
        head_norm=head_norm if head_norm and (head_norm.when is None or fields.head_norm) else None,
        parallel=parallel is not None and (parallel.when is None or fields.parallel),
        tied=fields.tie_word_embeddings,
        attention_scale=_power(family.attention_scale, fields.attention_scale, fields.head**-0.5),
        attention_cap=fields.attention_cap,
        embedding_scale=_power(family.embedding_scale, fields.embedding_scale),
        residual_scale=_power(family.residual_scale, fields.residual_scale),
        logit_scale=_power(family.logit_scale, fields.logit_scale),
        logit_cap=fields.logit_cap,
        windows=windows,
        rotary=rotary,
        rotations=rotations,
        bos=fields.bos_token_id,
        pad=fields.pad_token_id,
    )


def _mixture(fields: ConfigFields, family: Family) -> MixtureSizes | None:
    if family.mixture is None:
        return None
    experts, chosen, width = fields.experts, fields.chosen, fields.expert_width
    if experts is None or chosen is None or width is None:
        raise wrong_config("the number of experts, how many a token gets, or their width is missing")
    if chosen > experts:
        raise wrong_config(f"a token cannot get {chosen} of {experts} experts")
    shared = fields.shared_width if fields.shared_count is None else fields.shared_count * width
    if family.mixture.shared is not None and shared is None:
        raise wrong_config(f"{family.mixture.shared_count or family.mixture.shared_width} is missing")
    plain = {*range(fields.first_mixture), *(fields.plain_blocks or ())}
    blocks = tuple(at not in plain and (at + 1) % fields.sparse_step == 0 for at in range(fields.num_hidden_layers))
    return MixtureSizes(experts, chosen, width, shared, fields.normalised, fields.expert_scale, blocks)


def _power(power: Power | None, value: float | None, otherwise: float = 1.0) -> float:
    """Return a factor, from the value of its field; ``otherwise`` where the family has none."""
    return otherwise if power is None or value is None else value**power.exponent


def _windows(fields: ConfigFields, family: Family) -> tuple[int | None, ...]:
    """Return the sliding window of each block, from ``sliding_window`` and ``layer_types``."""
    window = fields.sliding_window or None
    if family.windows != "by_type":
        return (window,) * fields.num_hidden_layers
    types = _types(fields)
    if _SLIDING in types and window is None:
        raise wrong_config(f"layer_types names {_SLIDING}, and sliding_window is missing")
    return tuple(window if kind == _SLIDING else None for kind in types)


def _types(fields: ConfigFields) -> list[str]:
    """Return the type of each block."""
    types = fields.layer_types
    if types is None:
        raise wrong_config("layer_types is missing")
    unknown = sorted(set(types) - {_FULL, _SLIDING})
    if unknown:
        raise UnsupportedModelError(
            f"layer_types names {unknown[0]!r}; the ONNX graph builder knows {_FULL} and {_SLIDING}",
            "this model cannot be exported",
        )
    return types


def _rotations(fields: ConfigFields, family: Family, windows: tuple[int | None, ...]) -> tuple[str | None, ...]:
    """Return the name of each block's rotary embedding, or ``None``."""
    rotation, count = family.rotation, fields.num_hidden_layers
    if rotation is None:
        return (None,) * count
    names = _types(fields) if rotation.by_type else [""] * count
    rotates: list[bool]
    if rotation.blocks == "listed":
        if fields.rotated is None:
            raise wrong_config("no_rope_layers is missing")
        rotates = [bool(one) for one in fields.rotated]
    elif rotation.blocks == "all" or (rotation.blocks == "windowed_if_any" and not fields.sliding_window):
        rotates = [True] * count
    else:
        rotates = [window is not None for window in windows]
    return tuple(name if yes else None for name, yes in zip(names, rotates, strict=True))


def _rotary(config: PreTrainedConfig, fields: ConfigFields, family: Family, name: str) -> Rotary:
    """Return a rotary embedding by its name, by transformers' own formulas."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert family.rotation is not None
    rope: Rope | None = (fields.rope_by_type or {}).get(name) if name else fields.rope
    if rope is None:
        raise wrong_config(f"rope_parameters{f' of {name}' if name else ''}: Field required")
    kind = rope.rope_type
    if kind not in _ROPES:
        raise UnsupportedModelError(
            f"rotary embeddings of type {kind!r} depend on more than the position; known are {', '.join(_ROPES)}",
            "this model cannot be exported exactly, so ARA does not export it",
        )
    if kind == "default":
        rotated = int(fields.head * (rope.partial_rotary_factor if family.rotation.partial else 1.0))
        exponents = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
        return Rotary(1.0 / rope.rope_theta**exponents, 1.0)
    # ``dynamic`` changes its angles only beyond the context, and an exported graph ends there.
    try:
        by_type = {"layer_type": name} if name else {}
        found, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **by_type)
        frequencies, factor = found.float(), float(scale)
    except Exception as error:  # missing or invalid fields raise errors of many classes
        raise wrong_config(f"rope_parameters of type {kind}: {type(error).__name__}: {first_line(error)}") from error
    if not (bool(frequencies.isfinite().all()) and math.isfinite(factor)):
        raise wrong_config(f"rope_parameters of type {kind} give angles that are not finite")
    return Rotary(frequencies, factor)


def _check_widths(head: int, rotary: Mapping[str, Rotary]) -> None:
    """Refuse heads that ONNX Runtime cannot rotate."""
    for one in rotary.values():
        rotated = 2 * len(one.frequencies)
        if head % _HEAD_MULTIPLE or rotated % _HEAD_MULTIPLE or not 0 < rotated <= head:
            raise UnsupportedModelError(
                f"heads are {head} wide and {rotated} of that is rotated; ONNX Runtime's GroupQueryAttention needs "
                f"multiples of {_HEAD_MULTIPLE}",
                "this model cannot be exported with fused attention",
            )
