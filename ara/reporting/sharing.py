"""Names in files that users share: without local folders."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

from ara.data.filespecs import CHAT_PREFIX, FILE_PREFIX, is_file

# Options whose value is a path however it is written, and those whose value is never one.
_PATH_OPTION = re.compile(r"-[a-z]*w|--workspace|--ranks|--include-path|--output|--model-card|--source")
_PROSE_OPTION = "--prompt"
# NAME=VALUE, --option=VALUE, or a value glued to the short option of the workspace, which may follow flags: -qwDIR.
_GLUED = re.compile(r"([\w-]+=|-[a-z]*?w)(.+)", re.DOTALL)


def display_name(model: dict[str, Any]) -> str:
    """Return the name of a model in a shared file: a hub id, or a name without local folders."""
    location = str(model["location"])
    return location if model["kind"] in ("hub", "wheel") else Path(location).name


def shared_command(command: str, model: dict[str, Any]) -> str:
    """Return a command for a shared file: every local path is reduced to its last component.

    Args:
        command: as it was typed.
        model: the model of the manifest; its hub id is kept, although it looks like a path.
    """
    try:
        words = shlex.split(command)
    except ValueError:  # a library call may give any text
        words = command.split()
    shared: list[str] = []
    for before, word in pairwise(["", *words]):
        glued = _GLUED.fullmatch(word)
        if glued is None:
            shared.append(_shared_value(word, before, model))
        else:
            shared.append(glued[1] + _shared_value(glued[2], glued[1].rstrip("="), model))
    return command if shared == words else shlex.join(shared)


def shared_text(spec: str) -> str:
    """Return the name of a text; of a local file, its name without folders."""
    prefix = next((one for one in (FILE_PREFIX, CHAT_PREFIX) if spec.startswith(one)), "")
    return prefix + Path(spec.removeprefix(prefix)).name


def shared_origin(origin: str) -> str:
    """Return where a text came from; of a local file, its name alone."""
    return f"file {origin.rpartition('/')[2]}" if origin.startswith("file ") else origin


def _shared_value(value: str, option: str, model: dict[str, Any]) -> str:
    """Return the value after the word ``option`` without local folders."""
    if option == _PROSE_OPTION:
        return value
    texts = value.split(",")  # --tasks and --text take several
    if any(is_file(text.strip()) for text in texts):
        # Only a path has slashes: a part with slashes but without the prefix belongs to a path with a comma.
        whole = re.sub(rf",(?!\s*(?:{FILE_PREFIX}|{CHAT_PREFIX}))(?=[^,]*/)", "\0", value)
        return ",".join(shared_text(text.strip()).replace("\0", ",") for text in whole.split(","))
    if _PATH_OPTION.fullmatch(option) or _is_local(value, model):
        return Path(value).name or value
    return value


def _is_local(value: str, model: dict[str, Any]) -> bool:
    if "/" not in value:
        return False
    if model["kind"] == "hub" and value == model["location"]:
        return False
    if value.startswith(("/", "./", "../", "~")) or value == model["requested"]:
        return True
    try:
        return Path(value).exists()
    except (OSError, ValueError):  # too long for a path, or with characters that paths cannot have
        return False
