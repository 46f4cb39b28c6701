"""Small configs of the families of :data:`export.onnx.families.FAMILIES` that :mod:`tests.tiny` has none of.

Factors, limits and bases are none of the defaults, so that a lost one changes the logits. Windows are shorter than the
texts of the tests. Heads can be rotated by fused attention: they are 16 wide, or 32 where half of them is rotated.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from export.onnx.families import FAMILIES
from tests.tiny import VOCABULARY

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
    "dtype": "float32",
    "hidden_size": 102,
    "intermediate_size": 92,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 200,
}
# Where the width of a head is that of the stream by the number of heads.
_OWN_HEADS = {**{name: value for name, value in _COMMON.items() if name != "head_dim"}, "hidden_size": 96}
# Without fields that the family does not have.
_OWN_SIZES = {
    name: value for name, value in _OWN_HEADS.items() if name not in ("num_key_value_heads", "intermediate_size")
}
_HALF_ROTATED = {**_COMMON, "head_dim": 32, "partial_rotary_factor": 0.5}
_OWN_HALF_ROTATED = {**_OWN_HEADS, "num_attention_heads": 3, "num_key_value_heads": 1, "partial_rotary_factor": 0.5}
_TYPES = {"sliding_window": 21, "layer_types": ["sliding_attention", "full_attention"]}
_ROTARIES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0},
}
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 44}
_GEMMA = {**_COMMON, **_TYPES, "query_pre_attn_scalar": 9, "final_logit_softcapping": 3.0}

_DECODERS: dict[str, dict[str, Any]] = {
    "ministral": {**_COMMON, **_TYPES},
    "seed_oss": {**_COMMON, "attention_out_bias": True, "mlp_bias": True},
    "ernie4_5": {**_COMMON, "use_bias": True},
    "helium": {**_COMMON, "num_key_value_heads": 6, "hidden_size": 96},
    "smollm3": {**_COMMON, **_TYPES, "no_rope_layers": [1, 0]},
    "arcee": {**_COMMON, "attention_bias": True, "mlp_bias": True},
    "granite": {
        **_COMMON,
        "embedding_multiplier": 1.7,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.6,
        "logits_scaling": 1.9,
    },
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**_GEMMA, "rope_parameters": _ROTARIES},
    "olmo": {**_COMMON},
    "olmo2": {**_COMMON, "attention_bias": True},
    "olmo3": {**_COMMON, **_TYPES, "rope_parameters": _ROTARIES},
    "exaone4": {**_COMMON, **_TYPES},
    "glm": {**_HALF_ROTATED},
    "glm4": {**_HALF_ROTATED},
    "starcoder2": {**_COMMON, "sliding_window": 21},
    "nemotron": {**_HALF_ROTATED, "attention_bias": True, "mlp_bias": True},
    "stablelm": {**_OWN_HALF_ROTATED, "use_qkv_bias": True, "use_parallel_residual": True},
    "cohere": {**_COMMON, "use_qk_norm": True, "logit_scale": 0.3, "attention_bias": True},
    "cohere2": {**_COMMON, **_TYPES, "logit_scale": 0.3},
    "phi": {**_OWN_HALF_ROTATED, "qk_layernorm": True},
    "gpt_neox": {
        **_OWN_SIZES,
        "intermediate_size": 92,
        "num_attention_heads": 3,
        "rotary_pct": 0.5,
    },
    "mixtral": {**_COMMON, "num_local_experts": 5, "sliding_window": 21},
    "qwen2_moe": {
        **_OWN_HEADS,
        **_EXPERTS,
        "shared_expert_intermediate_size": 52,
        "num_hidden_layers": 3,
        "mlp_only_layers": [0],
        "use_sliding_window": True,
        "sliding_window": 21,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "qwen3_moe": {
        **_COMMON,
        **_EXPERTS,
        "norm_topk_prob": True,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "use_sliding_window": True,
        "sliding_window": 21,
    },
    "olmoe": {**_OWN_HEADS, **_EXPERTS},
    "granitemoe": {
        **_OWN_HEADS,
        "num_local_experts": 5,
        "embedding_multiplier": 1.7,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.6,
        "logits_scaling": 1.9,
    },
    "glm4_moe": {
        **_HALF_ROTATED,
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 44,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.6,
        "use_qk_norm": True,
        "attention_bias": True,
        "num_hidden_layers": 3,
    },
    "gpt2": {**_OWN_SIZES, "n_inner": 92},
    "opt": {**_OWN_SIZES, "ffn_dim": 92, "word_embed_proj_dim": 96, "init_std": 0.1},
}
DECODERS = tuple(_DECODERS)
# Families that the graph builder does not know, for transformers' own exporter.
_UNKNOWN: dict[str, dict[str, Any]] = {
    "gptj": {
        **{name: value for name, value in _OWN_SIZES.items() if name not in ("head_dim", "max_position_embeddings")},
        "n_positions": 200,
        "n_inner": 92,
        "rotary_dim": 8,
        "tie_word_embeddings": False,
    },
}
UNKNOWN = tuple(_UNKNOWN)
# The other families, which :mod:`tests.tiny` has: tests of layouts, precisions and few bits run over these.
BASIC = tuple(family for family in FAMILIES if family not in _DECODERS)


def decoder_config(family: str, **changes: Any) -> PreTrainedConfig:
    """Return the config of one of :data:`DECODERS` or :data:`UNKNOWN`, with some fields changed."""
    return AutoConfig.for_model(family, **{**(_DECODERS | _UNKNOWN)[family], **changes})
