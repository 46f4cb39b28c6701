"""The fields of ``config.json`` that the graph builder reads, each checked: a checkpoint may come from anyone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ara.errors import ModelError, UnsupportedModelError, first_line
from ara.models.context import context_length
from export.onnx.families import Family, Same

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Far above those of any model, and small enough for memory and for ONNX's integers.
_MOST_LAYERS, _WIDEST_HEAD, _MOST_POSITIONS, _MOST_EXPERTS = 10_000, 65_536, 2**31 - 1, 4096


class Rope(BaseModel):
    """``rope_parameters``: the fields of every rotary embedding. Variants have more."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    rope_type: str = "default"
    rope_theta: float = Field(gt=0)
    partial_rotary_factor: float = Field(1.0, gt=0, le=1)


class ConfigFields(BaseModel):
    """The fields that are read, with types and ranges.

    Fields below the first group are read only in families that have them; :func:`read_fields` says under which names.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    hidden_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1, le=_MOST_LAYERS)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)
    head_dim: int | None = Field(None, ge=1, le=_WIDEST_HEAD)
    vocab_size: int = Field(ge=1)
    tie_word_embeddings: bool = False
    bos_token_id: int | None = Field(None, ge=0)
    pad_token_id: int | None = None
    use_bidirectional_attention: bool | None = None

    activation: str
    intermediate: int | None = Field(None, ge=1)
    epsilon: float = Field(ge=0)
    # Qwen2-MoE writes 0 for none.
    sliding_window: int | None = Field(None, ge=0)
    layer_types: list[str] | None = None
    rotated: list[int] | None = None
    rope: Rope | None = None
    rope_by_type: dict[str, Rope] | None = None
    head_norm: bool | None = None
    parallel: bool = False
    experts: int | None = Field(None, ge=1, le=_MOST_EXPERTS)
    chosen: int | None = Field(None, ge=1)
    expert_width: int | None = Field(None, ge=1)
    shared_width: int | None = Field(None, ge=1)
    shared_count: int | None = Field(None, ge=1)
    expert_scale: float = Field(1.0, gt=0)
    first_mixture: int = Field(0, ge=0)
    normalised: bool = True
    sparse_step: int = Field(1, ge=1)
    plain_blocks: list[int] | None = None
    attention_cap: float | None = Field(None, gt=0)
    logit_cap: float | None = Field(None, gt=0)
    attention_scale: float | None = Field(None, gt=0)
    embedding_scale: float = Field(1.0, gt=0)
    residual_scale: float = Field(1.0, gt=0)
    logit_scale: float = Field(1.0, gt=0)

    @property
    def head(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads


# Fields of every family, under their own names.
COMMON = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "bos_token_id",
    "pad_token_id",
    "use_bidirectional_attention",
)


def field_names(family: Family) -> dict[str, str]:
    """Return what is read from a config of this family: field of :class:`ConfigFields` → field of the config."""
    norm, rotation, head_norm, parallel = family.norm, family.rotation, family.head_norm, family.parallel
    factors = {
        "attention_scale": family.attention_scale,
        "embedding_scale": family.embedding_scale,
        "residual_scale": family.residual_scale,
        "logit_scale": family.logit_scale,
    }
    mixture = family.mixture
    found: dict[str, str | None] = {
        **{name: name for name in COMMON},
        "experts": mixture.experts if mixture else None,
        "chosen": mixture.chosen if mixture else None,
        "expert_width": mixture.width if mixture else None,
        "normalised": mixture.normalised if mixture else None,
        "shared_width": mixture.shared_width if mixture and mixture.shared and not mixture.shared_count else None,
        "shared_count": mixture.shared_count if mixture else None,
        "expert_scale": mixture.scale if mixture else None,
        "first_mixture": mixture.first if mixture else None,
        "sparse_step": "decoder_sparse_step" if mixture and mixture.blocks else None,
        "plain_blocks": "mlp_only_layers" if mixture and mixture.blocks else None,
        "activation": family.activation,
        "intermediate": family.intermediate,
        "epsilon": norm.epsilon if isinstance(norm.epsilon, str) else None,
        "sliding_window": "sliding_window" if family.windows else None,
        "layer_types": "layer_types" if family.windows == "by_type" else None,
        "rope": "rope_parameters" if rotation and not rotation.by_type else None,
        "rope_by_type": "rope_parameters" if rotation and rotation.by_type else None,
        "rotated": "no_rope_layers" if rotation and rotation.blocks == "listed" else None,
        "head_norm": head_norm.when if head_norm else None,
        "parallel": parallel.when if parallel else None,
        "attention_cap": family.attention_cap,
        "logit_cap": family.logit_cap,
        **{name: power.field if power else None for name, power in factors.items()},
    }
    return {name: field for name, field in found.items() if field is not None}


def read_fields(config: PreTrainedConfig, family: Family) -> ConfigFields:
    """Return the fields of a config, with types and ranges checked.

    Raises:
        UnsupportedModelError: a field has a value that no graph of this family can have.
        ModelError: a field is missing or invalid; the message names the first.
    """
    names = field_names(family)
    values = {name: getattr(config, field) for name, field in names.items() if hasattr(config, field)}
    if not isinstance(family.norm.epsilon, str):
        values["epsilon"] = family.norm.epsilon
    try:
        fields = ConfigFields.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place, *inside = map(str, first["loc"])
        raise wrong_config(f"{'.'.join([names.get(place, place), *inside])}: {first['msg']}") from None
    for field, wanted in family.only.items():
        expected = getattr(config, wanted.field) if isinstance(wanted, Same) else wanted
        # A field that is missing has its default value, which is the wanted one.
        found = getattr(config, field, expected)
        if found != expected:
            raise UnsupportedModelError(
                f"{field} of this {config.model_type} model is {found!r}; the ONNX graph builder knows only "
                f"{expected!r}",
                "this model cannot be exported",
            )
    if fields.num_attention_heads % fields.kv_heads:
        raise wrong_config(
            f"{fields.num_attention_heads} query heads cannot share {fields.kv_heads} key and value heads"
        )
    for name in ("layer_types", "rotated"):
        listed = getattr(fields, name)
        if listed is not None and len(listed) != fields.num_hidden_layers:
            raise wrong_config(f"it has {fields.num_hidden_layers} layers and {len(listed)} {names[name]}")
    return fields


def wrong_config(what: str) -> ModelError:
    """Return the error for a config with a wrong value."""
    return ModelError(
        f"the checkpoint's config.json cannot be used: {what}", "use the config.json that belongs to these weights"
    )


def read_context(config: PreTrainedConfig) -> int:
    """Return the number of positions of a model, for which the graph's tables and caches are made.

    Raises:
        UnsupportedModelError: the config has no such number, like those of BLOOM, MPT and Mamba.
        ModelError: its value is not a number of positions.
    """
    try:
        found: Any = context_length(config)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise wrong_config(f"rope_parameters: {first_line(error)}") from None
    if found is None:
        raise UnsupportedModelError(
            f"the config of this {config.model_type} model names no number of positions (max_position_embeddings), "
            "which an exported graph needs",
            "add max_position_embeddings to config.json if the model has such a limit",
        )
    if not isinstance(found, int) or not 1 <= found <= _MOST_POSITIONS:
        raise wrong_config(f"max_position_embeddings is {found!r}, expected a number of positions")
    return found
