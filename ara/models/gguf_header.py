"""Reads and checks the header of a GGUF file: keys, values, and the place of each tensor.

Every count is checked against the size of the file. A header that passes is safe for the readers of transformers and of
the ``gguf`` package, which check no counts.

Layout (little-endian): magic, version (u32), number of tensors (u64), number of keys (u64); then each key with the type
of its value and the value; then each tensor's name, dimensions, type and offset; then, aligned, the data.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ara.errors import ModelError
from ara.files import open_regular
from ara.models.shown import shown

MAGIC = b"GGUF"
AGAIN = "download the file again"

_DEFAULT_ALIGNMENT = 32

# Version 1 counts with 32 bits; no file in use has it.
_VERSIONS = (2, 3)
# The largest known header, with 262,144 tokens and 514,906 merges, has 16 MB and 1.3 million elements.
_MAX_HEADER_BYTES = 1 << 28
_MAX_ELEMENTS = 1 << 22
_MAX_ALIGNMENT = 1 << 20
_MAX_DIMENSIONS = 4  # of ggml
# Number of a type of values → format of ``struct``.
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """Where the data of one tensor is.

    Attributes:
        name: the name in llama.cpp, such as ``blk.0.attn_q.weight``.
        shape: in the order of torch: the last dimension is contiguous.
        kind: number of the ggml type.
        path: file with the data.
        start: first byte of the data in that file.
        nbytes: size of the data.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    path: Path
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """The content of a GGUF header.

    Attributes:
        path: of the file.
        metadata: key → number, string, boolean or list of them, in the order of the file.
        tensors: name → its place, in the order of the file.
        raw: key → start and end of its entry in the file, in bytes.
        alignment: of the data, in bytes.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    raw: Mapping[str, tuple[int, int]]
    alignment: int


@contextmanager
def open_gguf(path: Path) -> Iterator[BinaryIO]:
    """Open a GGUF file, positioned after its magic number.

    Raises:
        ModelError: the file cannot be read, or is not a GGUF file.
    """
    try:
        with open_regular(path) as file:
            start = file.read(len(MAGIC))
            if start != MAGIC:
                raise ModelError(f"{path} is not a GGUF file: it starts with {start!r}, expected {MAGIC!r}", AGAIN)
            yield file
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        ModelError: the file cannot be read, is not a GGUF file, or its header is damaged, big-endian or too large.
    """
    with open_gguf(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return _Reader(path, content).header()
        except UnicodeDecodeError:
            raise ModelError(f"{path} cannot be read as GGUF: a text in its header is not UTF-8", AGAIN) from None
        except ValueError as error:
            raise ModelError(f"{path} cannot be read as GGUF: {error}", AGAIN) from None


class _Reader:
    """Reads the header from front to back; raises ``ValueError`` at the first error."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path = path
        self.content = content
        self.size = len(content)
        self.end = min(self.size, _MAX_HEADER_BYTES)
        self.at = len(MAGIC)
        self.elements = 0

    def header(self) -> GgufHeader:
        """Read the whole header."""
        version = self.number("I")
        if version not in _VERSIONS:
            if version & 0xFFFF == 0:
                raise ValueError("it is written for big-endian machines")
            raise ValueError(f"it has version {version}, known are {' and '.join(map(str, _VERSIONS))}")
        tensors, keys = self.number("Q"), self.number("Q")
        # A key takes at least 13 bytes (length, type, value), a tensor at least 24.
        self.room("tensors", tensors, 24)
        self.room("keys", keys, 13)
        metadata, raw = self.metadata(keys)
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {shown(alignment)}, expected a power of two")
        return GgufHeader(self.path, metadata, self.tensors(tensors, alignment), raw, alignment)

    def metadata(self, count: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
        """Read ``count`` keys; returns their values, and start and end of each entry in the file."""
        found: dict[str, Any] = {}
        raw: dict[str, tuple[int, int]] = {}
        for _ in range(count):
            start = self.at
            key = self.text()
            if key in found:
                raise ValueError(f"the key {shown(key)} is there twice")
            found[key] = self.value(self.number("I"))
            raw[key] = (start, self.at)
        return found, raw

    def tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        """Read the table of ``count`` tensors; the data follows it, at a multiple of ``alignment`` bytes."""
        from gguf.constants import GGML_QUANT_SIZES

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self.text()
            if name in entries:
                raise ValueError(f"the tensor {shown(name)} is there twice")
            dimensions = self.number("I")
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"the tensor {shown(name)} has {dimensions} dimensions, at most {_MAX_DIMENSIONS}")
            shape = tuple(reversed([self.number("Q") for _ in range(dimensions)]))
            entries[name] = (shape, self.number("I"), self.number("Q"))
        data = -(-self.at // alignment) * alignment
        return {
            name: self.tensor(name, shape, kind, data + offset, sizes)
            for name, (shape, kind, offset) in entries.items()
        }

    def tensor(
        self, name: str, shape: tuple[int, ...], kind: int, start: int, sizes: dict[int, tuple[int, int]]
    ) -> GgufTensor:
        """Check one entry of the table of tensors; ``sizes`` maps a type to numbers and bytes per block."""
        if kind not in sizes:
            raise ValueError(f"the tensor {shown(name)} has the type {kind}, which is not known")
        per_block, block_bytes = sizes[kind]
        if 0 in shape or (shape and shape[-1] % per_block):
            raise ValueError(f"the tensor {shown(name)} has the shape {list(shape)}, which its type cannot hold")
        nbytes = math.prod(shape) // per_block * block_bytes
        if start + nbytes > self.size:
            raise ValueError(
                f"the tensor {shown(name)} ends at byte {start + nbytes:,}, but the file has {self.size:,}: it is cut"
            )
        return GgufTensor(name, shape, kind, self.path, start, nbytes)

    def value(self, kind: int) -> Any:
        """Read one value of the type ``kind``: a number, a string, or a list of one of them."""
        if kind in _FORMATS:
            return self.number(_FORMATS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"a value has the type {kind}, which is not known")
        kind, count = self.number("I"), self.number("Q")
        if kind not in _FORMATS and kind != _STRING:
            raise ValueError(f"a list has elements of the unknown type {kind}")
        self.room("elements of a list", count, 8 if kind == _STRING else struct.calcsize(f"<{_FORMATS[kind]}"))
        self.elements += count
        if self.elements > _MAX_ELEMENTS:
            raise ValueError(f"its lists have more than {_MAX_ELEMENTS:,} elements")
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        form = f"<{count}{_FORMATS[kind]}"
        return list(struct.unpack(form, self.take(struct.calcsize(form))))

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def number(self, form: str) -> Any:
        (found,) = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))
        return found

    def take(self, count: int) -> bytes:
        if count > self.end - self.at:
            where = "the file" if self.end == self.size else f"the first {self.end:,} bytes"
            raise ValueError(f"its header does not end within {where}: it is cut or damaged")
        self.at += count
        return self.content[self.at - count : self.at]

    def room(self, what: str, count: int, least: int) -> None:
        if count > (self.end - self.at) // least:
            raise ValueError(f"it claims {count:,} {what}, for which it is too short")
