"""Writing of one stage folder: aside, checksummed, renamed in one step, optionally resumable."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ara.environment import now, peak_memory_bytes, versions
from ara.errors import CorruptedError, NumericalError, disk_errors, disk_full_error
from ara.files import is_plain_file, remove, write_text
from ara.jsonfile import parse, read
from ara.pipeline import TypedResults, kind_of
from ara.workspace.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    FileRecord,
    Manifest,
    digest,
    essence,
    file_record,
    is_inside,
    plain,
)
from ara.workspace.tensors import TensorRecord, save_tensors, tensor_digests, tensor_records

if TYPE_CHECKING:
    import torch

PARTIAL = ".partial"
COPY = ".copy"
JOURNAL = ".journal.json"
CHECKPOINT = ".checkpoint.safetensors"
# Files of unfinished work start with it.
WORK = ".work-"

_Seconds = Annotated[float, Field(ge=0, lt=1e12)]


class _Journal(BaseModel):
    """Finished files and results of an unfinished stage."""

    model_config = ConfigDict(defer_build=True)
    fingerprint: str
    seconds: _Seconds
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]
    results: dict[str, Any]
    work: dict[str, dict[str, Any]] = Field(default_factory=dict)


class _CheckpointBody(BaseModel):
    model_config = ConfigDict(defer_build=True)
    values: dict[str, Any]
    seconds: _Seconds


class StageWriter:
    """Context manager around an unfinished stage folder.

    At the end of the block the manifest is written and the folder renamed into place. An exception removes the folder,
    unless the stage is resumable and has a finished file or a checkpoint. After NaN the folder is removed as well
    unless ``keep_after_nan``, because the same work would give NaN again. A full disk raises DiskFullError.

    Attributes:
        folder: where to write; becomes ``<stage>/<name>``.
        results: of the manifest.
        to_go_on: make a copy the result, and keep finished files and checkpoint for a later run of the same work.
    """

    def __init__(
        self,
        parent: Path,
        stage: str,
        name: str,
        resumable: bool,
        facts: dict[str, Any],
        started: float | None = None,
        keep_after_nan: bool = False,
    ) -> None:
        self.final = parent / name
        self.folder = parent / f".{name}{PARTIAL}"
        self.results: dict[str, Any] = {}
        self.to_go_on = False
        self._stage, self._name, self._resumable, self._facts = stage, name, resumable, facts
        self._keep_after_nan = keep_after_nan
        self._files: dict[str, FileRecord] = {}
        self._loose: set[str] = set()
        self._tensors: dict[str, TensorRecord] = {}
        self._work: dict[str, dict[str, Any]] = {}
        self._fingerprint = digest(essence(stage, facts["config"], facts["model"], facts["parents"]))
        self._earlier_seconds, self._resumed = 0.0, False
        self._start = time.monotonic() if started is None else started

    def __enter__(self) -> StageWriter:
        if not (self._resumable and self._resume()):
            remove(self.folder)
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                with disk_errors(self.final):
                    self._commit()
            except BaseException as failure:
                self._abandon(type(failure))
                raise
            return
        self._abandon(kind)
        full = disk_full_error(error, self.folder) if isinstance(error, Exception) else None
        if full is not None:
            raise full from error

    @property
    def finished(self) -> list[str]:
        """Names of the files finished by this run or by an earlier, interrupted one."""
        return list(self._files)

    def tensors(self, name: str, tensors: Mapping[str, torch.Tensor], results: Mapping[str, Any] | None = None) -> None:
        """Write one safetensors file, record it as finished, and merge ``results`` into :attr:`results`."""
        path = self.folder / name
        aside = path.with_name(f".{path.name}{PARTIAL}")
        save_tensors(aside, tensors)
        os.replace(aside, path)
        self.note(name)
        self.results.update(results or {})
        self._write_journal()

    def finish_work(self, name: str, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Store a finished part of the work that is no part of the result; it is removed when the stage is done.

        Args:
            name: of the part.
            tensors: at least one.
            values: JSON data, returned by :meth:`work`.
        """
        path = self.folder / f"{WORK}{name}.safetensors"
        aside = path.with_name(f"{path.name}{PARTIAL}")
        save_tensors(aside, tensors)
        os.replace(aside, path)
        # Not in the table of tensors: those of the result may have the same names.
        self._files[path.name], self._work[name] = file_record(path), plain(dict(values))
        self._write_journal()

    def work(self, name: str) -> tuple[Path, dict[str, Any]] | None:
        """Return file and JSON data of a finished part of the work, or ``None``."""
        return (self.folder / f"{WORK}{name}.safetensors", self._work[name]) if name in self._work else None

    def all_work(self) -> dict[str, dict[str, Any]]:
        """Return the JSON data of all finished parts, by name."""
        return dict(self._work)

    def drop_work(self, prefix: str) -> None:
        """Remove the finished parts whose names start with ``prefix``."""
        for name in [name for name in self._work if name.startswith(prefix)]:
            file = f"{WORK}{name}.safetensors"
            del self._work[name], self._files[file]
            self._write_journal()
            remove(self.folder / file)

    def text(self, name: str, text: str) -> None:
        """Write one text file and record it as finished, together with the current :attr:`results`."""
        write_text(self.folder / name, text, sync=True)
        self.note(name)
        self._write_journal()

    def save_checkpoint(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Store the state of unfinished work in place of the previous one; it is removed when the stage is done.

        Args:
            tensors: at least one.
            values: JSON data.
        """
        path = self.folder / CHECKPOINT
        aside = path.with_name(f"{path.name}{PARTIAL}")
        body = json.dumps({"values": values, "seconds": self._seconds()})
        with disk_errors(self.folder):
            save_tensors(aside, tensors, {"body": body, "digest": digest([body, tensor_digests(tensors)])})
            os.replace(aside, path)
            if not (self.folder / JOURNAL).exists():
                self._write_journal()

    def checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return the last :meth:`save_checkpoint` of an interrupted run; ``None`` if missing or damaged."""
        found = _read_checkpoint(self.folder / CHECKPOINT)
        if found is None:
            return None
        tensors, body = found
        self._earlier_seconds = body.seconds
        return tensors, body.values

    def note(self, name: str) -> None:
        """Add the finished file ``name`` (relative to :attr:`folder`) to the manifest."""
        path = self.folder / name
        self._files[name] = file_record(path)
        if path.suffix == ".safetensors":
            self._tensors.update(tensor_records(path, name))

    def loose(self, name: str) -> None:
        """Leave the file ``name`` out of the manifest: rewriting it leaves the content hash unchanged."""
        self._loose.add(name)

    @property
    def _kind(self) -> TypedResults:
        kind = kind_of(self._stage)
        assert kind is not None, self._stage
        return kind.load()

    def _resume(self) -> bool:
        # Without a trustworthy journal the stage starts over, which is always correct.
        journal = None if self.folder.is_symlink() else _read_journal(self.folder)
        if journal is None or journal.fingerprint != self._fingerprint:
            return False
        if self._kind.unfinished_problem(journal.results) is not None:
            return False
        tensors: dict[str, TensorRecord] = {}
        try:
            for name, record in journal.files.items():
                path = self.folder / name
                if not is_inside(self.folder, name) or file_record(path) != record:
                    return False
                # Read from the file: with a table that does not fit, the result would count as damaged.
                if path.suffix == ".safetensors" and not name.startswith(WORK):
                    tensors |= tensor_records(path, name)
        except (OSError, ValueError):
            return False
        self._files, self.results, self._tensors, self._work = journal.files, journal.results, tensors, journal.work
        self._resumed = True
        self._earlier_seconds = journal.seconds
        kept = {JOURNAL, CHECKPOINT, *(name.split("/")[0] for name in self._files)}
        for path in self.folder.iterdir():
            if path.name not in kept:
                remove(path)
        return True

    def _write_journal(self) -> None:
        if not self._resumable:
            return
        about = {"fingerprint": self._fingerprint, "seconds": self._seconds(), "files": self._files}
        journal = plain({**about, "tensors": self._tensors, "results": self.results, "work": self._work})
        aside = self.folder / f"{JOURNAL}{PARTIAL}"
        with disk_errors(self.folder):
            write_text(aside, json.dumps({**journal, "digest": digest(journal)}), sync=True)
            os.replace(aside, self.folder / JOURNAL)

    def _commit(self) -> None:
        if self.to_go_on:
            # Before the other files are recorded: a later run makes them again.
            self._write_journal()
        # After Ctrl+C between a write and its rename, train-masks still makes its best state the result.
        for aside in self.folder.glob(f".*{PARTIAL}"):
            remove(aside)
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and name not in (*self._files, *self._loose, JOURNAL, CHECKPOINT):
                self.note(name)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            stage=self._stage,
            name=self._name,
            created=now(),
            versions=versions(),
            seconds=round(self._seconds(), 3),
            peak_memory_bytes=peak_memory_bytes(),
            files={name: record for name, record in sorted(self._files.items()) if not name.startswith(WORK)},
            tensors=dict(sorted(self._tensors.items())),
            results=plain(self.results),
            **{**self._facts, "config": plain(self._facts["config"])},
        ).sealed()
        if self._resumed and (problem := self._kind.problem(manifest)) is not None:
            remove(self.folder)
            raise CorruptedError(
                f"the files of an interrupted run in {self.folder} make no valid result ({problem}): they are removed",
                "run the same command again: it starts over",
            )
        made = self._copy() if self.to_go_on else self.folder
        write_text(made / MANIFEST, manifest.model_dump_json(indent=1) + "\n", sync=True)
        _sync_folder(made)
        old = self.final.with_name(f".{self.final.name}.old")
        if os.path.lexists(self.final):
            os.replace(self.final, old)
        os.replace(made, self.final)
        _sync_folder(self.final.parent)
        # Last: a stage that is stopped before this point can resume from them.
        (self.final / JOURNAL).unlink(missing_ok=True)
        (self.final / CHECKPOINT).unlink(missing_ok=True)
        for path in self.final.glob(f"{WORK}*"):
            remove(path)
        remove(old)

    def _copy(self) -> Path:
        """Return a copy that becomes the result while :attr:`folder` stays."""
        copy = self.final.with_name(f".{self.final.name}{COPY}")
        remove(copy)
        shutil.copytree(self.folder, copy, ignore=shutil.ignore_patterns(".*"))
        return copy

    def _abandon(self, error: type[BaseException]) -> None:
        repeats = issubclass(error, NumericalError) and not self._keep_after_nan
        started = self._files or (self.folder / CHECKPOINT).exists()
        if repeats or not (self._resumable and started):
            remove(self.folder)

    def _seconds(self) -> float:
        return self._earlier_seconds + time.monotonic() - self._start


def saved_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return what :meth:`StageWriter.checkpoint` has returned in the process that writes.

    Args:
        folder: of the unfinished stage.

    Raises:
        CorruptedError: it cannot be read here.
    """
    found = _read_checkpoint(folder / CHECKPOINT)
    if found is None:
        raise CorruptedError(
            f"{folder / CHECKPOINT} can be read in the process that writes, but not in another one",
            "use a workspace on a file system that all machines share",
        )
    return found[0], found[1].values


def _read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], _CheckpointBody] | None:
    """Return a saved state; ``None`` if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    if not is_plain_file(path):
        return None
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata()
            # Copied: they are views of a file that will be replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if digest([found["body"], tensor_digests(tensors)]) != found["digest"]:
            return None
        return tensors, _CheckpointBody.model_validate(parse(found["body"], finite=False))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def unfinished_work(parent: Path, name: str) -> str | None:
    """Return the fingerprint of the work of an unfinished run of ``parent/name``; ``None`` without a valid journal."""
    journal = _read_journal(parent / f".{name}{PARTIAL}")
    return None if journal is None else journal.fingerprint


def _read_journal(folder: Path) -> _Journal | None:
    """Return the journal of an unfinished result; ``None`` if it is missing or invalid."""
    path = folder / JOURNAL
    try:
        if not is_plain_file(path):
            return None
        found = read(path, finite=False)
        # Its results become those of the manifest, so that all of it is checked.
        if not isinstance(found, dict) or found.pop("digest", None) != digest(found):
            return None
        journal = _Journal.model_validate(found)
        return journal if math.isfinite(journal.seconds) and all(map(_is_own, journal.files)) else None
    except (OSError, ValueError):
        return None


def _is_own(name: str) -> bool:
    """Tell whether a journal may name this file: it lies in the folder, or in a folder of it."""
    path = Path(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
