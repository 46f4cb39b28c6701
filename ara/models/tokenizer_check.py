"""Checks that a loaded tokenizer works: transformers does not check the settings in its files."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ara.models.shown import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Text for the test: words, numbers, a line end, and a character of several bytes.
_TRIAL = "Hello, world: 12 × 3\n"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check the types of a tokenizer's settings, and that it encodes and decodes a text.

    Raises:
        ValueError: the problem, in one line.
    """
    length: Any = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or math.isnan(length):
        raise ValueError(f"its model_max_length is {shown(length)}, expected a number")
    for name in _SPECIAL:
        token = getattr(tokenizer, f"{name}_id")
        if token is not None and not _is_token(token):
            raise ValueError(f"its {name} has the id {shown(token)}, expected a number")
    try:
        ids = tokenizer(_TRIAL)["input_ids"]
        fine = isinstance(ids, list) and all(map(_is_token, ids))
        text = tokenizer.decode(ids, skip_special_tokens=True) if fine else None
    except MemoryError:
        raise
    except Exception as error:  # wrong settings may raise anything
        raise ValueError(f"it cannot tokenise a short text ({type(error).__name__}: {error})") from error
    if not isinstance(text, str):
        raise ValueError("it cannot encode and decode a short text")


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
