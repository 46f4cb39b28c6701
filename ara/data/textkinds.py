"""Recognises the format of a file by its first bytes; only plain text and JSON lines pass."""

from __future__ import annotations

import csv
import re
from itertools import islice
from pathlib import Path
from typing import Any

from ara import jsonfile
from ara.errors import DataError

# Bytes at the start of a file that identify its format.
HEAD_BYTES = 2**16
UTF8_MARK = b"\xef\xbb\xbf"
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")

_UNPACK = "unpack it, and name the text file inside"
_EXTRACT = "save its text as UTF-8 (.txt), or as JSON lines (.jsonl)"
_IMAGE = "name a text file; pictures are not read"
# (offset, magic bytes, format, hint).
_KINDS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"PAR1", "a packed Parquet file", _UNPACK),
    (0, b"PARE", "an encrypted Parquet file", "store it without encryption"),
    (0, b"\x1f\x8b", "packed by gzip twice", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "packed by zstd twice", _UNPACK),
    (0, b"BZh", "packed by bzip2", "bunzip2 it first; gzip and zstd are read as they are"),
    (0, b"\xfd7zXZ\x00", "packed by xz", "unxz it first; gzip and zstd are read as they are"),
    (0, b"\x04\x22\x4d\x18", "packed by lz4", "unlz4 it first; gzip and zstd are read as they are"),
    (0, b"PK\x03\x04", "a zip archive (which .docx, .xlsx and .epub are, too)", _UNPACK),
    (0, b"PK\x05\x06", "an empty zip archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"%PDF-", "a PDF document", "pdftotext FILE.pdf FILE.txt"),
    (0, b"%!PS", "a PostScript document", _EXTRACT),
    (0, b"{\\rtf", "an RTF document", _EXTRACT),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", _EXTRACT),
    (0, b"\x7fELF", "a program (ELF)", "name a text file"),
    (0, b"\x89PNG\r\n\x1a\n", "a picture (PNG)", _IMAGE),
    (0, b"\xff\xd8\xff", "a picture (JPEG)", _IMAGE),
    (0, b"GIF87a", "a picture (GIF)", _IMAGE),
    (0, b"GIF89a", "a picture (GIF)", _IMAGE),
    (0, b"II*\x00", "a picture (TIFF)", _IMAGE),
    (0, b"MM\x00*", "a picture (TIFF)", _IMAGE),
    (8, b"WEBP", "a picture (WebP)", _IMAGE),
    (8, b"WAVE", "sound (WAV)", "name a text file"),
    (0, b"OggS", "sound or video (Ogg)", "name a text file"),
    (0, b"SQLite format 3\x00", "a SQLite database", _EXTRACT),
    (0, b"ARROW1\x00\x00", "an Arrow file", "store it as Parquet or JSON lines"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", _EXTRACT),
    (0, b"\x93NUMPY", "an array of NumPy", _EXTRACT),
    (0, b"GGUF", "a model (GGUF)", "name a text file; the model is the first argument"),
    (0, b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself", "git lfs pull"),
)
_MARKS = (  # longest first: the mark of UTF-32 starts with that of UTF-16
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
# UTF-16: at least the first share of every second byte is NUL, and at most the second share of the other bytes.
_MANY, _FEW = 0.3, 0.02
# Most characters of a text file that are parsed as JSON as a whole; larger files are judged by their ends.
_PARSED = 2**26
ARRAY_HINT = "turn it into JSON lines: jq -c '.[]' FILE > FILE.jsonl"
_TABLE_ROWS, _TABLE_COLUMNS = 10, 3
# No blank at its ends: prose has one after each comma.
_COLUMN_NAME = re.compile(r"[\w#](?:[\w .#/()-]{0,38}[\w)])?")


def refuse_other_kinds(path: Path, head: bytes) -> None:
    """Refuse a file whose first bytes are not those of UTF-8 text.

    Args:
        path: the file, for the error.
        head: the first :data:`HEAD_BYTES` of the unpacked file.

    Raises:
        DataError: names the format found.
    """
    for offset, magic, what, hint in _KINDS:
        if head[offset : offset + len(magic)] == magic:
            raise DataError(f"{path} is {what}, expected UTF-8 text", hint)
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), None) or _wide(head)
    if encoding:
        raise DataError(
            f"{path} is {encoding} text, expected UTF-8",
            f"convert it: iconv -f {encoding} -t UTF-8 FILE > NEW (and name NEW)",
        )


def refuse_nul(path: Path, data: bytes) -> None:
    """Refuse text that contains a NUL byte.

    Raises:
        DataError: names the position.
    """
    place = data.find(b"\0")
    if place >= 0:
        raise DataError(
            f"{path} is not text: byte {place + 1:,} is NUL", "name a UTF-8 text file; binary files are not read"
        )


def refuse_structured(path: Path, text: str) -> None:
    """Refuse JSON and tables in a file that is named as plain text: their brackets and commas would be read as text.

    Raises:
        DataError: names the format found.
    """
    start = text[:HEAD_BYTES].lstrip()[:1]
    if start and start in "{[":
        _refuse_json(path, text)
    elif delimiter := _table_delimiter(text):
        raise DataError(
            f"{path} holds a table (columns separated by {delimiter!r}), expected text",
            'write its text column as JSON lines: one {"text": "…"} per line',
        )


def json_lines_or_refuse(path: Path, head: bytes) -> None:
    """Refuse a ``.json`` file, unless it holds one object per line, as the shards of C4 do.

    Args:
        path: the file, for the error.
        head: the first :data:`HEAD_BYTES` of the unpacked file.

    Raises:
        DataError: it holds an array or a single document.
    """
    first, line_feed, _ = head.removeprefix(UTF8_MARK).lstrip().partition(b"\n")
    if first.startswith(b"["):
        raise DataError(f"{path} is a JSON array, expected JSON lines", ARRAY_HINT)
    whole = line_feed or len(head) < HEAD_BYTES
    # A first line longer than the head is checked when it is read.
    if whole and not isinstance(_json(first.decode("utf-8", "replace")), dict):
        raise DataError(f"{path} is one JSON document, expected JSON lines", 'write one {"text": "…"} per line')


def _wide(head: bytes) -> str | None:
    """Return ``UTF-16LE`` or ``UTF-16BE`` for such text without a byte order mark, else ``None``."""
    half = len(head) // 2
    if half < 2:
        return None
    even, odd = head[0 : 2 * half : 2].count(0) / half, head[1 : 2 * half : 2].count(0) / half
    if odd > _MANY and even < _FEW:
        return "UTF-16LE"
    if even > _MANY and odd < _FEW:
        return "UTF-16BE"
    return None


def _refuse_json(path: Path, text: str) -> None:
    front = [_json(line[0]) for line in islice(re.finditer(r"[^\n]*\S[^\n]*", text), 3)]
    if front and all(isinstance(value, dict) for value in front):
        raise DataError(f"{path} holds JSON lines, but its name does not say so", "rename it to end with .jsonl")
    if len(text) > _PARSED:
        likely = re.match(r'\s*(\[\s*[\[{"]|\{\s*")', text) and text.rstrip()[-1:] in ("]", "}")
        found: Any = [] if likely else None
    else:
        found = _json(text)
    if isinstance(found, list | dict):
        what = "array" if text.lstrip().startswith("[") else "object"
        raise DataError(f"{path} is a JSON {what}, expected text", ARRAY_HINT)


def _json(text: str) -> Any:
    """Return the JSON value of ``text``, or ``None`` if it is not JSON."""
    try:
        return jsonfile.parse(text, finite=False)
    except ValueError:
        return None


def _table_delimiter(text: str) -> str | None:
    """Return the column delimiter of a table with a header line, or ``None``.

    A table has the same number of columns in each of its first lines, at least three. Its column names are short and
    distinct. Prose does not look like this.
    """
    lines = text[:HEAD_BYTES].split("\n", _TABLE_ROWS)[:_TABLE_ROWS]
    if len(lines) < _TABLE_ROWS:
        return None
    for delimiter in "\t,;|":
        columns = lines[0].count(delimiter) + 1
        if columns < _TABLE_COLUMNS:
            continue
        try:
            rows = list(csv.reader(lines, delimiter=delimiter))
        except csv.Error:
            continue
        names = rows[0]
        same = len(rows) == len(lines) and all(len(row) == len(names) for row in rows)
        if same and len(set(names)) == len(names) and all(_COLUMN_NAME.fullmatch(name) for name in names):
            return delimiter
    return None
