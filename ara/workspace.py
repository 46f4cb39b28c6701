"""The workspace: one folder per model, one sub-folder per stage result, each written aside and renamed.

::

    ara-workspace/
      workspace.json            format version and the model that this workspace belongs to
      decompose/two-sided/      manifest.json + factors, one safetensors file per decoder block
      allocate/energy-0.80/     manifest.json + ranks.json
      truncate/energy-0.80/     manifest.json + checkpoint/
      ...
      cache/                    calibration tokens and sensitivity tables, keyed by what they are made from

A stage killed at any moment leaves either nothing or a ``.NAME.partial`` folder, from which a resumable stage goes on.
A stage whose parent has changed since is *stale*: it is shown as such, and nothing builds on it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ara.errors import WorkspaceError, disk_errors, near_matches
from ara.locking import LOCK_FILE, OWNER_FILE, exclusive
from ara.manifest import FORMAT_VERSION, Parent, digest, essence, read_manifest, remake, verify_files
from ara.names import check_name
from ara.progress import SILENT, Reporter
from ara.stage_view import StageView
from ara.stage_writer import CHECKPOINT, COPY, JOURNAL, PARTIAL, StageWriter, left_behind

INDEX = "workspace.json"
DEFAULT_ROOT = "ara-workspace"
_OLD = ".old"


class Workspace:
    """A workspace folder; ``open`` it, ``lock`` it before writing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._created = self._made_folder = False

    @classmethod
    def open(cls, root: Path, create: bool = False) -> Workspace:
        """Open the workspace at ``root``.

        Raises:
            WorkspaceError: there is none and ``create`` is false, or it is not one, or of a newer format.
        """
        workspace, index = cls(root), root / INDEX
        if index.is_file():
            workspace._index()
            return workspace
        if root.exists() and (not root.is_dir() or any(not path.name.startswith(".") for path in root.iterdir())):
            raise WorkspaceError(
                f"{root} exists and is not an ara workspace (no {INDEX})", "choose another folder with -w"
            )
        if not create:
            raise WorkspaceError(
                f"there is no workspace at {root}",
                "start with: ara decompose MODEL (or point -w or ARA_WORKSPACE at the right folder)",
            )
        workspace._created, workspace._made_folder = True, not root.exists()
        try:
            with disk_errors(root):
                root.mkdir(parents=True, exist_ok=True)
                workspace._write_index({"format_version": FORMAT_VERSION, "model": None})
        except BaseException:
            workspace._discard()
            raise
        return workspace

    @property
    def cache(self) -> Path:
        """Folder of things that can be made again."""
        return self.root / "cache"

    @property
    def model(self) -> dict[str, Any] | None:
        """Identity of the model that this workspace belongs to, or ``None`` before the first decomposition."""
        return self._index()["model"]

    def bind(self, model: dict[str, Any]) -> None:
        """Make this the workspace of ``model``; one without any result may change its model.

        Raises:
            WorkspaceError: it already belongs to another model.
        """
        bound = self.model
        if bound is None or (bound["fingerprint"] != model["fingerprint"] and not self.views()):
            self._write_index({"format_version": FORMAT_VERSION, "model": model})
        elif bound["fingerprint"] != model["fingerprint"]:
            raise WorkspaceError(
                f"{self.root} belongs to {_model_text(bound)}, not to {_model_text(model)}",
                "use one workspace per model: choose another folder with -w" + _same_revision(bound),
            )

    @contextmanager
    def lock(self, command: str) -> Iterator[None]:
        """Keep other writers out while the block runs.

        A workspace that was created for the block goes away with it when the block fails before storing anything.

        Raises:
            LockedError: another process holds the lock; says which.
        """
        with exclusive(self.root, command):
            try:
                self._recover()
                yield
            except BaseException:
                if self._created and not self.views():
                    self._discard()
                raise

    def views(self, stage: str | None = None) -> list[StageView]:
        """Return all stage results, oldest first within a stage, partial ones last."""
        keys = [
            f"{folder.name}/{child.name}"
            for folder in sorted(self.root.iterdir())
            if folder.is_dir() and folder.name not in ("cache",) and stage in (None, folder.name)
            for child in sorted(folder.iterdir())
            if child.is_dir() and not child.name.endswith((_OLD, COPY))
        ]
        views = [self.view(key) for key in keys]
        return sorted(views, key=lambda view: (view.stage, view.manifest is None, _created(view)))

    def view(self, key: str) -> StageView:
        """Return the state of one stage result (its files are not read)."""
        path = self.root / key
        stage, _, name = key.partition("/")
        if name.endswith(PARTIAL):
            return StageView(f"{stage}/{name.removeprefix('.').removesuffix(PARTIAL)}", path, "partial")
        try:
            manifest = read_manifest(path)
        except WorkspaceError as error:
            return StageView(key, path, "damaged", str(error))
        for parent in manifest.parents:
            why = self._why_stale(parent)
            if why:
                return StageView(key, path, "stale", why, manifest)
        return StageView(key, path, "done", "", manifest)

    def require(self, stage: str, name: str | None = None, verify: bool = True) -> StageView:
        """Return a finished, current stage result, the latest one unless ``name`` says which.

        Args:
            stage: stage name.
            name: result within the stage.
            verify: also compare every file with its checksum.

        Raises:
            WorkspaceError: missing, stale, partial or damaged; says which command makes it.
        """
        make = f"ara {stage}"
        if name is None:
            views = self.views(stage)
            for view in views:
                if view.state == "damaged":
                    # It may be the latest one, nobody can tell: raises what is wrong with it.
                    read_manifest(view.path)
            finished = [view for view in views if view.manifest is not None]
            if not finished:
                raise WorkspaceError(f"{self.root} has no result of {make} yet", f"run {make} first")
            view = max(finished, key=_created)
        else:
            check_name(name)
            known = [view.name for view in self.views(stage)]
            if not (self.root / stage / name).is_dir():
                raise WorkspaceError(
                    f"{self.root} has no {stage}/{name}: {near_matches(name, known)}there is "
                    f"{', '.join(known) or 'none'}",
                    f"make it with {make}, or name another one",
                )
            view = self.view(f"{stage}/{name}")
        if view.state == "stale":
            assert view.manifest is not None
            raise WorkspaceError(f"{view.key} is stale: {view.why}", remake(view.manifest))
        if view.manifest is None:
            # Reading again raises the precise error.
            read_manifest(view.path)
        assert view.manifest is not None
        if verify:
            verify_files(view.path, view.manifest)
        return view

    def writer(
        self,
        stage: str,
        name: str,
        facts: dict[str, Any],
        *,
        command: str,
        seed: int | None = None,
        resumable: bool = False,
        keep_after_nan: bool = False,
        started: float | None = None,
    ) -> StageWriter:
        """Return a :class:`StageWriter` for ``stage/name``.

        Args:
            stage: stage name.
            name: result within the stage.
            facts: config, model and parents of the manifest.
            command: what the user typed.
            seed: of the stage, if it has one.
            resumable: whether an interrupted run leaves its finished files.
            keep_after_nan: whether a run that ends by NaN leaves them, too.
            started: ``time.monotonic()`` when the stage began; now by default.

        Raises:
            UsageError: a result cannot be called ``name``.
        """
        check_name(name)
        about = {**facts, "seed": seed, "command": command}
        return StageWriter(self.root / stage, stage, name, resumable, about, started, keep_after_nan)

    def finished(self, stage: str, name: str, facts: dict[str, Any], report: Reporter = SILENT) -> StageView | None:
        """Return ``stage/name`` if it is done and was made from these ``facts``, else ``None``.

        Else ``report`` is told what is about to be lost: a result, or unfinished work, of other settings.
        """
        view = self._same(stage, name, facts, report)
        left = left_behind(self.root / stage, name)
        if view is None and left not in (None, digest(essence(stage, **facts))):
            report.warn(f"an unfinished {stage}/{name} was begun with other settings: its work is thrown away")
        return view

    def unfinished(self, stage: str, name: str, facts: dict[str, Any]) -> bool:
        """Tell whether a run of this very work has left something to go on from."""
        return left_behind(self.root / stage, name) == digest(essence(stage, **facts))

    def _same(self, stage: str, name: str, facts: dict[str, Any], report: Reporter) -> StageView | None:
        """Return ``stage/name`` if it is done and was made from ``facts``; say so if others are about to replace it."""
        check_name(name)
        if not (self.root / stage / name).is_dir():
            return None
        view = self.view(f"{stage}/{name}")
        if view.state != "done" or view.manifest is None:
            return None
        made = view.manifest
        old, new = essence(stage, made.config, made.model, made.parents), essence(stage, **facts)
        if old == new:
            return view
        changed = [key for key in new["config"] if new["config"][key] != old["config"].get(key)]
        report.warn(
            f"replacing {view.key}, which was made with other settings ({', '.join(changed) or 'other parents'}); "
            "results made from it become stale (--name keeps both)"
        )
        return None

    def _why_stale(self, parent: Parent) -> str:
        view = self.view(parent.key) if (self.root / parent.key).is_dir() else None
        if view is None or view.manifest is None:
            return f"{parent.key} is gone or damaged"
        if view.manifest.id != parent.id:
            return f"{parent.key} has changed since"
        return f"{parent.key} is stale" if view.state == "stale" else ""

    def _index(self) -> dict[str, Any]:
        path = self.root / INDEX
        try:
            index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version = index["format_version"]
            # Asked first: a newer format may have anything in the place of the model.
            if not isinstance(version, int) or version > FORMAT_VERSION:
                raise WorkspaceError(
                    f"{path} has format {version}; this ara reads formats up to {FORMAT_VERSION}", "update ara-svd"
                )
            if index["model"] is not None and not isinstance(index["model"]["fingerprint"], str):
                raise TypeError("fingerprint is not text")
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"no entry {error}" if isinstance(error, KeyError) else str(error)
            raise WorkspaceError(f"{path} cannot be read ({what})", "choose another workspace with -w") from None
        return index

    def _write_index(self, index: dict[str, Any]) -> None:
        aside = self.root / f".{INDEX}{PARTIAL}"
        with disk_errors(self.root):
            aside.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            os.replace(aside, self.root / INDEX)

    def _discard(self) -> None:
        """Take away what :meth:`open` and a failed first stage have made, and nothing that was here before."""
        for folder in (self.cache, self.root / "decompose"):
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            for name in (INDEX, f".{INDEX}{PARTIAL}", LOCK_FILE, OWNER_FILE):
                (self.root / name).unlink(missing_ok=True)
            if self._made_folder:
                self.root.rmdir()

    def _recover(self) -> None:
        """Finish or undo a replacement that was interrupted between its two renames; remove what kills have left."""
        for old in self.root.glob(f"*/.*{_OLD}"):
            final = old.with_name(old.name.removeprefix(".").removesuffix(_OLD))
            if final.exists():
                shutil.rmtree(old)
            else:
                os.replace(old, final)
        for half in self.root.glob(f"*/.*{COPY}"):
            shutil.rmtree(half)
        for name in (JOURNAL, CHECKPOINT):
            for left in self.root.glob(f"*/[!.]*/{name}"):
                left.unlink()
        for left in self.cache.glob("*/.*"):
            # In a cache that is shared, by a link, others may be at work.
            if left.is_file() and not self.cache.is_symlink() and not left.parent.is_symlink():
                left.unlink()


def _created(view: StageView) -> str:
    return view.manifest.created if view.manifest else ""


def _same_revision(bound: dict[str, Any]) -> str:
    revision = bound.get("revision")
    return f", or, if the hub's branch has moved on, stay at --revision {revision}" if revision else ""


def _model_text(model: dict[str, Any]) -> str:
    return f"{model.get('requested')} ({model['fingerprint'][:12]})"
