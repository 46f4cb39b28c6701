"""Safetensors files with a checksum per tensor."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from ara.errors import disk_errors

if TYPE_CHECKING:
    import torch


SHA256_PATTERN = r"^[0-9a-f]{64}$"


class TensorRecord(BaseModel):
    """One tensor of a stage folder; ``sha256`` is over its raw little-endian bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    file: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str = Field(pattern=SHA256_PATTERN)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write ``tensors`` to a safetensors file that is on the disk when this returns.

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
    """Give a name beside ``path`` to write to; what is there at the end takes its place in one step.

    So neither a killed process nor a second one at the same work leaves half a file.

    Args:
        path: of the file.
        holder: a folder whose lock this process holds. What a killed process that held it has left beside ``path`` is
            taken away.
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
    """Return the sha256 (hex) over the bytes of each tensor, as :func:`tensor_records` finds it in a file."""
    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


def tensor_records(path: Path, name: str) -> dict[str, TensorRecord]:
    """Return a record per tensor of the safetensors file ``path``, called ``name`` in its folder.

    Reads the file's own header (a little-endian length, then JSON), and hashes each tensor's byte range.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:  # damaged: do not try to read so much
            raise ValueError("the header is longer than the file")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        records = {}
        for tensor, entry in header.items():
            start, stop = entry["data_offsets"]
            file.seek(8 + length + start)
            records[tensor] = TensorRecord(
                file=name, dtype=entry["dtype"], shape=tuple(entry["shape"]), sha256=_hash_range(file, stop - start)
            )
    return records


def _hash_range(file: object, remaining: int) -> str:
    sha = hashlib.sha256()
    while remaining > 0:
        block = file.read(min(remaining, 1 << 22))  # type: ignore[attr-defined]
        if not block:
            raise ValueError("the file ends before the tensor does")
        sha.update(block)
        remaining -= len(block)
    return sha.hexdigest()
