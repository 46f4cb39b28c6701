"""Checks types and sizes in a config before transformers builds anything from it.

The number of layers determines how long transformers builds a model, and the number of labels how long it reads a
config. So counts have upper bounds, and those of a model in a folder are compared with its weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ara.errors import ModelError, UnsupportedModelError
from ara.models.shown import shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_AGAIN = "the config may be damaged: download the model again"
# The deepest known model has about 200 layers.
_MAX_LAYERS = 10_000
# Of heads, experts, labels and so on; known models have at most about a thousand.
_MAX_COUNT = 100_000
_LAYERS = re.compile(r"(.*_)?layers?")
_COUNTS = re.compile(r"(num|n)_.*")
# Numbers of positions, widths and vocabularies, which some configs name like a count.
_NO_COUNTS = re.compile(r".*(positions|ctx|embd|embed|inner|vocab|tokens?|parameters|samples|steps).*")
_SLACK = 4
# Model types whose num_hidden_layers counts every run of a layer, or two for each: the number of layers with weights.
_LAYERS_WITH_WEIGHTS = {"hrm_text": "num_layers_per_stack", "longcat_flash": "num_layers"}
_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim", "vocab_size")


def check_raw_config(raw: Mapping[str, Any], name: str) -> None:
    """Refuse a ``config.json`` with a value of the wrong type in a key that ARA reads, or with an impossible count.

    Args:
        raw: content of the file.
        name: of the model, for the error.

    Raises:
        ModelError: names the wrong value.
        UnsupportedModelError: the config names a weight file of its own.
    """
    kind, classes = raw.get("model_type"), raw.get("architectures")
    if kind is not None and not isinstance(kind, str):
        raise _wrong(name, "model_type", kind, "a name")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(item, str) for item in classes)):
        raise _wrong(name, "architectures", classes, "a list of names")
    for key in ("auto_map", "quantization_config", "text_config"):
        if key in raw and not isinstance(raw[key], dict | None):
            raise _wrong(name, key, raw[key], "an object")
    for key in ("dtype", "torch_dtype"):
        if not _is_dtype(raw.get(key)):
            raise _wrong(name, key, raw[key], "the name of a type such as bfloat16")
    if raw.get("transformers_weights") is not None:
        raise UnsupportedModelError(
            f"the config of {name} names its own weight file (transformers_weights is "
            f"{shown(raw['transformers_weights'])})",
            "rename that file to model.safetensors and remove the entry",
        )
    _check_counts(raw, name)


def check_sizes(config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]] | None, name: str) -> None:
    """Compare the sizes in a config with the weights, without building the model.

    Args:
        config: of the model; of one that reads more than text, the sizes of its language model count.
        shapes: tensor name → shape, of all weights; ``None`` if there are none to compare with.
        name: of the model, for the error.

    Raises:
        ModelError: the config is for a larger model.
    """
    text = config.get_text_config()
    for key in ("hidden_size", "vocab_size"):
        value = _global(text, key)
        if isinstance(value, int) and value < 1:
            raise _wrong(name, key, value, "a positive integer")
    if shapes is None:
        return
    key = _LAYERS_WITH_WEIGHTS.get(config.model_type, "num_hidden_layers")
    layers, found = _global(text, key), _layers(shapes)
    # The weights may include layers for training alone, so the config may have fewer, but not none.
    if isinstance(layers, int) and found and not 0 < layers <= found:
        raise ModelError(f"the config of {name} says {key} {layers}, but its weights have {found} layers", _AGAIN)
    elements = sum(math.prod(shape) for shape in shapes.values())
    hidden = _global(text, "hidden_size")
    if not isinstance(hidden, int):
        return
    for key in _SIZES:
        value = _global(text, key)
        # A head, inner feature or token has at least one row about as wide as the model; embeddings may be narrower.
        if isinstance(value, int) and (value < 0 or max(value, 1) * hidden > _SLACK * elements):
            raise ModelError(
                f"the config of {name} says {key} {value} and hidden_size {hidden}, but its weights have {elements:,} "
                "numbers in all",
                _AGAIN,
            )


def _global(config: PreTrainedConfig, key: str) -> Any:
    """Return a value of a config; ``None`` if it has none, or another one for every layer."""
    try:
        return getattr(config, key, None)
    except RuntimeError:  # of configs whose layers have values of their own, such as the head_dim of Gemma 4
        return None


def _layers(names: Iterable[str]) -> int:
    """Return the number of layers according to tensor names: the largest first number in a name, plus one."""
    numbers = (next((part for part in name.split(".") if part.isdecimal()), None) for name in names)
    return max((int(number) + 1 for number in numbers if number is not None and len(number) < 10), default=0)


def _check_counts(raw: Mapping[str, Any], name: str) -> None:
    nested = [value for value in raw.values() if isinstance(value, dict)]
    for level in (raw, *nested):
        for key, value in level.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            most = _MAX_LAYERS if _LAYERS.fullmatch(key) else _MAX_COUNT
            counted = _LAYERS.fullmatch(key) or (_COUNTS.fullmatch(key) and not _NO_COUNTS.fullmatch(key))
            if counted and value > most:
                raise ModelError(f"the config of {name} says {key} {shown(value)}; the limit is {most:,}", _AGAIN)


def _is_dtype(value: Any) -> bool:
    import torch

    if value is None:
        return True
    return isinstance(value, str) and isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)


def _wrong(name: str, key: str, value: Any, expected: str) -> ModelError:
    return ModelError(f"the config of {name} cannot be used: {key} is {shown(value)}, expected {expected}", _AGAIN)
