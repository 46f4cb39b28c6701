"""The architectures that are read from GGUF files: key → value of the config in transformers.

To add one, add an entry to :data:`ARCHITECTURES` and a case to the tests that compare log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ara.models.gguf_keys import GgufKeys
from ara.models.shown import shown

_SIZES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
}
_HEADS = {"attention.key_length": "head_dim"}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_NORM = "attention.layer_norm_epsilon"


@dataclass(frozen=True)
class Architecture:
    """How the keys of an architecture become a config.

    Attributes:
        model_type: name in transformers.
        values: key → name in the config; a key must exist unless llama.cpp has a default.
        rope: types of rotary embeddings that the class of transformers supports; empty for an architecture without.
        partial: whether the class can rotate a part of each head.
        neutral: further keys without effect, with the values at which they have none.
        more: makes values from several keys; called with the keys and the values so far.
        takes: keys that ``more`` reads, and those that need not be read.
    """

    model_type: str
    values: Mapping[str, str]
    rope: tuple[str, ...] = ("default", "linear", "yarn", "llama3", "longrope")
    partial: bool = False
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    more: Callable[[GgufKeys, dict[str, Any]], dict[str, Any]] | None = None
    takes: tuple[str, ...] = ()


def _gemma_values(keys: GgufKeys, values: dict[str, Any]) -> dict[str, Any]:
    """Gemma 2 and 3: sliding windows, caps, and an attention scale that has no key."""
    large = {"gemma2": 46, "gemma3": 62}[keys.architecture]  # blocks of the model with 27 B parameters
    width = keys.size("embedding_length") // keys.size("attention.head_count")
    found: dict[str, Any] = {
        # llama.cpp also recognises the model by its number of blocks.
        "query_pre_attn_scalar": width if values["num_hidden_layers"] == large else values["head_dim"],
        "sliding_window": keys.size("attention.sliding_window"),
    }
    if keys.values.get("attention.scale"):
        found["query_pre_attn_scalar"] = keys.number("attention.scale") ** -2
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if key in keys.values:
            found[key] = keys.number(key) or None
    pattern = keys.values.get("attention.sliding_window_pattern", {"gemma2": 2, "gemma3": 6}[keys.architecture])
    layers = values["num_hidden_layers"]
    if isinstance(pattern, list) and len(pattern) == layers and all(type(item) is bool for item in pattern):
        windows = pattern
    elif type(pattern) is int and pattern > 0:
        windows = [bool((index + 1) % pattern) for index in range(layers)]
    else:
        raise keys.wrong("attention.sliding_window_pattern", "a period, or a truth value for each block")
    found["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    if keys.architecture == "gemma3":
        # Layers with a window keep embeddings of their own, which are not scaled.
        local = keys.number("rope.freq_base_swa") if "rope.freq_base_swa" in keys.values else 10000.0
        found["rope_parameters"] = {
            "full_attention": values["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return found


def _phi3_values(keys: GgufKeys, values: dict[str, Any]) -> dict[str, Any]:
    """Phi-3: a sliding window in every layer, and the original context of LongRoPE."""
    window = keys.values.get("attention.sliding_window", 0)
    original = keys.values.get("rope.scaling.original_context_length", values["max_position_embeddings"])
    return {
        "sliding_window": keys.size("attention.sliding_window") if window else None,
        "original_max_position_embeddings": original,
    }


def _stablelm_values(keys: GgufKeys, values: dict[str, Any]) -> dict[str, Any]:
    """StableLM: attention and feed-forward layer are parallel if there is no norm between them."""
    parallel = "blk.0.ffn_norm.weight" not in keys.tensors
    if keys.values.get("use_parallel_residual", parallel) != parallel:
        raise keys.refuse(f"use_parallel_residual = {shown(keys.values['use_parallel_residual'])}")
    return {"use_parallel_residual": parallel}


def _bloom_values(keys: GgufKeys, values: dict[str, Any]) -> dict[str, Any]:
    """BLOOM: the config has no value for the width of the feed-forward layers."""
    if keys.size("feed_forward_length") != 4 * values["hidden_size"]:
        raise keys.refuse(f"feed_forward_length = {shown(keys.values['feed_forward_length'])}")
    return {}


def _mamba_values(keys: GgufKeys, values: dict[str, Any]) -> dict[str, Any]:
    """Mamba: the config holds the inner width as a multiple of the outer one."""
    inner = keys.size("ssm.inner_size")
    if inner % values["hidden_size"]:
        raise keys.refuse(f"ssm.inner_size = {inner}")
    return {"expand": inner // values["hidden_size"]}


def _lfm2_values(keys: GgufKeys, values: dict[str, Any]) -> dict[str, Any]:
    """LFM2: layers without key and value heads are convolutions."""
    heads = keys.values.get("attention.head_count_kv")
    if not isinstance(heads, list) or len(heads) != values["num_hidden_layers"] or len({*heads} - {0}) != 1:
        raise keys.wrong("attention.head_count_kv", "0 or one other number for each block")
    return {
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "block_auto_adjust_ff_dim": False,
        "conv_bias": any(name.endswith(".shortconv.in_proj.bias") for name in keys.tensors),
    }


def _qwen35_values(keys: GgufKeys, values: dict[str, Any]) -> dict[str, Any]:
    """Qwen 3.5: linear attention in most layers, and positions in three sections."""
    value_heads, inner = keys.size("ssm.time_step_rank"), keys.size("ssm.inner_size")
    # The last blocks may predict further tokens; transformers has no place for them.
    further = keys.values.get("nextn_predict_layers", 0)
    sections = keys.values.get("rope.dimension_sections")
    if not isinstance(sections, list) or not all(type(section) is int for section in sections):
        raise keys.wrong("rope.dimension_sections", "a list of integers")
    if type(further) is not int or not 0 <= further < values["num_hidden_layers"]:
        raise keys.wrong("nextn_predict_layers", "fewer than all blocks")
    if inner % value_heads:
        raise keys.refuse(f"ssm.inner_size = {inner} with ssm.time_step_rank = {value_heads}")
    positions = {"mrope_section": [section for section in sections if section], "mrope_interleaved": True}
    return {
        "num_hidden_layers": values["num_hidden_layers"] - further,
        "linear_value_head_dim": inner // value_heads,
        "rope_parameters": values["rope_parameters"] | positions,
    }


def _falcon_values(keys: GgufKeys, values: dict[str, Any]) -> dict[str, Any]:
    """Falcon 7B: one key and value head. Larger models have another order of rows in their packed layer."""
    if values.pop("num_kv_heads") != 1:
        raise keys.refuse(f"attention.head_count_kv = {shown(keys.values['attention.head_count_kv'])}")
    return {"multi_query": True, "new_decoder_architecture": False, "parallel_attn": True, "alibi": False}


_LLAMA_LIKE = {**_SIZES, **_HEADS, **_RMS}
_LLAMA_2 = {"tensor_data_layout": ("Meta AI original pth",)}
_GEMMA_TAKES = ("attention.scale", "attn_logit_softcapping", "final_logit_softcapping")
_GEMMA_WINDOWS = ("attention.sliding_window", "attention.sliding_window_pattern")
_SIZES_BUT_KV = {key: name for key, name in _SIZES.items() if key != "attention.head_count_kv"}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", _LLAMA_LIKE, neutral=_LLAMA_2),
    "qwen2": Architecture("qwen2", {**_SIZES, **_RMS}),
    "qwen3": Architecture("qwen3", _LLAMA_LIKE),
    "phi3": Architecture(
        "phi3",
        {**_SIZES, **_RMS},
        rope=("default", "longrope"),
        partial=True,
        more=_phi3_values,
        takes=("attention.sliding_window",),
    ),
    "gemma2": Architecture("gemma2", _LLAMA_LIKE, more=_gemma_values, takes=_GEMMA_TAKES + _GEMMA_WINDOWS),
    "gemma3": Architecture(
        "gemma3_text",
        _LLAMA_LIKE,
        rope=("default", "linear"),
        more=_gemma_values,
        takes=(*_GEMMA_TAKES, *_GEMMA_WINDOWS, "rope.freq_base_swa"),
    ),
    "starcoder2": Architecture("starcoder2", {**_SIZES, _NORM: "norm_epsilon"}),
    "stablelm": Architecture(
        "stablelm",
        {**_SIZES, _NORM: "layer_norm_eps"},
        partial=True,
        more=_stablelm_values,
        takes=("use_parallel_residual",),
    ),
    "nemotron": Architecture("nemotron", {**_SIZES, **_HEADS, _NORM: "norm_eps"}, partial=True),
    "falcon": Architecture(
        "falcon",
        {
            **_SIZES_BUT_KV,
            "attention.head_count_kv": "num_kv_heads",
            "feed_forward_length": "ffn_hidden_size",
            _NORM: "layer_norm_epsilon",
        },
        rope=("default", "linear", "yarn"),
        more=_falcon_values,
        neutral={"tensor_data_layout": ("jploski",)},
    ),
    "bloom": Architecture(
        "bloom",
        {
            **{key: _SIZES[key] for key in ("embedding_length", "block_count", "attention.head_count")},
            _NORM: "layer_norm_epsilon",
        },
        rope=(),
        more=_bloom_values,
        # ALiBi has no largest position.
        takes=("context_length", "feed_forward_length", "attention.head_count_kv"),
    ),
    "mamba": Architecture(
        "mamba",
        {
            "embedding_length": "hidden_size",
            "block_count": "num_hidden_layers",
            "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
            "ssm.conv_kernel": "conv_kernel",
            "ssm.state_size": "state_size",
            "ssm.time_step_rank": "time_step_rank",
        },
        rope=(),
        more=_mamba_values,
        takes=("context_length", "ssm.inner_size", "attention.head_count_kv"),
        neutral={"attention.head_count": (0,), "feed_forward_length": (0,), "ssm.dt_b_c_rms": (False,)},
    ),
    "lfm2": Architecture(
        "lfm2",
        {
            **_SIZES_BUT_KV,
            "attention.layer_norm_rms_epsilon": "norm_eps",
            "shortconv.l_cache": "conv_L_cache",
        },
        rope=("default",),
        more=_lfm2_values,
        takes=("attention.head_count_kv",),
    ),
    "qwen35": Architecture(
        "qwen3_5_text",
        {
            **_LLAMA_LIKE,
            "full_attention_interval": "full_attention_interval",
            "ssm.conv_kernel": "linear_conv_kernel_dim",
            "ssm.state_size": "linear_key_head_dim",
            "ssm.group_count": "linear_num_key_heads",
            "ssm.time_step_rank": "linear_num_value_heads",
        },
        rope=("default",),
        partial=True,
        more=_qwen35_values,
        takes=("ssm.inner_size", "nextn_predict_layers", "rope.dimension_sections"),
    ),
    "gpt2": Architecture(
        "gpt2",
        {**_SIZES_BUT_KV, "feed_forward_length": "n_inner", _NORM: "layer_norm_epsilon"},
        rope=(),
        takes=("attention.head_count_kv",),
    ),
}
