"""GGUF models in several files, which gguf-split of llama.cpp names ``NAME-00001-of-00003.gguf`` and so on."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ara.errors import ModelError
from ara.files import open_regular
from ara.models.gguf_header import AGAIN, MAGIC, GgufHeader, GgufTensor, read_header
from ara.models.shown import first_names

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class GgufContents:
    """The content of all parts of a model.

    Attributes:
        metadata: of the first part, where gguf-split writes it.
        tensors: name → its place, of all parts.
        headers: of the parts, in order.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    headers: tuple[GgufHeader, ...]


def part_paths(path: Path) -> tuple[Path, ...]:
    """Return the files of the model that ``path`` belongs to, in order: the file itself, or all parts.

    Raises:
        ModelError: a part is missing, or the name has an impossible number.
    """
    named = _PART.fullmatch(path.name)
    if named is None:
        return (path,)
    count = int(named["count"])
    if not 1 <= int(named["number"]) <= count:
        raise ModelError(f"{path} has the name of part {int(named['number'])} of {count}", AGAIN)
    names = (f"{named['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1))
    paths = tuple(path.with_name(name) for name in names)
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise ModelError(
            f"{path.parent} lacks {len(missing)} of the {count} parts of {named['stem']}.gguf: {first_names(missing)}",
            "download all parts into one folder",
        )
    return paths


def first_parts(paths: Iterable[Path]) -> list[Path]:
    """Return one file per model: single files, and the first existing part of each set of parts."""
    sets: dict[str, Path] = {}
    for path in sorted(paths):
        named = _PART.fullmatch(path.name)
        sets.setdefault(path.name if named is None else f"{named['stem']}-of-{named['count']}", path)
    return list(sets.values())


def read_contents(paths: tuple[Path, ...]) -> GgufContents:
    """Read the headers of all parts and check that they belong together.

    Args:
        paths: from :func:`part_paths`.

    Raises:
        ModelError: a part is damaged, or is not the part of its name.
    """
    headers = tuple(read_header(path) for path in paths)
    tensors: dict[str, GgufTensor] = {}
    for number, header in enumerate(headers):
        found = (header.metadata.get(_NUMBER, 0), header.metadata.get(_COUNT, 1) or 1)
        if found != (number, len(headers)):
            raise ModelError(
                f"{header.path} is part {_counted(found[0])} of {found[1]} according to its header, expected part "
                f"{number + 1} of {len(headers)}",
                "keep the published names of the parts",
            )
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise ModelError(
                f"{header.path} and another part both hold the tensor {min(twice)}",
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
    """Write all parts as one file, for readers of single files; needs a few MiB of memory.

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
