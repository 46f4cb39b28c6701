"""Reads text files strictly: an error names the path and the line.

Plain text, JSON lines and Parquet are read; the first two may be packed with gzip or zstd. Other formats are refused,
because their brackets, commas or bytes would be read as text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ara import jsonfile
from ara.data.packed import TextStream, opened, unpacked
from ara.data.parquetfiles import LIST, PARQUET_MAGIC, PARQUET_SUFFIXES, read_parquet
from ara.data.textkinds import (
    ARRAY_HINT,
    HEAD_BYTES,
    JSON_LINES,
    UTF8_MARK,
    json_lines_or_refuse,
    refuse_nul,
    refuse_other_kinds,
    refuse_structured,
)
from ara.errors import DataError, UsageError

# Default name of the JSON field or Parquet column that holds the text.
DEFAULT_FIELD = "text"
_TABLES = {".csv": "comma-separated values", ".tsv": "tab-separated values"}
_EXPECTED = 'expected lines such as {"text": "…"}'
EXAMPLE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
_JSON_KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list"}
# Most fields that an error lists.
_SHOWN = 12


def read_file(path: Path, field: str | None = None) -> list[str]:
    """Return the documents of ``path``: one per JSON line or Parquet row, or one plain text.

    Args:
        path: ``.jsonl`` and ``.ndjson`` hold JSON lines, as does ``.json`` with one object per line. ``.gz`` or
            ``.zst`` may follow. The first bytes identify Parquet. Anything else is plain text.
        field: holds the text; :data:`DEFAULT_FIELD` by default.

    Raises:
        DataError: the file is missing, unreadable, too large, malformed, or not text.
        UsageError: ``field`` is given for plain text.
    """
    with opened(path) as file:
        if _is_parquet(file):
            return read_parquet(path, file, field or DEFAULT_FIELD)
        stream = _text_stream(path, file)
        if stream.suffix in (*JSON_LINES, ".json"):
            return _json_lines(stream, field or DEFAULT_FIELD)
        if field is not None:
            raise UsageError(
                f"{path} is plain text, which has no field {field!r}",
                "name the file alone, or one that ends with .jsonl or .parquet",
            )
        return [_plain(stream)]


def read_lists(path: Path, field: str) -> list[tuple[str, Any]]:
    """Return place and value of ``field`` of every JSON line or Parquet row.

    Args:
        path: as of :func:`read_file`, but no plain text.
        field: holds a list. Only the lists of Parquet files are checked to be lists.

    Raises:
        DataError: the file is missing, unreadable, too large, malformed, plain text, or a line has no such field.
    """
    with opened(path) as file:
        if _is_parquet(file):
            rows = read_parquet(path, file, field, LIST)
            return [(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)]
        stream = _text_stream(path, file)
        if stream.suffix not in (*JSON_LINES, ".json"):
            raise DataError(
                f"{path} is plain text according to its name, expected JSON lines or Parquet",
                f"one line per conversation, such as {EXAMPLE}, in a file that ends with .jsonl",
            )
        found = []
        for number, line in _filled_lines(stream):
            record = _record(path, number, line, f"expected lines such as {EXAMPLE}")
            where = f"{path}, line {number}"
            if not isinstance(record, dict) or field not in record:
                got = _fields(record) if isinstance(record, dict) else f"a {type(record).__name__}"
                raise DataError(
                    f"{where}: got {got}, expected an object with a list {field!r}",
                    f"expected lines such as {EXAMPLE}; name another field with PATH#FIELD",
                )
            found.append((where, record[field]))
        return found


def read_jsonl(path: Path, field: str = DEFAULT_FIELD) -> list[str]:
    """Return the string ``field`` of every non-blank line of ``path``, in order.

    Only a line feed ends a line: ``str.splitlines`` would also cut at U+2028, which JSON allows within a string.

    Raises:
        DataError: the file cannot be read, or a line is not UTF-8, not JSON or has no such string; names the line.
    """
    with opened(path) as file:
        return _json_lines(unpacked(path, file, HEAD_BYTES), field)


def _is_parquet(file: BinaryIO) -> bool:
    """Tell whether a file, positioned at the start, is Parquet; it is at the start again afterwards."""
    found = file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
    file.seek(0)
    return found


def _text_stream(path: Path, file: BinaryIO) -> TextStream:
    """Return the stream of a file that holds plain text or JSON lines; refuse other formats."""
    stream = unpacked(path, file, HEAD_BYTES)
    refuse_other_kinds(path, stream.head)
    if stream.suffix in PARQUET_SUFFIXES:
        raise DataError(f"{path} is called {stream.suffix}, but is no Parquet file", "it may be incomplete")
    if stream.suffix in _TABLES:
        raise DataError(
            f"{path} holds {_TABLES[stream.suffix]} according to its name, expected text",
            'write its text column as JSON lines, one {"text": "…"} per line; or rename plain text to .txt',
        )
    if stream.suffix == ".json":
        json_lines_or_refuse(path, stream.head)
    return stream


def _plain(stream: TextStream) -> str:
    """Return the whole text, line ends untouched."""
    data = stream.rest()
    refuse_nul(stream.path, data)
    data = data.removeprefix(UTF8_MARK)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(stream.path, data.count(b"\n", 0, error.start) + 1, error) from error
    del data
    refuse_structured(stream.path, text)
    return text


def _json_lines(stream: TextStream, field: str) -> list[str]:
    return [_text_field(stream.path, number, line, field) for number, line in _filled_lines(stream)]


def _filled_lines(stream: TextStream) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of the lines that are not blank."""
    for number, line in stream.lines():
        if number == 1:
            line = line.removeprefix(UTF8_MARK)
        if line.strip():
            yield number, line


def _record(path: Path, number: int, line: bytes, expected: str) -> Any:
    """Return the value of one JSON line; ``expected`` is the hint of an error."""
    where = f"{path}, line {number}"
    try:
        return jsonfile.parse(line.decode("utf-8"), finite=False)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, error) from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: a string holds half a surrogate pair, which is not a character", "remove that line"
        ) from error
    except ValueError as error:
        if number == 1 and line.strip() in (b"[", b"[{", b"{"):
            raise DataError(f"{path} is one JSON document, expected JSON lines", ARRAY_HINT) from error
        raise DataError(f"{where}: not JSON ({error})", expected) from error


def _text_field(path: Path, number: int, line: bytes, field: str) -> str:
    """Return the field ``field`` of one JSON line."""
    record = _record(path, number, line, _EXPECTED)
    if isinstance(record, dict) and isinstance(record.get(field), str):
        text: str = record[field]
        return text
    raise _no_text(f"{path}, line {number}", record, field)


def _no_text(where: str, record: Any, field: str) -> DataError:
    """Return the error for a line without text; it lists the fields of the line."""
    if not isinstance(record, dict):
        hint = ARRAY_HINT if isinstance(record, list) and record and isinstance(record[0], dict) else _EXPECTED
        got = type(record).__name__
        return DataError(f"{where}: got {got}, expected an object with a string field {field!r}", hint)
    if field in record:
        kind = _JSON_KINDS.get(type(record[field]), "an object")
        return DataError(f"{where}: field {field!r} is {kind}, expected a string", "remove or correct that line")
    strings = [name for name, value in record.items() if isinstance(value, str) and name.isprintable()]
    hint = f"name the field that holds the text: file:PATH#{strings[0]}" if strings else _EXPECTED
    return DataError(f"{where}: got {_fields(record)}, expected a string field {field!r}", hint)


def _fields(record: dict[str, Any]) -> str:
    """Return the names of the fields of an object in words."""
    names = ", ".join(name if name.isprintable() else repr(name) for name in list(record)[:_SHOWN]) or "no field"
    return f"an object with {names}"


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{path}, line {line}: not UTF-8 text ({error.reason})", "convert it: iconv -f ENCODING -t UTF-8 FILE > NEW"
    )
