"""Writes one stage folder: aside, checksummed, renamed in one step; resumable if the stage wants it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ara.environment import now, peak_memory_bytes, versions
from ara.errors import NumericalError, disk_errors, disk_full_error
from ara.manifest import FORMAT_VERSION, MANIFEST, FileRecord, Manifest, digest, essence, file_record, plain
from ara.tensors import TensorRecord, save_tensors, tensor_digests, tensor_records

if TYPE_CHECKING:
    import torch

PARTIAL = ".partial"
COPY = ".copy"
JOURNAL = ".journal.json"
CHECKPOINT = ".checkpoint.safetensors"


class StageWriter:
    """Context manager around a stage folder in the making.

    Leaving the block normally writes the manifest and renames the folder into place. Leaving it by an exception
    removes the folder, unless the stage is resumable, at least one file is finished, and the same work might succeed
    when it is taken up again (NaN would come back, unless ``keep_after_nan``). A full disk is told as such.

    Attributes:
        folder: where to write; becomes ``<stage>/<name>``.
        results: goes into the manifest.
        to_go_on: the result is a copy; finished files and checkpoint stay, for a later run of this work to go on from.
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
        self._fingerprint = digest(essence(stage, facts["config"], facts["model"], facts["parents"]))
        self._earlier_seconds = 0.0
        self._start = time.monotonic() if started is None else started

    def __enter__(self) -> StageWriter:
        if not (self._resumable and self._resume()):
            shutil.rmtree(self.folder, ignore_errors=True)
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
            except BaseException:
                self._abandon()
                raise
            return
        self._abandon(repeats=issubclass(kind, NumericalError) and not self._keep_after_nan)
        full = disk_full_error(error, self.folder) if isinstance(error, Exception) else None
        if full is not None:
            raise full from error

    @property
    def finished(self) -> list[str]:
        """Names of the files that are finished, by this run or by an earlier, interrupted one."""
        return list(self._files)

    def tensors(self, name: str, tensors: Mapping[str, torch.Tensor], results: Mapping[str, Any] | None = None) -> None:
        """Write one safetensors file and note it as finished; ``results`` are merged into :attr:`results`."""
        path = self.folder / name
        aside = path.with_name(f".{path.name}{PARTIAL}")
        save_tensors(aside, tensors)
        os.replace(aside, path)
        self.note(name)
        self.results.update(results or {})
        self._write_journal()

    def text(self, name: str, text: str) -> None:
        """Write one text file and note it as finished, together with :attr:`results` as they are."""
        _write_synced(self.folder / name, text)
        self.note(name)
        self._write_journal()

    def save_checkpoint(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Keep the state of unfinished work: replaces the one before in one step, and goes when the stage is done.

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
        """Return what an interrupted run has left by :meth:`save_checkpoint`, or ``None``; a damaged one is ignored."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / CHECKPOINT
        try:
            with safe_open(path, "pt") as file:
                found = file.metadata()
                # Copied: the file that they are views of is about to be replaced.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            if digest([found["body"], tensor_digests(tensors)]) != found["digest"]:
                return None
            body = json.loads(found["body"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        self._earlier_seconds = float(body["seconds"])
        return tensors, body["values"]

    def note(self, name: str) -> None:
        """Take the finished file ``name`` (relative to :attr:`folder`) into the manifest."""
        path = self.folder / name
        self._files[name] = file_record(path)
        if path.suffix == ".safetensors":
            self._tensors.update(tensor_records(path, name))

    def loose(self, name: str) -> None:
        """Leave the file ``name`` out of the manifest: written again, it makes the result no other one."""
        self._loose.add(name)

    def _resume(self) -> bool:
        try:
            journal = json.loads((self.folder / JOURNAL).read_text(encoding="utf-8"))
            # Its results become those of the manifest, so that no bit of it may be believed unchecked.
            if journal.pop("digest") != digest(journal) or journal["fingerprint"] != self._fingerprint:
                return False
            files = {name: FileRecord(**record) for name, record in journal["files"].items()}
            if any(file_record(self.folder / name) != record for name, record in files.items()):
                return False
            self._tensors = {name: TensorRecord(**record) for name, record in journal["tensors"].items()}
            self._files, self.results = files, journal["results"]
            self._earlier_seconds = float(journal["seconds"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # No journal, or one that cannot be trusted: start over, which is always right.
            return False
        for path in self.folder.iterdir():
            if path.name not in {*self._files, JOURNAL, CHECKPOINT}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return True

    def _write_journal(self) -> None:
        if not self._resumable:
            return
        journal = plain(
            {
                "fingerprint": self._fingerprint,
                "seconds": self._seconds(),
                "files": self._files,
                "tensors": self._tensors,
                "results": self.results,
            }
        )
        aside = self.folder / f"{JOURNAL}{PARTIAL}"
        with disk_errors(self.folder):
            _write_synced(aside, json.dumps({**journal, "digest": digest(journal)}))
            os.replace(aside, self.folder / JOURNAL)

    def _commit(self) -> None:
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
            files=dict(sorted(self._files.items())),
            tensors=dict(sorted(self._tensors.items())),
            results=plain(self.results),
            **{**self._facts, "config": plain(self._facts["config"])},
        ).sealed()
        made = self._copy() if self.to_go_on else self.folder
        _write_synced(made / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        _sync_folder(made)
        old = self.final.with_name(f".{self.final.name}.old")
        if self.final.exists():
            os.replace(self.final, old)
        os.replace(made, self.final)
        _sync_folder(self.final.parent)
        # Last, so that a stage stopped until here goes on from it.
        (self.final / JOURNAL).unlink(missing_ok=True)
        (self.final / CHECKPOINT).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)

    def _copy(self) -> Path:
        """Return a folder to become the result while :attr:`folder` stays as it is."""
        self._write_journal()
        copy = self.final.with_name(f".{self.final.name}{COPY}")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder, copy, ignore=shutil.ignore_patterns(".*"))
        return copy

    def _abandon(self, repeats: bool = False) -> None:
        started = self._files or (self.folder / CHECKPOINT).exists()
        if repeats or not (self._resumable and started):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _seconds(self) -> float:
        return self._earlier_seconds + time.monotonic() - self._start


def left_behind(parent: Path, name: str) -> str | None:
    """Return the fingerprint of the work that an unfinished run of ``parent/name`` was doing, or ``None``.

    A journal that cannot be read counts as none.
    """
    try:
        journal = json.loads((parent / f".{name}{PARTIAL}" / JOURNAL).read_text(encoding="utf-8"))
        return str(journal["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
