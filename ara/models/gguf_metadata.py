"""Makes the config of a GGUF model: every key that changes the function of the model is read, or the file is refused.

transformers reads about ten keys per architecture and ignores the others: scaled rotary embeddings, the attention scale
of the large Gemma models, epsilons under another name, biases. So ARA makes the config itself. A key of the
architecture is a value of the config (:mod:`ara.models.gguf_architectures`), is translated
(:mod:`ara.models.gguf_rope`), or has no effect at its value in :data:`_NEUTRAL`. Any other key is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ara.errors import UnsupportedModelError
from ara.models.gguf_architectures import ARCHITECTURES, Architecture
from ara.models.gguf_keys import ELSEWHERE, GgufKeys
from ara.models.gguf_parts import GgufContents
from ara.models.gguf_rope import FREQUENCIES, LONG, SHORT, rope_parameters
from ara.models.shown import shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Tensors that give no weight of the model: factors of the rotary embeddings, and the table of inverse frequencies of
# old converters, which llama.cpp ignores.
DERIVED_TENSORS = re.compile(
    rf"{re.escape(FREQUENCIES)}|{re.escape(SHORT)}|{re.escape(LONG)}|blk\.\d+\.attn_rot_embd\.weight"
)

_ROPE_KEYS = frozenset(
    {
        "rope.freq_base",
        "rope.dimension_count",
        "rope.scale_linear",
        *(f"rope.scaling.{name}" for name in ("type", "factor", "original_context_length", "finetuned")),
        *(f"rope.scaling.{name}" for name in ("yarn_beta_fast", "yarn_beta_slow")),
    }
)
# The longest known token, a run of blanks in vocabularies for code, has 256.
_MAX_TOKEN_CHARACTERS = 4096
_TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}

# key → values without effect. For llama.cpp a scale or a cap of 0 means none.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.scale": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    # llama.cpp multiplies the scale that YaRN implies by this one.
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}
# Namespaces that change the function of any architecture. Other namespaces are only information.
_FOREIGN = ("adapter", "clip", "diffusion", "xielu")


def gguf_config(name: str, contents: GgufContents) -> PreTrainedConfig:
    """Return the transformers config of the model in a GGUF file.

    Args:
        name: of the file, for errors.
        contents: of its header.

    Raises:
        ModelError: a key is missing or has an invalid value, or tensors do not fit the keys.
        UnsupportedModelError: a key changes the model in a way that ARA cannot read.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    keys = GgufKeys(name, contents)
    _check_kind(keys, contents.metadata)
    known = ARCHITECTURES.get(keys.architecture)
    if known is None:
        raise UnsupportedModelError(
            f"{name}: GGUF files of the architecture {keys.architecture} are not supported; ARA reads "
            f"{', '.join(sorted(ARCHITECTURES))}",
            ELSEWHERE,
        )
    values = _plain_values(keys, known)
    values |= _embedding_values(keys, values)
    if known.rope:
        values |= _rope_values(keys, known, values)
    if known.more is not None:
        values |= known.more(keys, values)
    _check_rest(keys, known, values)
    values |= _bias_values(keys, known.model_type)
    _check_vocabulary(keys, contents.metadata)
    for target, source in _TOKEN_IDS.items():
        values[target] = _token_id(keys, contents.metadata, f"tokenizer.ggml.{source}_token_id")
    return CONFIG_MAPPING[known.model_type](**values)


def _check_kind(keys: GgufKeys, metadata: Mapping[str, Any]) -> None:
    """Refuse files that are not exactly one language model."""
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModelError(f"{keys.name} is not a model: general.type is {shown(kind)}", ELSEWHERE)
    for key in metadata:
        space = key.partition(".")[0]
        if space in _FOREIGN or (space in ARCHITECTURES and space != keys.architecture):
            raise keys.refuse(f"{key} = {shown(metadata[key])}")


def _plain_values(keys: GgufKeys, known: Architecture) -> dict[str, Any]:
    """Return the values that the config takes from single keys, and check them against the tensors."""
    keys.values = _defaults(keys.values) | keys.values
    values: dict[str, Any] = {}
    for key, target in known.values.items():
        values[target] = keys.number(key) if key.endswith("epsilon") else keys.size(key)
    layers = {int(found[1]) for tensor in keys.tensors if (found := re.match(r"blk\.(\d{1,9})\.", tensor))}
    count = keys.size("block_count")
    if len(layers) != count or max(layers, default=-1) != count - 1:
        raise keys.damaged(f"{keys.architecture}.block_count is {count}, but it holds tensors of {len(layers)} blocks")
    if "num_attention_heads" in values:
        width = values.get("head_dim", values["hidden_size"] // values["num_attention_heads"])
        for key in ("attention.key_length", "attention.value_length"):
            if keys.values.get(key, width) != width:
                raise keys.refuse(f"{key} = {shown(keys.values[key])} where heads have {width} dimensions")
    return values


def _defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of llama.cpp for missing keys."""
    heads, width = values.get("attention.head_count"), values.get("embedding_length")
    found: dict[str, Any] = {"attention.head_count_kv": heads}
    if type(heads) is int and type(width) is int and heads > 0:
        found["attention.key_length"] = width // heads
    return found


def _embedding_values(keys: GgufKeys, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the size of the vocabulary and whether the head is tied; the tensors tell both reliably."""
    embedding = keys.tensors.get("token_embd.weight")
    hidden = keys.size("embedding_length")
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[1] != hidden:
        found = "is missing" if embedding is None else f"has shape {list(embedding.shape)}"
        raise keys.damaged(f"token_embd.weight {found}, expected [vocabulary, {hidden}]")
    if keys.values.get("vocab_size", embedding.shape[0]) != embedding.shape[0]:
        raise keys.wrong("vocab_size", f"{embedding.shape[0]}, the rows of token_embd.weight")
    return {"vocab_size": embedding.shape[0], "tie_word_embeddings": "output.weight" not in keys.tensors}


def _rope_values(keys: GgufKeys, known: Architecture, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of the rotary embeddings."""
    for key in _ROPE_KEYS - {"rope.scaling.type", "rope.scaling.finetuned", "rope.freq_base"}:
        if key in keys.values:
            keys.number(key)
    if "rope.freq_base" in keys.values and keys.number("rope.freq_base") <= 1:
        raise keys.wrong("rope.freq_base", "a number above 1")
    if "rope.scaling.original_context_length" in keys.values:
        keys.size("rope.scaling.original_context_length")
    width = keys.size("attention.key_length")
    rotated = keys.size("rope.dimension_count") if "rope.dimension_count" in keys.values else width
    share = rotated / width
    if rotated > width or rotated % 2 or int(width * share) != rotated or (share != 1 and not known.partial):
        raise keys.refuse(f"rope.dimension_count = {rotated} of {width} dimensions of a head")
    found = rope_parameters(keys.values, keys.tensors, rotated, keys.size("context_length"), keys.refuse)
    if found["rope_type"] not in known.rope:
        raise keys.refuse(f"rotary embeddings of the type {found['rope_type']}")
    if known.partial:
        found["partial_rotary_factor"] = share
    return {"rope_parameters": found}


def _check_rest(keys: GgufKeys, known: Architecture, values: Mapping[str, Any]) -> None:
    """Refuse every key that has not been read and is not neutral."""
    read = {*known.values, *known.takes, "vocab_size", "attention.value_length", "attention.key_length"}
    if known.rope:
        read |= _ROPE_KEYS
    if values.get("rope_parameters", {}).get("rope_type") == "longrope":
        read.add("rope.scaling.attn_factor")
    neutral = {**_NEUTRAL, **known.neutral}
    for key, value in keys.values.items():
        if key in read:
            continue
        allowed: tuple[Any, ...] = neutral.get(key, ())
        # A window as long as the context has no effect.
        if key == "attention.sliding_window" and type(value) is int and value >= keys.size("context_length"):
            continue
        if isinstance(value, list) or value not in allowed:
            raise keys.refuse(f"{key} = {shown(value)}")


def _bias_values(keys: GgufKeys, model_type: str) -> dict[str, Any]:
    """Return whether layers have biases, for the options that the config has; the tensors tell."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias", "use_qkv_bias": "attn_q.bias"}
    known = CONFIG_MAPPING[model_type].__dataclass_fields__
    return {target: f"blk.0.{tensor}" in keys.tensors for target, tensor in names.items() if target in known}


def _check_vocabulary(keys: GgufKeys, metadata: Mapping[str, Any]) -> None:
    """Refuse lists of the wrong type, and tokens so long that merging takes forever."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise keys.damaged(f"tokenizer.ggml.tokens is {shown(tokens)}, expected a list of strings")
    longest = max(map(len, tokens))
    if longest > _MAX_TOKEN_CHARACTERS:
        raise keys.damaged(f"a token has {longest:,} characters")
    lists = {"scores": (len(tokens), float | int), "token_type": (len(tokens), int), "merges": (None, str)}
    for name, (count, kind) in lists.items():
        found = metadata.get(f"tokenizer.ggml.{name}")
        if found is None:
            continue
        # All elements of a list in a GGUF file have one type.
        fits = isinstance(found, list) and (count is None or len(found) == count)
        if not fits or (found and not isinstance(found[0], kind)):
            raise keys.damaged(f"tokenizer.ggml.{name} does not fit the {len(tokens):,} tokens")


def _token_id(keys: GgufKeys, metadata: Mapping[str, Any], key: str) -> int | None:
    value = metadata.get(key)
    vocabulary = keys.tensors["token_embd.weight"].shape[0]
    if value is not None and (type(value) is not int or not 0 <= value < vocabulary):
        raise keys.damaged(f"{key} is {shown(value)}, expected below {vocabulary}")
    return value
