"""Checks from its config whether ARA can factorise a model, before any weight is read.

It must predict the next token from those before it. It may also read pictures or sound: see
:mod:`ara.models.multimodal`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ara.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_EXPECTED = "expected a decoder-only language model"
_SENSES = "is a vision or audio model"
_HINT = "ARA compresses models such as Llama, Mistral, Qwen, Gemma, Phi, OPT and GPT-2; `ara models` lists some"

# Endings of classes that predict the next token; classes with other names are in a table of transformers.
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")
# Encoders that the table of masked language models lacks.
_FURTHER_ENCODERS = frozenset({"bert-generation"})
# Model types whose class does not predict the next token from the tokens before it alone.
_NOT_CAUSAL = {
    "cpmant": "is no left-to-right model: its attention looks both ways",
    "diffusion_gemma": "is no left-to-right model: it writes a block of tokens in several passes",
    "paligemma": "is no left-to-right model: its attention looks both ways in a prompt",
    "pi0": "is no language model: it writes movements of robots",
    "qwen2_5_omni": "is two models, a thinker and a talker, without a common forward pass",
    "qwen3_omni_moe": "is two models, a thinker and a talker, without a common forward pass",
    "reformer": "is no left-to-right model: later tokens change the random groups of its attention",
    "shieldgemma2": "is a classifier of pictures",
}
# Words in the names of sub-configs for other data than text.
_OTHER_SENSES = ("vision", "audio", "image", "speech")


def check_quantization(raw: Mapping[str, Any], name: str) -> None:
    """Refuse weights that are already compressed or quantised.

    Args:
        raw: content of ``config.json``.
        name: of the model, for the error.

    Raises:
        UnsupportedModelError: the config has a quantisation entry.
    """
    # Early versions of compressed-tensors call the entry "compression_config".
    entry = raw.get("quantization_config") or raw.get("compression_config")
    if not entry:
        return
    method = entry.get("quant_method", "unknown method") if isinstance(entry, Mapping) else str(entry)
    if method == "ara":
        raise UnsupportedModelError(
            f"{name} is already compressed by ARA", "start from the original model; its card in that folder names it"
        )
    raise UnsupportedModelError(f"{name} is already quantised ({method})", "use the original weights")


def check_decoder_only(config: PreTrainedConfig, name: str) -> None:
    """Refuse any model that is not a decoder-only language model.

    Args:
        config: the transformers config.
        name: of the model, for the error.

    Raises:
        UnsupportedModelError: encoder-decoder, vision or audio, encoder-only, or another head.
    """
    reason = _objection(config)
    if reason is not None:
        classes = ", ".join(config.architectures or []) or "none named"
        found = f"model_type {config.model_type or 'none'}, architectures {classes}"
        raise UnsupportedModelError(f"{name} {reason} ({found}); {_EXPECTED}", _HINT)


def architecture_name(config: PreTrainedConfig) -> str:
    """Return the class that generates text with this config, such as ``LlamaForCausalLM``."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as MULTIMODAL

    if config.model_type in MULTIMODAL:
        return str(MULTIMODAL[config.model_type])
    for name in config.architectures or []:
        if name in CAUSAL.values() or name.endswith(_CAUSAL_ENDINGS):
            return str(name)
    return str(CAUSAL.get(config.model_type, config.model_type))


def _objection(config: PreTrainedConfig) -> str | None:
    from transformers.models.auto import modeling_auto as tables

    causal = tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.is_encoder_decoder:
        return "is an encoder-decoder model"
    if config.model_type in (multimodal := tables.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
        expected = multimodal[config.model_type]
        if config.architectures and expected not in config.architectures:
            return f"is no {expected}, the class of its model_type that writes text"
        text = config.get_text_config()
        return "is an encoder-decoder model" if text.is_encoder_decoder else _not_left_to_right(config, text)
    if _other_senses(config):
        return _SENSES
    if config.model_type not in causal:
        return "is not a causal language model that transformers knows"
    named = config.architectures or []
    if named and not any(name in causal.values() or name.endswith(_CAUSAL_ENDINGS) for name in named):
        return "has no head that predicts the next token"
    # Families in both tables, such as BERT, have a causal class for weights trained with a causal mask; the config says
    # whether they are.
    decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if config.model_type in _FURTHER_ENCODERS.union(tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES) and not decoder:
        return "is an encoder: its attention looks both ways"
    return _not_left_to_right(config, config)


def _not_left_to_right(config: PreTrainedConfig, text: PreTrainedConfig) -> str | None:
    """Return why a model with a head for the next token may look at later tokens, or ``None``."""
    # XLNet predicts tokens in any order; "uni" makes a left-to-right model of it. Gemma may be used as an encoder; from
    # Gemma 4 on, "vision" means the tokens of a picture alone.
    if getattr(text, "attn_type", "uni") == "bi" or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return "is no left-to-right model: its attention looks both ways"
    return _NOT_CAUSAL.get(config.model_type)


def _other_senses(config: PreTrainedConfig) -> bool:
    names = [key for key in (*config.sub_configs, *vars(config)) if key.endswith(("_config", "_encoder"))]
    return any(word in key and getattr(config, key, None) is not None for key in names for word in _OTHER_SENSES)
