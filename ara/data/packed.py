"""Text files as byte streams: gzip and zstd are unpacked while reading, up to a size limit."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ara.data.filespecs import unreadable
from ara.errors import AraError, DataError
from ara.files import open_regular

# Bytes of a text, packed and unpacked. A shard of C4 has 0.8 GiB. Reading needs about four times as much memory.
MAX_TEXT_BYTES = 2**30
# Bytes of one line of JSON.
MAX_LINE_BYTES = 2**26
_CHUNK = 2**20

_GZIP, _ZSTD = "gzip", "zstd"
_MAGIC = {b"\x1f\x8b": _GZIP, b"\x28\xb5\x2f\xfd": _ZSTD}
_SUFFIXES = {".gz": _GZIP, ".gzip": _GZIP, ".zst": _ZSTD, ".zstd": _ZSTD}


class TextStream:
    """The unpacked bytes of a text file.

    Attributes:
        path: the file, for errors.
        suffix: lower-case ending of the name without the packing, such as ``.jsonl`` for ``x.jsonl.gz``.
        head: the first bytes, which :meth:`rest` and :meth:`lines` return again.
    """

    def __init__(self, path: Path, suffix: str, file: Any, head_bytes: int) -> None:
        self.path, self.suffix, self._file = path, suffix, io.BufferedReader(file, _CHUNK)
        self.head = self._file.read(head_bytes)

    def rest(self) -> bytes:
        """Return all bytes.

        Raises:
            DataError: more than :data:`MAX_TEXT_BYTES`.
        """
        found = bytearray(self.head)
        while chunk := self._file.read(_CHUNK):
            found += chunk
            self._check(len(found))
        return bytes(found)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield number and bytes of every line; only a line feed ends a line.

        Raises:
            DataError: more than :data:`MAX_TEXT_BYTES` in all, or :data:`MAX_LINE_BYTES` in a line.
        """
        total, number, head = 0, 0, io.BytesIO(self.head)
        while True:
            line = head.readline()
            if not line.endswith(b"\n"):
                line += self._file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            number, total = number + 1, total + len(line)
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"{self.path}, line {number} has more than {MAX_LINE_BYTES // 2**20} MiB, expected JSON lines",
                    'write one {"text": "…"} per line',
                )
            self._check(total)
            yield number, line

    def _check(self, count: int) -> None:
        if count > MAX_TEXT_BYTES:
            raise too_large(self.path, "holds")


def too_large(path: Path, verb: str) -> DataError:
    """Return the error for a text above the limit."""
    return DataError(
        f"{path} {verb} more than {MAX_TEXT_BYTES // 2**30} GiB, the limit for a text",
        "use a smaller file, for instance its first 100,000 lines or rows",
    )


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a text file and report errors inside the block as errors of this file.

    Raises:
        DataError: the file is missing, not regular, larger than :data:`MAX_TEXT_BYTES`, or damaged.
    """
    try:
        opening = open_regular(path)
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise unreadable(path, error) from error
    try:
        with opening as file:
            if os.fstat(file.fileno()).st_size > MAX_TEXT_BYTES:
                raise too_large(path, "has")
            yield file
    except AraError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, error) from error
        # Errors of gzip and pyarrow have no errno.
        raise DataError(f"{path} cannot be unpacked: {error}", "the file may be incomplete: pack it again") from error


def unpacked(path: Path, file: BinaryIO, head_bytes: int) -> TextStream:
    """Return the stream of an open file, unpacked if its first bytes are those of gzip or zstd.

    Args:
        path: its name gives the format.
        file: positioned at the start.
        head_bytes: how many bytes to read ahead.

    Raises:
        DataError: the name says gzip or zstd and the content does not.
        OSError, EOFError, zlib.error: the file is damaged.
    """
    magic = file.read(4)
    file.seek(0)
    packing = next((name for start, name in _MAGIC.items() if magic.startswith(start)), None)
    named = _SUFFIXES.get(path.suffix.lower())
    if named is not None and named != packing:
        raise DataError(
            f"{path} is called {path.suffix}, but is not packed by {named}",
            "rename it to match its content: .txt, .jsonl, .jsonl.gz, .jsonl.zst",
        )
    stream: Any = file
    if packing == _GZIP:
        stream = gzip.GzipFile(fileobj=file)
    elif packing == _ZSTD:
        import pyarrow  # a requirement of datasets

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    inner = path.with_suffix("") if named else path
    return TextStream(path, inner.suffix.lower(), stream, head_bytes)
