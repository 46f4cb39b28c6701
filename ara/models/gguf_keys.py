"""The keys of one architecture in a GGUF file, and the errors for what cannot be read of them."""

from __future__ import annotations

import math
from typing import Any

from ara.errors import ModelError, UnsupportedModelError
from ara.models.gguf_header import AGAIN
from ara.models.gguf_parts import GgufContents

ELSEWHERE = "use the original model in the Hugging Face format"
_SHOWN_CHARACTERS = 80


class GgufKeys:
    """The keys of one architecture, without its name in front.

    Args:
        name: of the file, for errors.
        contents: of the file.
    """

    def __init__(self, name: str, contents: GgufContents) -> None:
        self.name = name
        self.tensors = contents.tensors
        architecture = contents.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ModelError(f"{name} does not name its architecture (general.architecture)", AGAIN)
        self.architecture = architecture
        prefix = f"{self.architecture}."
        self.values = {key.removeprefix(prefix): v for key, v in contents.metadata.items() if key.startswith(prefix)}

    def refuse(self, found: str) -> UnsupportedModelError:
        """Return the error for settings that would not be read right."""
        return UnsupportedModelError(
            f"{self.name} ({self.architecture}) cannot be read exactly: {found}, which ARA does not know how to read "
            "from a GGUF file",
            ELSEWHERE,
        )

    def wrong(self, key: str, expected: str) -> ModelError:
        """Return the error for a value that cannot be."""
        found = shown(self.values.get(key, "missing"))
        return ModelError(
            f"{self.name} cannot be read: {self.architecture}.{key} is {found}, expected {expected}", AGAIN
        )

    def size(self, key: str) -> int:
        """Return a positive integer; a list with one per layer must say the same of all.

        Raises:
            ModelError: it is none, or not there.
            UnsupportedModelError: layers differ.
        """
        value = self.values.get(key)
        if isinstance(value, list) and value:
            if any(item != value[0] for item in value):
                raise self.refuse(f"{key} = {shown(value)} differs between layers")
            value = value[0]
        if type(value) is not int or value < 1:
            raise self.wrong(key, "a positive integer")
        return value

    def number(self, key: str) -> float:
        """Return a number that is finite and not negative.

        Raises:
            ModelError: it is none, or not there.
        """
        value = self.values.get(key)
        # A boolean is an integer to Python.
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise self.wrong(key, "a number of at least 0")
        return float(value)


def shown(value: Any) -> str:
    """Return a value as errors show it: floats with the digits that float32 has, long lists and texts cut."""
    text = f"{value:.7g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
