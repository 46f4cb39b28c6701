"""A model in a local folder: which files must be there, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ara.errors import ModelError
from ara.jsonfile import read_object
from ara.models.gguf_parts import first_parts

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHOWN_FILES = 8


def read_folder_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's ``config.json``.

    Raises:
        ModelError: it cannot be read, or is not a JSON object.
    """
    return read_object(folder / "config.json", "download the model again")


def find_weights(folder: Path) -> list[Path]:
    """Return the safetensors files that make up the model, sorted by name.

    Raises:
        ModelError: only pickled weights, no weights, or a part named by the index is missing.
    """
    index = folder / _INDEX
    # transformers prefers the single file to the index; so does this.
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is not a valid index of weights: {error}", "download the model again") from error
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of {len(names)} weight files: {', '.join(missing[:3])}",
                "the download was interrupted: run `hf download` again",
            )
        return sorted(folder / name for name in names)
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder} holds only pickled weights ({', '.join(pickled[:3])}); they can run code and are refused",
            "convert them where you trust them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
        )
    raise ModelError(
        f"{folder} has a config.json but no weights: expected {_SINGLE} or {_INDEX}; it holds {listing(folder)}",
        "run `hf download ID --local-dir DIR` again",
    )


def find_gguf(folder: Path) -> Path:
    """Return the only GGUF model of a folder without ``config.json``: its file, or the first of its parts.

    Raises:
        ModelError: there is none, or more than one.
    """
    files = first_parts(folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ModelError(
            f"{folder} holds {len(files)} GGUF models: {', '.join(path.name for path in files[:_SHOWN_FILES])}",
            "give the path of one of them",
        )
    raise ModelError(
        f"{folder} is not a model: expected config.json or one .gguf file; it holds {listing(folder)}",
        "give the folder that `hf download ID --local-dir DIR` or save_pretrained wrote",
    )


def listing(folder: Path) -> str:
    """Return the names in a folder in one line: ``a, b, … (12 in all)`` or ``nothing``."""
    names = sorted(path.name for path in folder.iterdir())
    if len(names) > _SHOWN_FILES:
        return f"{', '.join(names[:_SHOWN_FILES])}, … ({len(names)} in all)"
    return ", ".join(names) or "nothing"
