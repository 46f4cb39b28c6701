"""Whether a tokenizer that was loaded can be used: transformers takes its settings as they stand in the files."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What is tokenised to try it: words, numbers, a line's end, and a character of several bytes.
_TRIAL = "Hello, world: 12 × 3\n"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """See that a tokenizer has the types that everything relies on, and makes tokens of a text and text of tokens.

    Raises:
        ValueError: it does not; says what, in one line.
    """
    length: Any = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or math.isnan(length):
        raise ValueError(f"its model_max_length is {_shown(length)}, expected a number")
    for name in _SPECIAL:
        token = getattr(tokenizer, f"{name}_id")
        if token is not None and not _is_token(token):
            raise ValueError(f"its {name} has the id {_shown(token)}, expected a number")
    try:
        ids = tokenizer(_TRIAL)["input_ids"]
        fine = isinstance(ids, list) and all(map(_is_token, ids))
        text = tokenizer.decode(ids, skip_special_tokens=True) if fine else None
    except MemoryError:
        raise
    except Exception as error:  # whatever wrong settings lead to
        raise ValueError(f"it cannot tokenise a short text ({type(error).__name__}: {error})") from error
    if not isinstance(text, str):
        raise ValueError("it makes no tokens of a short text, or no text of them")


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shown(value: object) -> str:
    return f"{value!r}"[:60]
