"""The fields of ``config.json`` that the graph builder reads, each checked: a checkpoint may come from anyone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ara.errors import ModelError, UnsupportedModelError, first_line
from ara.jsonfile import first_problem
from ara.models.context import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Far above those of any model, and small enough for memory and for ONNX's integers.
_MOST_LAYERS, _WIDEST_HEAD, _MOST_POSITIONS = 10_000, 65_536, 2**31 - 1


class _Rope(BaseModel):
    """``rope_parameters``: the fields of every rotary embedding. Variants have more."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    rope_type: str = "default"
    rope_theta: float = Field(gt=0)
    partial_rotary_factor: float = Field(1.0, gt=0, le=1)


class ConfigFields(BaseModel):
    """The fields that are read, with types and ranges."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, from_attributes=True)

    hidden_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1, le=_MOST_LAYERS)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)
    head_dim: int | None = Field(None, ge=1, le=_WIDEST_HEAD)
    intermediate_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    rms_norm_eps: float = Field(ge=0)
    hidden_act: str | None = None
    hidden_activation: str | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = Field(None, ge=0)
    pad_token_id: int | None = None
    sliding_window: int | None = Field(None, ge=1)
    use_sliding_window: bool = True
    layer_types: list[str] | None = None
    use_bidirectional_attention: bool | None = None
    rope_parameters: _Rope

    @property
    def head(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads


def read_fields(config: PreTrainedConfig) -> ConfigFields:
    """Return the fields of a config, with types and ranges checked.

    Raises:
        ModelError: a field is missing or invalid; the message names the first.
    """
    try:
        fields = ConfigFields.model_validate(config)
    except ValidationError as error:
        raise wrong_config(first_problem(error)) from None
    if fields.num_attention_heads % fields.kv_heads:
        raise wrong_config(
            f"{fields.num_attention_heads} query heads cannot share {fields.kv_heads} key and value heads"
        )
    if fields.layer_types is not None and len(fields.layer_types) != fields.num_hidden_layers:
        raise wrong_config(f"it has {fields.num_hidden_layers} layers and {len(fields.layer_types)} layer_types")
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
