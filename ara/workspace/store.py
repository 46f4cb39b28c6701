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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ara.errors import WorkspaceError, disk_errors, near_matches
from ara.files import remove, write_text
from ara.jsonfile import first_problem, read
from ara.names import check_name, check_which
from ara.pipeline import producers, stages
from ara.progress import SILENT, Reporter
from ara.workspace.locking import LOCK_FILE, OWNER_FILE, exclusive
from ara.workspace.manifest import FORMAT_VERSION, ModelEntry, digest, essence, verify_files
from ara.workspace.states import States
from ara.workspace.view import StageView, ancestor_key
from ara.workspace.writer import CHECKPOINT, COPY, JOURNAL, PARTIAL, StageWriter, left_behind

INDEX = "workspace.json"
DEFAULT_ROOT = "ara-workspace"
_OLD = ".old"


class _Index(BaseModel):
    """``workspace.json``."""

    model_config = ConfigDict(defer_build=True)
    format_version: int = Field(le=FORMAT_VERSION)
    model: ModelEntry | None


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
        workspace._refuse_links()
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

    def views(self, kind: str | None = None) -> list[StageView]:
        """Return all results, or those of one kind: by stage, the oldest first, partial ones last."""
        names = _stage_folders() if kind is None else producers(kind)
        folders = [self.root / name for name in sorted(names)]
        keys = [
            f"{folder.name}/{child.name}"
            for folder in folders
            if folder.is_dir()
            for child in sorted(folder.iterdir())
            if child.is_dir() and not child.name.endswith((_OLD, COPY))
        ]
        states = States(self.root)
        views = [states.view(key) for key in keys]
        return sorted(views, key=lambda view: (view.stage, view.manifest is None, _created(view)))

    def view(self, key: str) -> StageView:
        """Return the state of one stage result (its files are not read)."""
        return States(self.root).view(key)

    def latest(self, kind: str) -> StageView | None:
        """Return the result that :meth:`require` takes when no name is given; it may be stale."""
        found = [view for view in self.views(kind) if view.manifest is not None]
        return max(found, key=_created) if found else None

    def require(self, kind: str, which: str | None = None, verify: bool = True) -> StageView:
        """Return a finished, current result of a kind, the latest one unless ``which`` says which.

        Args:
            kind: of the result, such as ``checkpoint``.
            which: name of the result, or ``stage/name`` where several stages make this kind.
            verify: also compare every file with its checksum.

        Raises:
            UsageError: ``which`` cannot be the name of a result.
            WorkspaceError: missing, ambiguous, stale, partial or damaged; says which command makes it.
        """
        view = self._latest_readable(kind) if which is None else self._named(kind, which)
        if view.state == "stale":
            raise WorkspaceError(f"{view.key} is stale: {view.why}", view.remedy)
        if view.manifest is None:
            # Reading again raises the precise error.
            States(self.root).manifest(view.key)
        assert view.manifest is not None
        if verify:
            verify_files(view.path, view.manifest)
        return view

    def ancestor(self, view: StageView, kind: str, verify: bool = True) -> StageView:
        """Return the nearest result of a kind that ``view`` was made from, itself or through its parents.

        Raises:
            CorruptedError: no parent leads to one.
            WorkspaceError: as :meth:`require`.
        """
        return self.require(kind, ancestor_key(view, kind, self.view), verify)

    def _latest_readable(self, kind: str) -> StageView:
        for view in self.views(kind):
            if view.state == "damaged":
                # It may be the latest one, nobody can tell: raises what is wrong with it.
                States(self.root).manifest(view.key)
        latest = self.latest(kind)
        if latest is None:
            make = " or ".join(f"ara {stage}" for stage in producers(kind))
            raise WorkspaceError(f"{self.root} has no result of {make} yet", f"run {make} first")
        return latest

    def _named(self, kind: str, which: str) -> StageView:
        check_which(which)
        names = producers(kind)
        stage, _, name = which.rpartition("/")
        if stage and stage not in names:
            raise WorkspaceError(
                f"{which} is no {kind}", f"results of this kind are made by {' or '.join(f'ara {s}' for s in names)}"
            )
        keys = [which] if stage else [f"{maker}/{name}" for maker in names]
        there = [key for key in keys if (self.root / key).is_dir()]
        if len(there) > 1:
            raise WorkspaceError(
                f"{self.root} has {' and '.join(there)}", f"say which one: --from {' or --from '.join(there)}"
            )
        if not there:
            first = stage or names[0]
            known = [view.name for view in self.views(kind) if view.stage == first or not stage]
            raise WorkspaceError(
                f"{self.root} has no {first}/{name}: {near_matches(name, known)}there is {', '.join(known) or 'none'}",
                f"make it with ara {first}, or name another one",
            )
        return self.view(there[0])

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

    def _index(self) -> dict[str, Any]:
        path, hint = self.root / INDEX, "choose another workspace with -w"
        try:
            index = read(path)
            version = index.get("format_version") if isinstance(index, dict) else None
            # Asked first: a newer format may have anything in the place of the model.
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise WorkspaceError(
                    f"{path} has format {version}; this ara reads formats up to {FORMAT_VERSION}", "update ara-svd"
                )
            return _Index.model_validate(index).model_dump()
        except ValidationError as error:
            raise WorkspaceError(f"{path} cannot be read ({first_problem(error)})", hint) from None
        except OSError as error:
            raise WorkspaceError(f"{path} cannot be read ({error.strerror})", hint) from None
        except ValueError as error:
            raise WorkspaceError(f"{path} cannot be read ({error})", hint) from None

    def _write_index(self, index: dict[str, Any]) -> None:
        aside = self.root / f".{INDEX}{PARTIAL}"
        with disk_errors(self.root):
            remove(aside)
            write_text(aside, json.dumps(index, indent=2) + "\n")
            os.replace(aside, self.root / INDEX)

    def _refuse_links(self) -> None:
        """Refuse links in the places of our files and folders: what is written there would end up elsewhere.

        The workspace's own folder may be a link, and so may its cache, whose files have names that nobody else uses.
        """
        places = (INDEX, LOCK_FILE, *_stage_folders(), "cache/tokens", "cache/tables")
        for place in (self.root / name for name in places):
            if place.is_symlink():
                raise WorkspaceError(
                    f"{place} is a link; of a workspace, only its own folder and its cache may be links",
                    "move the whole workspace to another disk and link to it, or remove the link",
                )

    def _discard(self) -> None:
        """Take away what :meth:`open` and a failed first stage have made, and nothing that was here before."""
        for folder in (self.cache, self.root / "decompose"):
            remove(folder)
        with suppress(OSError):
            for name in (INDEX, f".{INDEX}{PARTIAL}", LOCK_FILE, OWNER_FILE):
                (self.root / name).unlink(missing_ok=True)
            if self._made_folder:
                self.root.rmdir()

    def _recover(self) -> None:
        """Finish or undo a replacement that was interrupted between its two renames; remove what kills have left."""
        for folder in (self.root / stage for stage in _stage_folders()):
            for old in folder.glob(f".*{_OLD}"):
                final = old.with_name(old.name.removeprefix(".").removesuffix(_OLD))
                if os.path.lexists(final):
                    remove(old)
                else:
                    os.replace(old, final)
            for half in folder.glob(f".*{COPY}"):
                remove(half)
            for result in folder.glob("[!.]*"):
                if result.is_dir() and not result.is_symlink():
                    remove(result / JOURNAL)
                    remove(result / CHECKPOINT)
        for left in self.cache.glob("*/.*"):
            # In a cache that is shared, by a link, others may be at work.
            if left.is_file() and not self.cache.is_symlink() and not left.parent.is_symlink():
                left.unlink()


def _stage_folders() -> list[str]:
    return [stage.name for stage in stages()]


def _created(view: StageView) -> str:
    return view.manifest.created if view.manifest else ""


def _same_revision(bound: dict[str, Any]) -> str:
    revision = bound.get("revision")
    return f", or, if the hub's branch has moved on, stay at --revision {revision}" if revision else ""


def _model_text(model: dict[str, Any]) -> str:
    return f"{model.get('requested')} ({model['fingerprint'][:12]})"
