"""``workspace.json``: the format version of a workspace and its model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ara.errors import WorkspaceError, disk_errors
from ara.files import remove, write_text
from ara.jsonfile import first_problem, read
from ara.workspace.manifest import FORMAT_VERSION, ModelEntry
from ara.workspace.writer import PARTIAL

INDEX = "workspace.json"


class _Index(BaseModel):
    model_config = ConfigDict(defer_build=True)
    format_version: int = Field(le=FORMAT_VERSION)
    model: ModelEntry | None


def read_index(root: Path) -> dict[str, Any] | None:
    """Return the model of the workspace at ``root``; ``None`` before the first decomposition.

    Raises:
        WorkspaceError: the file is missing, damaged or of a newer format.
    """
    path = root / INDEX
    try:
        index = read(path)
        version = index.get("format_version") if isinstance(index, dict) else None
        # Checked first: a newer format may describe the model in another form.
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise WorkspaceError(
                f"{path} has format {version}; this ara reads formats up to {FORMAT_VERSION}", "update ara-svd"
            )
        model = _Index.model_validate(index).model
    except ValidationError as error:
        why: object = first_problem(error)
    except OSError as error:
        why = error.strerror
    except ValueError as error:
        why = error
    else:
        return None if model is None else model.model_dump()
    raise WorkspaceError(f"{path} cannot be read ({why})", "choose another workspace with -w")


def write_index(root: Path, model: dict[str, Any] | None) -> None:
    """Write the model of the workspace at ``root`` in one step."""
    aside = root / f".{INDEX}{PARTIAL}"
    with disk_errors(root):
        remove(aside)
        write_text(aside, json.dumps({"format_version": FORMAT_VERSION, "model": model}, indent=2) + "\n")
        os.replace(aside, root / INDEX)
