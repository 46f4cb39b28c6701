"""A GGUF model in one file, or in several that gguf-split of llama.cpp names ``NAME-00001-of-00003.gguf`` and so on."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ara.errors import ModelError
from ara.files import open_regular
from ara.models.gguf_header import AGAIN, MAGIC, GgufHeader, GgufTensor, read_header
from ara.workspace.manifest import file_sha256

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_CHUNK_BYTES = 1 << 24
_SHOWN = 3


@dataclass(frozen=True)
class GgufContents:
    """What all parts of a model hold together.

    Attributes:
        metadata: of the first part, where gguf-split keeps it.
        tensors: name → where it lies, of all parts.
        headers: of the parts, in order.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    headers: tuple[GgufHeader, ...]


def part_paths(path: Path) -> tuple[Path, ...]:
    """Return the files that belong to ``path``, in order: itself alone, or all parts if it is named as one.

    Raises:
        ModelError: a part is missing, or the name cannot be.
    """
    named = _PART.fullmatch(path.name)
    if named is None:
        return (path,)
    count = int(named["count"])
    if not 1 <= int(named["number"]) <= count:
        raise ModelError(f"{path} names itself part {int(named['number'])} of {count}", AGAIN)
    names = (f"{named['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1))
    paths = tuple(path.with_name(name) for name in names)
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
        raise ModelError(
            f"{path.parent} lacks {len(missing)} of the {count} parts of {named['stem']}.gguf: {shown}",
            "download all parts into one folder",
        )
    return paths


def first_parts(paths: Iterable[Path]) -> list[Path]:
    """Return one file per model: single files, and of each set of parts the first that is there."""
    sets: dict[str, Path] = {}
    for path in sorted(paths):
        named = _PART.fullmatch(path.name)
        sets.setdefault(path.name if named is None else f"{named['stem']}-of-{named['count']}", path)
    return list(sets.values())


def parts_sha256(paths: tuple[Path, ...]) -> str:
    """Return the sha256 of a single file, or one over the checksums of all parts.

    Raises:
        OSError: a file cannot be read.
    """
    sums = [file_sha256(path) for path in paths]
    return sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest()


def read_contents(paths: tuple[Path, ...]) -> GgufContents:
    """Read the headers of all parts, and see that they belong together.

    Args:
        paths: from :func:`part_paths`.

    Raises:
        ModelError: a part is damaged, or is not the part that its name says.
    """
    headers = tuple(read_header(path) for path in paths)
    tensors: dict[str, GgufTensor] = {}
    for number, header in enumerate(headers):
        found = (header.metadata.get(_NUMBER, 0), header.metadata.get(_COUNT, 1) or 1)
        if found != (number, len(headers)):
            raise ModelError(
                f"{header.path} says that it is part {_counted(found[0])} of {found[1]}, expected part {number + 1} of "
                f"{len(headers)}",
                "keep the names that the parts were published with",
            )
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise ModelError(
                f"{header.path} holds the tensor {min(twice)}, which another part holds too",
                "the parts do not belong together: download all of them again",
            )
        tensors |= header.tensors
    expected = headers[0].metadata.get(_TENSORS, len(tensors))
    if expected != len(tensors):
        raise ModelError(
            f"the {len(headers)} parts of {paths[0]} hold {len(tensors)} tensors, expected {expected}",
            "the parts do not belong together: download all of them again",
        )
    return GgufContents(headers[0].metadata, tensors, headers)


def join(contents: GgufContents, target: Path) -> None:
    """Write all parts as one file, for readers that know single files only; holds a few MiB at a time.

    Raises:
        OSError: a part cannot be read, or ``target`` cannot be written.
    """
    first = contents.headers[0]
    kept = [key for key in first.raw if not key.startswith("split.")]
    with target.open("xb") as sink:
        sink.write(MAGIC + struct.pack("<IQQ", 3, len(contents.tensors), len(kept)))
        with open_regular(first.path) as source:
            for key in kept:
                start, end = first.raw[key]
                _copy(source, start, end - start, sink)
        offset = 0
        for tensor in contents.tensors.values():
            name = tensor.name.encode("utf-8")
            sink.write(struct.pack("<Q", len(name)) + name + struct.pack("<I", len(tensor.shape)))
            sink.write(struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)))
            sink.write(struct.pack("<IQ", tensor.kind, offset))
            offset += -(-tensor.nbytes // first.alignment) * first.alignment
        for header in contents.headers:
            with open_regular(header.path) as source:
                for tensor in header.tensors.values():
                    sink.write(bytes(-sink.tell() % first.alignment))
                    _copy(source, tensor.start, tensor.nbytes, sink)
        sink.write(bytes(-sink.tell() % first.alignment))


def _copy(source: BinaryIO, start: int, count: int, sink: BinaryIO) -> None:
    source.seek(start)
    while count:
        chunk = source.read(min(count, _CHUNK_BYTES))
        if not chunk:
            raise OSError(f"{source.name} became shorter while it was read")
        sink.write(chunk)
        count -= len(chunk)


def _counted(number: Any) -> Any:
    return number + 1 if isinstance(number, int) else number
