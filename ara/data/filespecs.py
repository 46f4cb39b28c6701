"""``file:PATH`` and ``file:PATH#FIELD``: how a text of one's own is named, also among others with commas between."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ara.errors import DataError, UsageError
from ara.files import check_regular, expand_user

FILE_PREFIX = "file:"
# The longest path that Linux takes, in bytes; a longer one names no file.
_MAX_PATH = 4096


@dataclass(frozen=True)
class TextFile:
    """What ``file:PATH#FIELD`` names.

    Attributes:
        path: of the file; ``~`` is replaced.
        field: name of the field that holds the text, or ``None`` where the spec names none.
    """

    path: Path
    field: str | None


def text_file(spec: str) -> TextFile:
    """Return what ``spec``, which starts with ``file:``, names.

    What follows the last ``#`` is the field if there is a file of the name before it, and none of the whole name.

    Raises:
        UsageError: it names no file, or the home folder of a user that is not known.
    """
    name = spec.removeprefix(FILE_PREFIX)
    if not name:
        raise UsageError(f"text {spec!r} names no file", "write file:PATH, for instance file:notes.txt")
    whole = TextFile(expand_user(name, "text file"), None)
    path, _, field = name.rpartition("#")
    if not path or not field or _is_there(whole.path):
        return whole
    named = TextFile(expand_user(path, "text file"), field)
    return named if _is_there(named.path) else whole


def check_text_file(spec: str) -> None:
    """Check that ``spec`` names a regular file, without opening it.

    Raises:
        UsageError: see :func:`text_file`.
        DataError: the file is missing, or is a folder, a pipe or a device.
    """
    path = text_file(spec).path
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    try:
        check_regular(path, found)
    except IsADirectoryError:
        raise DataError(
            f"text {spec!r} is a folder, expected a file", "name one .txt, .jsonl or .parquet file in it"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None


def split_names(text: str) -> list[str]:
    """Split ``c4,file:PATH,piqa`` at its commas, each name once, in their order.

    The path of a ``file:`` may hold commas: it reaches as far as there is a file of that name.
    """
    parts, names, start = text.split(","), list[str](), 0
    while start < len(parts):
        stop = _end_of_file(parts, start) if parts[start].lstrip().startswith(FILE_PREFIX) else start + 1
        names.append(",".join(parts[start:stop]).strip())
        start = stop
    return list(dict.fromkeys(name for name in names if name))


def unreadable(path: Path, error: OSError | ValueError) -> DataError:
    """Return the error for a file that the operating system does not give out."""
    if isinstance(error, FileNotFoundError | ValueError):  # the latter: a name that no file can have
        return DataError(
            f"text file {path} does not exist", "check the path; relative ones start at the current folder"
        )
    pipe = "write what comes out of it to a file first" if error.filename and "regular file" in str(error) else None
    return DataError(
        f"text file {path} cannot be read: {error.strerror or error}", pipe or "check the path and its permissions"
    )


def _end_of_file(parts: list[str], start: int) -> int:
    """Return behind which part the ``file:`` that starts at ``start`` ends: the longest that is there."""
    end, spec = start + 1, ""
    for stop in range(start + 1, len(parts) + 1):
        spec = ",".join(parts[start:stop]).strip()
        if len(spec) > _MAX_PATH:
            break
        try:
            file = text_file(spec)
        except UsageError:  # told when the text is looked up
            break
        if _is_there(file.path) and not file.path.is_dir() and "," not in (file.field or ""):
            end = stop
    return end


def _is_there(path: Path) -> bool:
    """Tell whether there is something called ``path``."""
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, a folder that must not be looked into
        return False
