"""The keys of one architecture in a GGUF file, and the errors about them."""

from __future__ import annotations

import math

from ara.errors import ModelError, UnsupportedModelError
from ara.models.gguf_header import AGAIN
from ara.models.gguf_parts import GgufContents
from ara.models.shown import shown

ELSEWHERE = "use the original model in the Hugging Face format"


class GgufKeys:
    """The keys of one architecture, without the prefix ``ARCH.``.

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
        """Return the error for settings that ARA does not support."""
        return UnsupportedModelError(
            f"{self.name} ({self.architecture}) cannot be read exactly: {found}, which ARA does not know how to read "
            "from a GGUF file",
            ELSEWHERE,
        )

    def wrong(self, key: str, expected: str) -> ModelError:
        """Return the error for an invalid value."""
        found = shown(self.values.get(key, "missing"))
        return self.damaged(f"{self.architecture}.{key} is {found}, expected {expected}")

    def damaged(self, problem: str) -> ModelError:
        """Return the error for a file whose parts do not fit together."""
        return ModelError(f"{self.name} cannot be read: {problem}", AGAIN)

    def size(self, key: str) -> int:
        """Return a positive integer; a list with one per layer must hold the same number throughout.

        Raises:
            ModelError: missing or not a positive integer.
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
        """Return a finite number that is not negative.

        Raises:
            ModelError: missing or another value.
        """
        value = self.values.get(key)
        # A boolean is an integer to Python.
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise self.wrong(key, "a number of at least 0")
        return float(value)
