"""``file:PATH`` and ``chat:PATH``, each perhaps with ``#FIELD``, name a user's own text, also in a list with commas."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ara.errors import DataError, UsageError
from ara.files import check_regular, expand_user

FILE_PREFIX, CHAT_PREFIX = "file:", "chat:"
# The longest path of Linux, in bytes.
_MAX_PATH = 4096


@dataclass(frozen=True)
class TextFile:
    """What ``file:PATH#FIELD`` or ``chat:PATH#FIELD`` names.

    Attributes:
        path: of the file.
        field: holds the text or the messages; ``None`` without ``#FIELD``.
    """

    path: Path
    field: str | None


def is_file(spec: str) -> bool:
    """Tell whether ``spec`` names a user's own file."""
    return spec.startswith((FILE_PREFIX, CHAT_PREFIX))


def origin_of(file: TextFile) -> str:
    """Return the file in words."""
    return f"file {file.path.resolve()}" + (f"#{file.field}" if file.field else "")


def text_file(spec: str) -> TextFile:
    """Parse ``file:PATH``, ``chat:PATH``, or either with ``#FIELD``.

    The part after the last ``#`` is a field if the part before it names a file and the whole does not.

    Raises:
        UsageError: the path is empty, or the home folder in it is unknown.
    """
    prefix, _, name = spec.partition(":")
    if not name:
        example = (
            "chat:PATH, for instance chat:conversations.jsonl"
            if prefix == "chat"
            else "file:PATH, for instance file:notes.txt"
        )
        raise UsageError(f"text {spec!r} names no file", f"write {example}")
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
        check_regular(path, os.stat(path))
    except IsADirectoryError:
        raise DataError(
            f"text {spec!r} is a folder, expected a file", "name one .txt, .jsonl or .parquet file in it"
        ) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def split_names(text: str) -> list[str]:
    """Split ``c4,file:PATH,piqa`` at its commas into distinct names; see :func:`split_items`."""
    return list(dict.fromkeys(split_items(text)))


def split_items(text: str) -> list[str]:
    """Split ``c4:0.7,file:PATH:0.3`` at its commas into names with their shares, if any.

    The path of a ``file:`` or ``chat:`` may contain commas: the longest one that exists is taken.
    """
    parts, names, start = text.split(","), list[str](), 0
    while start < len(parts):
        stop = _end_of_file(parts, start) if is_file(parts[start].lstrip()) else start + 1
        names.append(",".join(parts[start:stop]).strip())
        start = stop
    return [name for name in names if name]


def split_share(item: str) -> tuple[str, float | None]:
    """Split ``NAME:SHARE`` into a name and its share, which is ``None`` if no number follows the last colon.

    ``file:PATH`` and ``chat:PATH`` have no share if the whole path exists; ``chat:0.2`` has one.
    """
    name, _, last = item.rpartition(":")
    try:
        share = float(last)
    except ValueError:
        return item, None
    if name == FILE_PREFIX.rstrip(":") or (is_file(name) and _names_a_whole_path(item)):
        return item, None
    return name, share


def unreadable(path: Path, error: OSError | ValueError) -> DataError:
    """Return the error for a file that cannot be opened or read."""
    if isinstance(error, FileNotFoundError | ValueError):  # ValueError: an impossible file name
        return DataError(
            f"text file {path} does not exist", "check the path; relative ones start at the current folder"
        )
    pipe = "write its output to a file first" if error.filename and "regular file" in str(error) else None
    return DataError(
        f"text file {path} cannot be read: {error.strerror or error}", pipe or "check the path and its permissions"
    )


def _end_of_file(parts: list[str], start: int) -> int:
    """Return the index after the last part of the file that starts at ``start``: the longest existing path."""
    end, spec = start + 1, ""
    for stop in range(start + 1, len(parts) + 1):
        spec = ",".join(parts[start:stop]).strip()
        if len(spec) > _MAX_PATH:
            break
        try:
            file = text_file(split_share(spec)[0])
        except UsageError:  # reported when the text is looked up
            break
        if _is_there(file.path) and not file.path.is_dir() and "," not in (file.field or ""):
            end = stop
    return end


def _names_a_whole_path(spec: str) -> bool:
    try:
        file = text_file(spec)
    except UsageError:
        return False
    return file.field is None and _is_there(file.path)


def _is_there(path: Path) -> bool:
    """Tell whether ``path`` exists."""
    try:
        return path.exists()
    except (OSError, ValueError):  # the name is too long, or a folder is not accessible
        return False
