"""Manifests: the description of a stage folder, and its checks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Mapping
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ara.errors import CorruptedError, WorkspaceError
from ara.files import is_plain_file, open_regular
from ara.jsonfile import dump, first_problem, read
from ara.workspace.tensors import SHA256_PATTERN, Size, TensorRecord, read_header, tensor_records

MANIFEST = "manifest.json"
# Version of the workspace layout and of the manifest; a newer one is refused.
FORMAT_VERSION = 1
# Errors of too many open files, in a process or in the whole system.
NO_MORE_FILES = (errno.EMFILE, errno.ENFILE)
# Settings that change only speed and memory, or that the model's fingerprint covers.
_NOT_DECISIVE = {
    "decompose": frozenset({"model", "revision", "device", "moment_memory", "keep_moments"}),
    "train-masks": frozenset({"save_every", "tensorboard"}),
    "recover": frozenset({"save_every", "tensorboard"}),
    "quantise": frozenset({"tolerance"}),
    "eval": frozenset({"batch_size", "include_path"}),  # the content of include_path counts, not its path
    "compare": frozenset({"eval_batch_size"}),
}
# Decisive settings that are not part of :attr:`Manifest.id`: checksums of the files cover their effect.
_NOT_IN_ID = {"decompose": frozenset({"batch_size"})}


class FileRecord(BaseModel):
    """One file of a stage folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    bytes: Size
    sha256: str = Field(pattern=SHA256_PATTERN)


class Parent(BaseModel):
    """A result from which another one was made."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    key: str
    id: str

    @field_validator("key")
    @classmethod
    def _safe_key(cls, key: str) -> str:
        check_relative(key)
        if key.count("/") != 1:
            raise ValueError(f"{key!r} is not stage/name")
        return key


class ModelEntry(BaseModel):
    """The least that is stored of a model; see :class:`ara.models.identity.ModelIdentity` for all fields."""

    model_config = ConfigDict(extra="allow", frozen=True, defer_build=True)
    __pydantic_extra__: dict[str, str | None]
    fingerprint: str
    requested: str = "MODEL"


class Manifest(BaseModel):
    """The description of a stage folder.

    ``id`` identifies the content: a hash over stage, parents, config, model and file checksums. Time and speed are not
    part of it, so that repeating the same work leaves children valid. ``checksum`` covers the whole manifest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    format_version: int
    stage: str
    name: str
    id: str = ""
    created: str
    command: str
    parents: tuple[Parent, ...] = ()
    config: dict[str, Any]
    model: dict[str, Any]
    seed: int | None = None
    versions: dict[str, str]
    seconds: float = Field(ge=0, allow_inf_nan=False, lt=1e12)
    peak_memory_bytes: Size
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord] = Field(default_factory=dict)
    results: dict[str, Any] = Field(default_factory=dict)
    checksum: str = ""

    @field_validator("model")
    @classmethod
    def _names_a_model(cls, model: dict[str, Any]) -> dict[str, Any]:
        ModelEntry.model_validate(model)
        return model

    @field_validator("files")
    @classmethod
    def _safe_paths(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for name in files:
            check_relative(name)
        return files

    @property
    def key(self) -> str:
        """``stage/name``."""
        return f"{self.stage}/{self.name}"

    def sealed(self) -> Manifest:
        """Return the manifest with ``id`` and ``checksum`` filled in."""
        identified = self.model_copy(update={"id": self._content_id()})
        return identified.model_copy(update={"checksum": identified._checksum()})

    def check(self, folder: Path) -> None:
        """Raise :class:`CorruptedError` unless ``id`` and ``checksum`` fit."""
        if self.checksum != self._checksum() or self.id != self._content_id():
            raise CorruptedError(
                f"{folder / MANIFEST} does not match its own checksum: it was damaged or edited",
                f"delete {folder} and make it again: {_command(self)}",
            )

    def _content_id(self) -> str:
        parts = self.model_dump(mode="json", include={"format_version", "stage", "files"})
        decisive = essence(self.stage, self.config, self.model, self.parents)
        for name in _NOT_IN_ID.get(self.stage, ()):
            decisive["config"].pop(name, None)
        return digest({**parts, **decisive})

    def _checksum(self) -> str:
        return digest(self.model_dump(mode="json", exclude={"checksum"}))


def essence(stage: str, config: Any, model: Mapping[str, Any], parents: Iterable[Parent]) -> dict[str, Any]:
    """Return what determines a stage's work: no settings of speed and memory, and the model by its fingerprint."""
    ignored = _NOT_DECISIVE.get(stage, frozenset())
    return {
        "config": {key: value for key, value in plain(config).items() if key not in ignored},
        "model": model["fingerprint"],
        "parents": plain(list(parents)),
    }


def plain(value: Any) -> Any:
    """Return ``value`` (pydantic models inside allowed) as plain JSON data; NaN and infinity are refused."""
    return json.loads(dump(value, "manifest"))


def digest(value: Any) -> str:
    """Return the sha256 (hex) of ``value`` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()


def file_record(path: Path) -> FileRecord:
    """Measure one file.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    return FileRecord(bytes=path.stat().st_size, sha256=file_sha256(path))


def check_relative(name: str) -> None:
    """Refuse a path that could leave its folder.

    Raises:
        ValueError: ``name`` is absolute, empty, has a ``..``, a backslash or a drive.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise ValueError(f"path {name!r} is not a plain path inside the stage folder")


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json`` of a stage folder; the files it lists are not read.

    Raises:
        WorkspaceError: missing, not readable, or of a newer format.
        CorruptedError: not JSON, with missing or unknown fields, or not matching its checksum.
    """
    path = folder / MANIFEST
    if path.is_symlink():
        raise CorruptedError(f"{path} is a link, expected a file", _discard(folder))
    try:
        raw = read(path)
    except FileNotFoundError:
        raise WorkspaceError(f"{folder} has no {MANIFEST}", _discard(folder)) from None
    except PermissionError as error:
        raise WorkspaceError(f"{path} cannot be read ({error.strerror})", "check that you may read it") from None
    except OSError as error:
        if error.errno in NO_MORE_FILES:  # the file is not to blame
            raise
        raise CorruptedError(f"{path} cannot be read ({error.strerror})", _discard(folder)) from None
    except ValueError as error:
        raise CorruptedError(f"{path} is not readable JSON ({error})", _discard(folder)) from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise WorkspaceError(
            f"{path} has format {version}; this ara reads formats up to {FORMAT_VERSION}", "update ara-svd"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        raise CorruptedError(f"{path}: {first_problem(error)}", _discard(folder)) from None
    manifest.check(folder)
    return manifest


def verify_files(folder: Path, manifest: Manifest, only: Iterable[str] | None = None) -> None:
    """Compare files with the manifest: present, a plain file, of the right size, of the right checksum.

    Args:
        folder: the stage folder.
        manifest: its manifest.
        only: names of the files to check; all when ``None``.

    Raises:
        CorruptedError: names the file and, inside a safetensors file, the tensor.
    """
    for name in manifest.files if only is None else only:
        problem = _file_problem(folder, name, manifest)
        if problem is not None:
            raise CorruptedError(problem, remake(manifest, True))


def _file_problem(folder: Path, name: str, manifest: Manifest) -> str | None:
    record, path = manifest.files[name], folder / name
    if not is_inside(folder, name):
        return f"{path} is missing or not a plain file"
    size = path.stat().st_size
    if size != record.bytes:
        return f"{path} has {size:,} bytes; its manifest says {record.bytes:,}"
    if file_sha256(path) != record.sha256:
        return f"{path} does not match its checksum ({_damaged_part(path, name, manifest)})"
    return _tensors_problem(path, name, manifest) if path.suffix == ".safetensors" else None


def is_inside(folder: Path, name: str) -> bool:
    """Tell whether ``folder / name`` is a regular file, with no link on the path below ``folder``."""
    path = folder / name
    return is_plain_file(path) and Path(os.path.realpath(path)) == Path(os.path.realpath(folder)) / name


def _tensors_problem(path: Path, name: str, manifest: Manifest) -> str | None:
    """Compare the table of tensors with the file, so that no shape in a manifest is larger than the file."""
    from safetensors import SafetensorError, safe_open

    try:
        found = {tensor: (entry.dtype, entry.shape) for tensor, entry in read_header(path)[1].items()}
        # The reader of safetensors, which stages use, is stricter in places.
        with safe_open(path, framework="np"):
            pass
    except (ValueError, SafetensorError) as error:
        return f"{path} is no safetensors file ({error})"
    # A tensor name in two files has one entry in the table; the tensor in the other file is not checked.
    for tensor, entry in manifest.tensors.items():
        if entry.file == name and found.get(tensor) != (entry.dtype, entry.shape):
            return f"{path}: tensor {tensor!r} is not what {MANIFEST} says of it"
    return None


def _damaged_part(path: Path, name: str, manifest: Manifest) -> str:
    """Return which tensors of a damaged safetensors file differ."""
    expected = {tensor: record for tensor, record in manifest.tensors.items() if record.file == name}
    if not expected:
        return "the file was damaged or edited"
    try:
        found = tensor_records(path, name)
    except Exception:  # any reader error means a damaged header
        return "its header is damaged"
    bad = [tensor for tensor, record in expected.items() if found.get(tensor) != record]
    return f"damaged tensors: {', '.join(bad)}" if bad else "its header is damaged"


def remake(manifest: Manifest, force: bool = False) -> str:
    """Return the hint that repeats the command by which a result was made."""
    command = _command(manifest)
    again = " --force" if force and "--force" not in command else ""
    return f"make it again: {command}{again}"


def _command(manifest: Manifest) -> str:
    """Return the command that made a result, or that of its stage if the recorded text may not be safe to paste."""
    command = manifest.command
    try:
        # Quoted as ara writes it: a shell reads nothing but words.
        known = command.startswith("ara ") and command.isprintable() and shlex.join(shlex.split(command)) == command
    except ValueError:
        known = False
    return command if known else f"ara {manifest.stage}"


def _discard(folder: Path) -> str:
    return f"delete {folder} and run ara {folder.parent.name} again"
