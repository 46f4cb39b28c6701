"""Reading text files strictly: whatever is missing or malformed is told with its path and line."""

from __future__ import annotations

import json
from pathlib import Path

from ara.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_file(path: Path) -> list[str]:
    """Return the documents of ``path``: JSON lines when it is called ``*.jsonl``, else one plain text.

    Raises:
        DataError: see :func:`read_jsonl` and :func:`read_plain`.
    """
    return read_jsonl(path) if path.suffix.lower() == ".jsonl" else [read_plain(path)]


def read_plain(path: Path) -> str:
    """Return the whole file as one string, line ends untouched.

    Raises:
        DataError: the file is missing, unreadable or not UTF-8 (with the line of the first bad byte).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    data = data.removeprefix(_BYTE_ORDER_MARK)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, data.count(b"\n", 0, error.start) + 1, error) from error


def read_jsonl(path: Path) -> list[str]:
    """Return the string field ``text`` of every line of ``path``, in order; lines without characters are skipped.

    Only a line feed ends a line: ``str.splitlines`` would also cut at U+2028, which JSON allows within a string.

    Raises:
        DataError: the file is missing or unreadable, or a line is not UTF-8, not JSON or has no string field
            ``text``; the message names path and line.
    """
    texts: list[str] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if line.strip():
                    texts.append(_text_field(path, number, line))
    except OSError as error:
        raise unreadable(path, error) from error
    return texts


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the error for a file that the operating system does not give out."""
    if isinstance(error, FileNotFoundError):
        return DataError(
            f"text file {path} does not exist", "check the path; relative ones start at the current folder"
        )
    return DataError(f"text file {path} cannot be read: {error.strerror or error}")


def _text_field(path: Path, number: int, line: bytes) -> str:
    """Return the field ``text`` of one JSON line."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not JSON ({error})", 'expected lines such as {"text": "…"}') from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = (
            f"an object with {', '.join(record) or 'no field'}" if isinstance(record, dict) else type(record).__name__
        )
        raise DataError(
            f"{path}, line {number}: got {found}, expected an object with a string field 'text'",
            'expected lines such as {"text": "…"}',
        )
    try:
        text.encode("utf-8")  # JSON can escape half a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise DataError(f"{path}, line {number}: the text holds half a surrogate pair ({error.reason})") from error
    return text


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{path}, line {line}: not UTF-8 text ({error.reason})", "convert the file to UTF-8 first")
