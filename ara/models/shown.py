"""Values and lists in error messages, cut to a readable length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CHARACTERS = 80
_NAMES = 3


def shown(value: Any) -> str:
    """Return ``repr(value)``, cut; floats with the digits of float32."""
    text = f"{value:.7g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}…"


def first_names(names: Sequence[str]) -> str:
    """Return ``a, b, c, …``."""
    return ", ".join(names[:_NAMES]) + (", …" if len(names) > _NAMES else "")
