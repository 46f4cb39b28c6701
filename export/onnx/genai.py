"""``genai_config.json``: the settings with which ONNX Runtime GenAI loads a folder: ``og.Model(folder)``."""

from __future__ import annotations

from typing import Any

from export.onnx.architecture import Decoder
from export.onnx.export_report import GRAPH_FILE, Provider

# Families that onnxruntime-genai 0.18 runs under their own name as decoders with our inputs and outputs. It treats all
# of them alike, and others as well under the name of no family.
_TYPES = frozenset(
    {
        "ernie4_5",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "nemotron",
        "olmo",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
_ANY_TYPE = "decoder"


def genai_config(decoder: Decoder, eos: list[int], provider: Provider) -> dict[str, Any]:
    """Return the document: greedy search, with caches that past and present share.

    Args:
        decoder: sizes of the model.
        eos: tokens that end a text.
        provider: where the graph will run.
    """
    options: list[dict[str, Any]] = [{"cuda": {}}] if provider == "cuda" else []
    model: dict[str, Any] = {
        "type": decoder.model_type if decoder.model_type in _TYPES else _ANY_TYPE,
        "context_length": decoder.context,
        "vocab_size": decoder.vocabulary,
        "bos_token_id": decoder.bos,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        # GenAI requires one; padding is masked, so any token will do.
        "pad_token_id": decoder.pad if decoder.pad is not None else (eos[0] if eos else 0),
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": options},
            "filename": GRAPH_FILE,
            "head_size": decoder.head,
            "hidden_size": decoder.hidden,
            "num_attention_heads": decoder.heads,
            "num_hidden_layers": decoder.layers,
            "num_key_value_heads": decoder.kv_heads,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    search = {
        "do_sample": False,
        "max_length": decoder.context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }
    return {"model": {key: value for key, value in model.items() if value is not None}, "search": search}
