"""Tiny models, a tokenizer and texts, made on the fly: no download, all sizes different and no power of two.

A swapped axis, a forgotten bias or a mixed-up head count then fails with a shape error or a wrong number instead
of passing by luck.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from ara.models.multimodal import auto_class

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
VOCABULARY = 256 + len(SPECIAL_TOKENS)
MAX_POSITIONS = 256

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

_TOKEN_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Weights large enough for attention and activations to matter; the usual 0.02 leaves tiny logits nearly flat.
_COMMON: dict[str, Any] = {**_TOKEN_IDS, "vocab_size": VOCABULARY, "initializer_range": 0.1, "dtype": "float32"}
_LLAMA_LIKE: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 60,
    "intermediate_size": 92,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
}
# Where a config has head_dim, queries are wider (84) than the hidden size (60); elsewhere a head has 10.
_WIDE_HEADS: dict[str, Any] = {**_LLAMA_LIKE, "head_dim": 14}
_GPT2: dict[str, Any] = {"n_embd": 60, "n_head": 6, "n_layer": 3, "n_inner": 92, "n_positions": MAX_POSITIONS}
_OPT: dict[str, Any] = {
    "hidden_size": 60,
    "word_embed_proj_dim": 60,
    "ffn_dim": 92,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": MAX_POSITIONS,
    "init_std": 0.1,
}

_FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _WIDE_HEADS),
    "mistral": (MistralConfig, _WIDE_HEADS),
    "qwen2": (Qwen2Config, _LLAMA_LIKE),  # biases on q, k, v
    "qwen3": (Qwen3Config, _WIDE_HEADS),
    "gemma": (GemmaConfig, _WIDE_HEADS),  # head tied to the embedding
    "phi3": (Phi3Config, _LLAMA_LIKE),  # packed qkv_proj and gate_up_proj
    "phi": (PhiConfig, {**_LLAMA_LIKE, "partial_rotary_factor": 0.4}),  # biases everywhere; 4 of 10 rotated
    "opt": (OPTConfig, {**_COMMON, **_OPT}),  # biases, positions learned, no gate
    "gpt2": (GPT2Config, {**_COMMON, **_GPT2}),  # Conv1D: weights stored (in, out), q, k, v packed
}
FAMILIES = tuple(_FAMILIES)

# Mixtures of 5 experts, of which a token gets 2.
_ROUTED: dict[str, Any] = {**_WIDE_HEADS, "moe_intermediate_size": 44, "num_experts_per_tok": 2}
_GROUPS: dict[str, Any] = {"n_routed_experts": 5, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 28,
    "kv_lora_rank": 22,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 10,
    "v_head_dim": 18,
    "head_dim": 10,
    "num_key_value_heads": 6,
}
_EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {**_ROUTED, "num_local_experts": 5},
    "qwen2_moe": {**_ROUTED, "num_experts": 5, "shared_expert_intermediate_size": 52},  # a shared expert
    "gpt_oss": {**_ROUTED, "num_local_experts": 5},  # parameters stored transposed, biases, its own gate
    "deepseek_v3": {**_ROUTED, **_GROUPS, **_LATENT},  # latent attention, first block dense
}
MIXTURES = tuple(_EXPERTS)
# Experts that get all tokens, most of them as zeros; parameters stored transposed.
_EXPERTS["llama4_text"] = {**_ROUTED, "num_local_experts": 5, "intermediate_size_mlp": 92, "num_experts_per_tok": 1}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a fast byte-level tokenizer: 256 bytes and 4 special tokens, bos in front, any text without unk."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
    )


def tiny_config(family: str) -> PreTrainedConfig:
    """Return the config of a family: 3 layers, float32, vocabulary of :func:`tiny_tokenizer`.

    Args:
        family: one of :data:`FAMILIES` or :data:`MIXTURES`.
    """
    if family in _EXPERTS:
        config: PreTrainedConfig = AutoConfig.for_model(family, **_EXPERTS[family])
        return config
    kind, values = _FAMILIES[family]
    return kind(**values)


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Return a model of one of :data:`FAMILIES`; see :func:`random_model`."""
    return random_model(tiny_config(family), seed)


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a float32 model in eval mode with random weights; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto_class(config.model_type).from_config(config, dtype=torch.float32)
        # Biases start at zero, as do the gates of some families, where a lost one would not be noticed.
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")) or (parameter.dim() >= 2 and not parameter.any()):
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def gemma_with_shared_keys(kind: str) -> PreTrainedModel:
    """Return a random model of 4 blocks, of which the last two reuse the keys and values of the first two.

    Args:
        kind: ``gemma3n_text`` or ``gemma4_text``.
    """
    sizes = {"hidden_size": 60, "intermediate_size": 92, "head_dim": 14, "num_hidden_layers": 4, "vocab_size": 50}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "num_kv_shared_layers": 2, "sliding_window": 5}
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2}
    inputs = {"hidden_size_per_layer_input": 9, "vocab_size_per_layer_input": 50}
    own: dict[str, Any] = {"global_head_dim": 14}
    if kind == "gemma3n_text":
        own = {"laurel_rank": 7, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4}
        own["intermediate_size"] = [92] * 4
    return random_model(
        AutoConfig.for_model(kind, **{**sizes, **heads, **layers, **inputs, "initializer_range": 0.1, **own})
    )


def save_tiny(path: Path, family: str, seed: int = 0) -> Path:
    """Save model, generation config and tokenizer as an ordinary Hugging Face folder, and return it."""
    return save_with_tokenizer(path, tiny_model(family, seed))


def save_with_tokenizer(path: Path, model: PreTrainedModel) -> Path:
    """Save a model with the vocabulary of :func:`tiny_tokenizer`, and return the folder."""
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def tiny_texts(count: int = 300) -> list[str]:
    """Return ``count`` short English sentences, the same ones each time."""
    words = random.Random(7)
    subjects = ("The baker", "A tall heron", "My neighbour", "The old engine", "Every student", "Our cat", "The river")
    verbs = ("watches", "carries", "forgets", "repairs", "follows", "paints", "counts", "answers")
    objects = ("the morning train", "seven red apples", "a broken clock", "the quiet harbour", "an unread letter")
    places = ("near the bridge", "in late autumn", "without a word", "before breakfast", "under grey clouds")
    return [
        f"{words.choice(subjects)} {words.choice(verbs)} {words.choice(objects)} {words.choice(places)}."
        for _ in range(count)
    ]


def story() -> str:
    """Return what ``ara eval`` calls the text of the fixture ``tiny_text``: its stem and the start of its checksum."""
    from ara.data.texts import _documents

    return f"story-{_documents('file:story.jsonl', 'evaluation', tiny_texts(), '').digest[:8]}"
