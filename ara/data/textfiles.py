"""Reading text files strictly: whatever is missing or malformed is told with its path and line.

Plain text, JSON lines and Parquet are read, the first two also packed by gzip or zstd. Everything else is refused by
what it is: brackets, commas or bytes of another format would be calibrated on like text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ara import jsonfile
from ara.data.packed import TextStream, opened, unpacked
from ara.data.parquetfiles import PARQUET_MAGIC, PARQUET_SUFFIXES, read_parquet
from ara.data.textkinds import (
    HEAD_BYTES,
    JSON_LINES,
    UTF8_MARK,
    json_lines_or_refuse,
    refuse_nul,
    refuse_other_kinds,
    refuse_structured,
)
from ara.errors import DataError, UsageError

# Field of JSON lines, and column of Parquet, that holds the text.
DEFAULT_FIELD = "text"
_TABLES = {".csv": "comma-separated values", ".tsv": "tab-separated values"}
_EXPECTED = 'expected lines such as {"text": "…"}'
_JSON_KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list"}
# Names of fields that an error lists.
_SHOWN = 12


def read_file(path: Path, field: str | None = None) -> list[str]:
    """Return the documents of ``path``: one per JSON line or Parquet row, or one plain text.

    Args:
        path: ``.jsonl`` and ``.ndjson`` hold JSON lines, ``.json`` if it holds one object per line; ``.gz`` or
            ``.zst`` may follow. Parquet is known by its first bytes. Everything else is one plain text.
        field: that holds the text; :data:`DEFAULT_FIELD` by default.

    Raises:
        DataError: the file is missing, unreadable, larger than
            :data:`ara.data.packed.MAX_TEXT_BYTES`, malformed, or something else than text.
        UsageError: a field of plain text.
    """
    with opened(path) as file:
        if file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC:
            file.seek(0)
            return read_parquet(path, file, field or DEFAULT_FIELD)
        file.seek(0)
        stream = unpacked(path, file, HEAD_BYTES)
        refuse_other_kinds(path, stream.head)
        if stream.suffix in PARQUET_SUFFIXES:
            raise DataError(f"{path} is called {stream.suffix}, but is no Parquet file", "is it complete?")
        if stream.suffix in _TABLES:
            raise DataError(
                f"{path} holds {_TABLES[stream.suffix]} by its name, expected text",
                'write its column of text as JSON lines, one {"text": "…"} per line; plain text is called .txt',
            )
        if stream.suffix == ".json":
            json_lines_or_refuse(path, stream.head)
        if stream.suffix in (*JSON_LINES, ".json"):
            return _json_lines(stream, field or DEFAULT_FIELD)
        if field is not None:
            raise UsageError(
                f"{path} is plain text, which has no field {field!r}",
                "name the file alone, or one that ends with .jsonl or .parquet",
            )
        return [_plain(stream)]


def read_jsonl(path: Path, field: str = DEFAULT_FIELD) -> list[str]:
    """Return the string ``field`` of every line of ``path``, in order; lines without characters are skipped.

    Only a line feed ends a line: ``str.splitlines`` would also cut at U+2028, which JSON allows within a string.

    Raises:
        DataError: the file is missing or unreadable, or a line is not UTF-8, not JSON or has no such field with a
            string; the message names path and line.
    """
    with opened(path) as file:
        return _json_lines(unpacked(path, file, HEAD_BYTES), field)


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
    texts: list[str] = []
    for number, line in stream.lines():
        if number == 1:
            line = line.removeprefix(UTF8_MARK)
        if line.strip():
            texts.append(_text_field(stream.path, number, line, field))
    return texts


def _text_field(path: Path, number: int, line: bytes, field: str) -> str:
    """Return one field of one JSON line."""
    where = f"{path}, line {number}"
    try:
        record = jsonfile.parse(line.decode("utf-8"), finite=False)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, error) from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: a string holds half a surrogate pair, which is no character", "leave that line out"
        ) from error
    except ValueError as error:
        if number == 1 and line.strip() in (b"[", b"[{", b"{"):
            raise DataError(f"{path} is one JSON document, expected JSON lines", _array_hint()) from error
        raise DataError(f"{where}: not JSON ({error})", _EXPECTED) from error
    if isinstance(record, dict) and isinstance(record.get(field), str):
        text: str = record[field]
        return text
    raise _no_text(where, record, field)


def _no_text(where: str, record: Any, field: str) -> DataError:
    """Return the error for a line without a text; it names the fields that could be meant."""
    if not isinstance(record, dict):
        hint = _array_hint() if isinstance(record, list) and record and isinstance(record[0], dict) else _EXPECTED
        got = type(record).__name__
        return DataError(f"{where}: got {got}, expected an object with a string field {field!r}", hint)
    if field in record:
        kind = _JSON_KINDS.get(type(record[field]), "an object")
        return DataError(f"{where}: field {field!r} is {kind}, expected a string", "leave that line out, or mend it")
    names = ", ".join(name if name.isprintable() else repr(name) for name in list(record)[:_SHOWN]) or "no field"
    strings = [name for name, value in record.items() if isinstance(value, str) and name.isprintable()]
    hint = f"name the field that holds the text: file:PATH#{strings[0]}" if strings else _EXPECTED
    return DataError(f"{where}: got an object with {names}, expected a string field {field!r}", hint)


def _array_hint() -> str:
    return "turn it into JSON lines: jq -c '.[]' FILE > FILE.jsonl"


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{path}, line {line}: not UTF-8 text ({error.reason})", "convert it: iconv -f ENCODING -t UTF-8 FILE > NEW"
    )
