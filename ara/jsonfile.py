"""Reads JSON files that belong to models; what is wrong with one is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ara.errors import ModelError


def read_object(path: Path, hint: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: of the file.
        hint: what to do when it cannot be read.

    Raises:
        ModelError: no such file, not JSON, or not an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})", hint) from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error})", hint) from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a JSON {type(found).__name__}, expected an object", hint)
    return found
