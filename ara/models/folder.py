"""A model in a local folder: required and refused files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ara.errors import ModelError, UnsupportedModelError
from ara.jsonfile import read_object
from ara.models.completeness import stored_tensors
from ara.models.gguf_parts import first_parts

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_ADAPTER = "adapter_config.json"
# Small files that transformers reads if they exist.
_COMPANIONS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_AGAIN = "download the model again"
_INTERRUPTED = "the download was interrupted: run `hf download` again"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHOWN_FILES = 8


def read_folder_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's ``config.json``; the other small files are checked.

    Raises:
        ModelError: a file cannot be read or is not a JSON object.
        UnsupportedModelError: the folder has an adapter, which transformers would load on top of the model.
    """
    config = read_object(folder / "config.json", _AGAIN)
    for name in _COMPANIONS:
        if os.path.lexists(folder / name):
            read_object(folder / name, f"download {name} again")
    if os.path.lexists(folder / _ADAPTER):
        raise UnsupportedModelError(
            f"{folder} holds an adapter in addition to the model ({_ADAPTER})",
            "merge it into the weights, or move it to another folder",
        )
    return config


def read_index(index: Path, hint: str) -> dict[str, Path]:
    """Return tensor name → file that holds it, from ``model.safetensors.index.json``; all files exist.

    Args:
        index: path of the index.
        hint: what to do if it cannot be read.

    Raises:
        ModelError: see :func:`index_names`; or a file is missing.
    """
    weights = index_names(index, hint)
    names = sorted(set(weights.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(lacks_files(str(index.parent), missing, names), hint)
    return {tensor: index.parent / file for tensor, file in weights.items()}


def index_names(index: Path, hint: str) -> dict[str, str]:
    """Return tensor name → name of the file that holds it, from ``model.safetensors.index.json``.

    Args:
        index: path of the index.
        hint: what to do if it cannot be read.

    Raises:
        ModelError: it is not an index, or names a file outside its folder or of another kind.
    """
    weights = read_object(index, hint).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise ModelError(f'{index} is not an index of weights: it has no "weight_map" with tensors', hint)
    for tensor, file in weights.items():
        if not isinstance(file, str):
            raise ModelError(f"{index} names {file!r} as the file of {tensor}, expected a string", hint)
        # A path could point anywhere, and other kinds of files can run code.
        if Path(file).name != file or "\\" in file or "\0" in file:
            raise ModelError(f"{index} names the file {file!r}, which is not in its folder", "do not use it")
        if not file.endswith(".safetensors"):
            raise ModelError(f"{index} names the file {file!r}, which is not a safetensors file", "do not use it")
    return weights


def lacks_files(place: str, missing: Sequence[str], names: Sequence[str]) -> str:
    """Return the words for a folder or repository that lacks some of its weight files."""
    return f"{place} lacks {len(missing)} of {len(names)} weight files: {', '.join(missing[:3])}"


def read_shapes(files: Iterable[Path], hint: str) -> dict[str, tuple[int, ...]]:
    """Return tensor name → shape; see :func:`ara.models.completeness.stored_tensors`."""
    return {name: tensor.shape for name, tensor in stored_tensors(files, hint).items()}


def find_weights(folder: Path) -> list[Path]:
    """Return the safetensors files of the model, sorted by name.

    Raises:
        ModelError: only pickled weights, no weights, or an index that :func:`read_index` or transformers refuses.
    """
    index = folder / INDEX
    # As in transformers, the single file comes before the index.
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if os.path.lexists(index):
        files = sorted(set(read_index(index, _INTERRUPTED).values()))
        if not isinstance(read_object(index, _AGAIN).get("metadata"), dict):
            raise ModelError(f'{index} has no "metadata", so transformers does not load it', 'add "metadata": {} to it')
        return files
    if pickled := _pickled(folder):
        raise ModelError(
            f"{folder} holds only pickled weights ({', '.join(pickled[:3])}); they can run code and are refused",
            "if you trust them, convert them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
        )
    raise ModelError(
        f"{folder} has a config.json but no weights: expected {SINGLE} or {INDEX}; it holds {listing(folder)}",
        "run `hf download ID --local-dir DIR` again",
    )


def holds_weights(folder: Path) -> bool:
    """Tell whether a folder has weights of any kind, or an index of some."""
    return any(os.path.lexists(folder / name) for name in (SINGLE, INDEX)) or bool(_pickled(folder))


def _pickled(folder: Path) -> list[str]:
    return sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))


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
