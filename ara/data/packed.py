"""Text files as streams of bytes: gzip and zstd are unpacked on the way, and nothing is read beyond a limit.

zstd comes with pyarrow, which ``datasets`` needs anyway.
"""

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

# Of a text, packed and unpacked, in bytes: a shard of C4 has 0.8 GiB. Reading takes about four times that in memory.
MAX_TEXT_BYTES = 2**30
# Of one line of JSON, in bytes.
MAX_LINE_BYTES = 2**26
_CHUNK = 2**20

_GZIP, _ZSTD = "gzip", "zstd"
_MAGIC = {b"\x1f\x8b": _GZIP, b"\x28\xb5\x2f\xfd": _ZSTD}
_SUFFIXES = {".gz": _GZIP, ".gzip": _GZIP, ".zst": _ZSTD, ".zstd": _ZSTD}


class TextStream:
    """The unpacked bytes of a text file, which count what was read.

    Attributes:
        path: of the file.
        suffix: lower-case ending of its name that says the format, ``.jsonl`` of ``x.jsonl.gz``.
        head: its first bytes; they are read again by :meth:`rest` and :meth:`lines`.
    """

    def __init__(self, path: Path, suffix: str, file: Any, head_bytes: int) -> None:
        self.path, self.suffix, self._file = path, suffix, io.BufferedReader(file, _CHUNK)
        self.head = self._file.read(head_bytes)

    def rest(self) -> bytes:
        """Return all bytes.

        Raises:
            DataError: there are more than :data:`MAX_TEXT_BYTES`.
        """
        found = bytearray(self.head)
        while chunk := self._file.read(_CHUNK):
            found += chunk
            self._check(len(found))
        return bytes(found)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield number and bytes of every line, which only a line feed ends.

        Raises:
            DataError: there are more bytes than :data:`MAX_TEXT_BYTES`, or than :data:`MAX_LINE_BYTES` in a line.
        """
        total = 0
        head = io.BytesIO(self.head)
        number = 0
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
        f"{path} {verb} more than {MAX_TEXT_BYTES // 2**30} GiB, the most that is read of a text",
        "make a smaller file, for instance of its first 100,000 lines or rows",
    )


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a text file; whatever goes wrong while it is open is told as an error of that file.

    Raises:
        DataError: it is missing, no regular file, larger than :data:`MAX_TEXT_BYTES`, or damaged.
    """
    try:
        opening = open_regular(path)
    except (OSError, ValueError) as error:  # the latter: a NUL in its name
        raise unreadable(path, error) from error
    try:
        with opening as file:
            if os.fstat(file.fileno()).st_size > MAX_TEXT_BYTES:
                raise too_large(path, "has")
            yield file
    except AraError:
        raise
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}", "is it complete? Pack it again") from error
    except OSError as error:
        if error.errno is None:  # pyarrow's
            raise DataError(f"{path} cannot be unpacked: {error}", "is it complete? Pack it again") from error
        raise unreadable(path, error) from error


def unpacked(path: Path, file: BinaryIO, head_bytes: int) -> TextStream:
    """Return the stream of an open file, unpacked if its first bytes say that it is packed.

    Args:
        path: its name says the format.
        file: at its start.
        head_bytes: how many bytes to read ahead.

    Raises:
        DataError: the name says that it is packed, and it is not, or by something else.
        OSError, EOFError, zlib.error: it is damaged.
    """
    magic = file.read(4)
    file.seek(0)
    packing = next((name for start, name in _MAGIC.items() if magic.startswith(start)), None)
    named = _SUFFIXES.get(path.suffix.lower())
    if named is not None and named != packing:
        raise DataError(
            f"{path} is called {path.suffix}, but is not packed by {named}",
            "give it the name of what it is: .txt, .jsonl, .jsonl.gz, .jsonl.zst",
        )
    stream: Any = file
    if packing == _GZIP:
        stream = gzip.GzipFile(fileobj=file)
    elif packing == _ZSTD:
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    inner = path.with_suffix("") if named else path
    return TextStream(path, inner.suffix.lower(), stream, head_bytes)
