"""Safetensors files with a checksum per tensor."""

from __future__ import annotations

import hashlib
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

from pydantic import BaseModel, ConfigDict, Field

from ara.errors import disk_errors
from ara.files import MAX_JSON_BYTES, open_regular
from ara.jsonfile import parse

if TYPE_CHECKING:
    import torch


SHA256_PATTERN = r"^[0-9a-f]{64}$"
# Bytes per value, by dtype in safetensors' notation.
_WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_WIDTHS |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}

Size = Annotated[int, Field(ge=0, lt=2**63)]


class TensorRecord(BaseModel):
    """One tensor of a stage folder; ``sha256`` is over its raw little-endian bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    file: str
    dtype: str
    shape: tuple[Size, ...]
    sha256: str = Field(pattern=SHA256_PATTERN)


class TensorEntry(BaseModel):
    """Header entry of one tensor of a safetensors file; offsets count from the start of the data."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    dtype: str
    shape: tuple[Size, ...]
    data_offsets: tuple[Size, Size]


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write ``tensors`` to a safetensors file and flush it to the disk.

    Raises:
        DiskFullError: no room; the partial file is removed.
    """
    from safetensors.torch import save_file

    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    try:
        with disk_errors(path, needed):
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextmanager
def written_aside(path: Path, holder: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; at the end of the block it replaces ``path`` in one step.

    Neither a killed process nor a second process with the same work leaves half a file.

    Args:
        path: of the file.
        holder: a folder whose lock this process holds; a temporary file of an earlier, killed holder is removed.
    """
    mark = uuid.uuid4().hex if holder is None else hashlib.sha256(os.fsencode(holder.resolve())).hexdigest()[:32]
    aside = path.with_name(f".{path.name}.{mark}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def tensor_digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the sha256 (hex) over the bytes of each tensor, equal to that of :func:`tensor_records`."""
    import torch

    # As bytes: numpy has no bfloat16.
    raw = {name: tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for name, tensor in tensors.items()}
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in raw.items()}


def tensor_records(path: Path, name: str) -> dict[str, TensorRecord]:
    """Return a record per tensor of the safetensors file ``path``, called ``name`` in its folder.

    Raises:
        OSError: it cannot be read.
        ValueError: see :func:`read_header`; or the file ends before a tensor does.
    """
    start, entries = read_header(path)
    records = {}
    with open_regular(path) as file:
        for tensor, entry in entries.items():
            first, last = entry.data_offsets
            file.seek(start + first)
            sha256 = _hash_range(file, last - first)
            records[tensor] = TensorRecord(file=name, dtype=entry.dtype, shape=entry.shape, sha256=sha256)
    return records


def read_header(path: Path) -> tuple[int, dict[str, TensorEntry]]:
    """Return the offset of the data of a safetensors file, and the header entry of each tensor.

    The header is a little-endian length of 8 bytes, then JSON. Tensors fill the rest without gap or overlap, so that
    their sizes add up to the size of the file.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: the header is cut, too long or malformed, or tensors lie outside the file or overlap.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_JSON_BYTES):  # damaged: do not try to read so much
            raise ValueError("the header is longer than the file")
        found = parse(file.read(length).decode("utf-8"))
    if not isinstance(found, dict):
        raise ValueError("the header is no JSON object")
    found.pop("__metadata__", None)
    entries = {name: TensorEntry.model_validate(entry) for name, entry in found.items()}
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        first, last = entry.data_offsets
        width = _WIDTHS.get(entry.dtype)
        if first != position or last < first or (width and last - first != width * math.prod(entry.shape)):
            raise ValueError(f"the place of tensor {name[:100]!r} does not fit its shape or the tensor before")
        position = last
    if position > size - 8 - length:
        raise ValueError("the file ends before the tensor does")
    return 8 + length, entries


def _hash_range(file: BinaryIO, remaining: int) -> str:
    sha = hashlib.sha256()
    while remaining > 0:
        block = file.read(min(remaining, 1 << 22))
        if not block:
            raise ValueError("the file ends before the tensor does")
        sha.update(block)
        remaining -= len(block)
    return sha.hexdigest()
