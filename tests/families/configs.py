"""Tiny configs of any architecture: transformers' default config, with every size that is known by name made small.

What a name does not tell is in ``special.toml``: values per model type.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ara.errors import first_line
from tests.tiny import MAX_POSITIONS, VOCABULARY

_SPECIAL = Path(__file__).with_name("special.toml")
# Sizes by the name of the field. No two widths are equal, so that a swapped axis fails.
_SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size text_vocab_size vocab_size_per_layer_input decoder_vocab_size pronunciation_vocab_size "
    "shape_vocab_size",
    MAX_POSITIONS: "max_position_embeddings n_positions n_ctx max_seq_len seq_length max_sequence_length "
    "max_target_positions max_source_positions original_max_position_embeddings model_max_length",
    96: "hidden_size d_model n_embd dim embed_dim embedding_size emb_dim word_embed_proj_dim lru_width "
    "hidden_size_global",
    76: "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim dim_ff dff d_ff ff_dim "
    "dense_intermediate_size intermediate_size_mlp mlp_intermediate_size block_ff_dim mlp_dim "
    "shared_intermediate_size",
    64: "mamba_d_ssm pronunciation_embed_dim shape_embed_dim router_hidden_size",
    40: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size ffn_hidden_size "
    "moe_shared_expert_intermediate_size",
    24: "q_lora_rank o_lora_rank",
    20: "kv_lora_rank",
    16: "head_dim global_head_dim d_kv kv_channels mamba_d_head mamba_head_dim mamba_headdim swa_head_dim "
    "attention_head_dim chunk_size mamba_chunk_size image_size ple_embed_dim",
    12: "qk_nope_head_dim v_head_dim index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
    "mamba_n_heads mamba_num_heads",
    10: "adapter_rank hc_lowrank",
    9: "hidden_size_per_layer_input time_step_rank",
    8: "qk_rope_head_dim sliding_window attention_window attention_window_size local_attention_window "
    "local_attention_window_len state_size mamba_d_state ssm_state_size rotary_dim attention_chunk_size index_topk",
    7: "laurel_rank",
    6: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads linear_num_heads",
    4: "num_experts n_routed_experts num_local_experts moe_num_experts mlp_num_experts patch_size "
    "linear_num_value_heads index_n_heads",
    2: "linear_num_key_heads altup_num_inputs o_groups",
    1: "n_group num_expert_group topk_group moe_num_shared_experts n_shared_experts num_shared_experts mamba_n_groups",
}
_BY_NAME = {name: size for size, names in _SIZES.items() for name in names.split()}
# Small numbers stay as they are: of experts per token, and of heads that queries share.
_AT_MOST_2 = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts", "num_experts_per_token")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_global_key_value_heads", "kv_n_heads")
# Set where the default is None.
_UNSET = {"head_dim": 16, "num_experts_per_tok": 2, "n_routed_experts": 4}
_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "depth"),
    *("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"),
)
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON = {"initializer_range": 0.1, "init_std": 0.1}


class NotBuilt(Exception):
    """No tiny model of an architecture can be made; the text says why."""


def default_config(kind: str) -> PreTrainedConfig:
    """Return transformers' default config of a model type.

    Raises:
        NotBuilt: there is none.
    """
    try:
        return CONFIG_MAPPING[kind]()
    except Exception as error:
        refused = error
    try:
        return CONFIG_MAPPING[kind](**_special().get(kind, {}))
    except Exception:
        raise NotBuilt(f"its config has no defaults ({first_line(refused)})") from refused


def tiny_config(kind: str, values: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Return a small config of a model type.

    Args:
        kind: model type.
        values: fields with a value other than that of the table.

    Raises:
        NotBuilt: the defaults make no config, or small values make none.
    """
    default = default_config(kind)
    try:
        return CONFIG_MAPPING[kind](**_merged(_merged(_shrunk(default), _special().get(kind, {})), values or {}))
    except Exception as error:
        raise NotBuilt(f"its config refuses small values ({first_line(error)})") from error


@functools.cache
def _special() -> dict[str, dict[str, Any]]:
    return tomllib.loads(_SPECIAL.read_text(encoding="utf-8"))


def _merged(values: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Merge ``own`` into ``values``, also inside tables. The string ``"none"`` means ``None``, which TOML lacks."""
    merged = dict(values)
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = None if value == "none" else value
    return merged


def _shrunk(default: PreTrainedConfig) -> dict[str, Any]:
    """Return small values for the fields of a config, and for the configs in it."""
    given = {key: value for key, value in default.to_dict().items() if key in vars(default)}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key in ("model_type", "transformers_version", "dtype", "architectures"):
            continue
        if isinstance(vars(default)[key], PreTrainedConfig):
            values[key] = _shrunk(vars(default)[key])
        elif (small := _small(key, value, given)) is not None:
            values[key] = small
    values |= _layers(given)
    return values


def _small(key: str, value: Any, given: Mapping[str, Any]) -> Any:
    """Return a small value of one field; ``None`` leaves its default."""
    if key in _TOKENS:
        return _TOKENS[key]
    if key in _COMMON and value is not None:
        return _COMMON[key]
    if value is None:
        return _UNSET.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    if key == "head_dim" and "qk_rope_head_dim" in given:
        return _BY_NAME["qk_rope_head_dim"]  # multi-head latent attention: of the part with positions
    if key in _AT_MOST_2:
        return min(value, 2)
    if key in _KEY_HEADS:
        heads = given.get("num_attention_heads")
        return 6 if value == heads else min(value, 2)
    if key in _BY_NAME:
        return _BY_NAME[key]
    if key.endswith(("_token_id", "_token_index")) and value >= VOCABULARY:
        return 3 + value % (VOCABULARY - 3)
    return None


def _layers(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many layers, at least 2, and of which kinds: one of every combination that lists per layer have."""
    names = [key for key in _LAYERS if isinstance(given.get(key), int)]
    values: dict[str, Any] = dict.fromkeys(names, 2)
    if not names:
        return values
    count = given[names[0]]
    lists = {key: value for key, value in given.items() if isinstance(value, list) and len(value) == count > 1}
    # Some configs list the layers of a kind by their indices.
    indices = {key: value for key, value in given.items() if isinstance(value, list) and _are_indices(value, count)}
    kinds = [
        repr([*(value[at] for key, value in lists.items() if key not in indices), *(at in i for i in indices.values())])
        for at in range(count)
    ]
    chosen = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    if len(chosen) < 2:
        chosen = [0, count - 1]
    for key, value in lists.items():
        values[key] = [_BY_NAME.get(key, value[at]) for at in chosen]
    for key, value in indices.items():
        values[key] = [position for position, at in enumerate(chosen) if at in value]
    return values | dict.fromkeys(names, len(chosen))


def _are_indices(value: list[Any], count: int) -> bool:
    """Tell whether a list holds indices of layers, of which there are ``count``."""
    whole = all(type(item) is int and 0 <= item < count for item in value)
    return whole and len(value) > 1 and value == sorted(set(value))
