"""The workspace: one folder per model, one sub-folder per stage result, each written aside and then renamed.

::

    ara-workspace/
      workspace.json            format version and the model that this workspace belongs to
      decompose/two-sided/      manifest.json + factors, one safetensors file per decoder block
      allocate/energy-0.80/     manifest.json + ranks.json
      truncate/energy-0.80/     manifest.json + checkpoint/
      ...
      cache/                    calibration tokens, losses of ranks and of rounding, times, keyed by their inputs

A stage killed at any moment leaves either nothing or a ``.NAME.partial`` folder, from which a resumable stage resumes.
A result whose parent has changed since is *stale*: no stage uses it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ara.errors import WorkspaceError, disk_errors, near_matches
from ara.files import remove
from ara.names import check_name, check_which
from ara.pipeline import makers, producers, stages
from ara.progress import SILENT, Reporter
from ara.workspace.index import INDEX, read_index, write_index
from ara.workspace.locking import LOCK_FILE, OWNER_FILE, exclusive
from ara.workspace.manifest import digest, essence, verify_files
from ara.workspace.states import States
from ara.workspace.view import StageView, ancestor_key
from ara.workspace.writer import CHECKPOINT, COPY, JOURNAL, PARTIAL, StageWriter, unfinished_work

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
        workspace = cls(root)
        workspace._refuse_links()
        if (root / INDEX).is_file():
            read_index(root)
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
                write_index(root, None)
        except BaseException:
            workspace._discard()
            raise
        return workspace

    @property
    def cache(self) -> Path:
        """Folder of intermediate data that can be computed again."""
        return self.root / "cache"

    @property
    def model(self) -> dict[str, Any] | None:
        """Identity of the model of this workspace, or ``None`` before the first decomposition."""
        return read_index(self.root)

    def bind(self, model: dict[str, Any]) -> None:
        """Make this the workspace of ``model``; a workspace without results may change its model.

        Raises:
            WorkspaceError: it already belongs to another model.
        """
        bound = self.model
        if bound is None or (bound["fingerprint"] != model["fingerprint"] and not self.views()):
            write_index(self.root, model)
        elif bound["fingerprint"] != model["fingerprint"]:
            hint, revision = "use one workspace per model: choose another folder with -w", bound.get("revision")
            if revision:
                hint += f", or, if the hub's branch has changed, stay at --revision {revision}"
            raise WorkspaceError(f"{self.root} belongs to {_model_text(bound)}, not to {_model_text(model)}", hint)

    @contextmanager
    def lock(self, command: str) -> Iterator[None]:
        """Exclude other writers while the block runs.

        A new workspace is removed if the block fails before it stores a result.

        Raises:
            LockedError: another process holds the lock.
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
        """Return all results, or those of one kind, sorted by stage and age, partial ones last."""
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

    def require(
        self,
        kind: str,
        which: str | None = None,
        verify: bool = True,
        not_by: Collection[str] = (),
        skip: Callable[[StageView], bool] | None = None,
    ) -> StageView:
        """Return a finished, current result of a kind.

        Args:
            kind: of the result, such as ``checkpoint``.
            which: name of the result, or ``stage/name`` if several stages make this kind; the latest by default.
            verify: also compare every file with its checksum.
            not_by: stages whose results are not taken by default: a stage that consumes what it produces would
                otherwise make another result each time.
            skip: tells which results with a manifest are not taken by default.

        Raises:
            UsageError: ``which`` is not a valid name.
            WorkspaceError: missing, ambiguous, stale, partial or damaged; the hint names the command that makes it.
        """
        view = self._latest_readable(kind, not_by, skip) if which is None else self._named(kind, which)
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

    def _latest_readable(
        self, kind: str, not_by: Collection[str] = (), skip: Callable[[StageView], bool] | None = None
    ) -> StageView:
        views = [view for view in self.views(kind) if view.stage not in not_by]
        for view in views:
            if view.state == "damaged":
                # Its age is unknown, so that it may be the latest one. Reading it again raises the precise error.
                States(self.root).manifest(view.key)
        whole = [view for view in views if view.manifest is not None and (skip is None or not skip(view))]
        if not whole:
            make = " or ".join(f"ara {stage}" for stage in makers(kind))
            raise WorkspaceError(f"{self.root} has no result of {make} yet", f"run {make} first")
        return max(whole, key=_created)

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
            command: command line of the user.
            seed: of the stage.
            resumable: whether an interrupted run keeps its finished files.
            keep_after_nan: whether a run that ends with NaN keeps them, too.
            started: ``time.monotonic()`` at the start of the stage; now by default.

        Raises:
            UsageError: ``name`` is not a valid name.
        """
        check_name(name)
        about = {**facts, "seed": seed, "command": command}
        return StageWriter(self.root / stage, stage, name, resumable, about, started, keep_after_nan)

    def finished(self, stage: str, name: str, facts: dict[str, Any], report: Reporter = SILENT) -> StageView | None:
        """Return ``stage/name`` if it is done and was made from these ``facts``, else ``None``.

        Otherwise ``report`` gets a warning if a result or unfinished work with other settings will be lost.
        """
        check_name(name)
        there = (self.root / stage / name).is_dir()
        view = self._same(f"{stage}/{name}", facts, report) if there else None
        left = unfinished_work(self.root / stage, name)
        if view is None and left not in (None, digest(essence(stage, **facts))):
            report.warn(f"an unfinished {stage}/{name} was begun with other settings: its work is thrown away")
        return view

    def unfinished(self, stage: str, name: str, facts: dict[str, Any]) -> bool:
        """Tell whether an unfinished run of the same work can be resumed."""
        return unfinished_work(self.root / stage, name) == digest(essence(stage, **facts))

    def _same(self, key: str, facts: dict[str, Any], report: Reporter) -> StageView | None:
        view = self.view(key)
        if view.state != "done" or view.manifest is None:
            return None
        made = view.manifest
        old, new = essence(made.stage, made.config, made.model, made.parents), essence(made.stage, **facts)
        if old == new:
            return view
        changed = [key for key in new["config"] if new["config"][key] != old["config"].get(key)]
        report.warn(
            f"replacing {view.key}, which was made with other settings ({', '.join(changed) or 'other parents'}); "
            "results made from it become stale (--name keeps both)"
        )
        return None

    def _refuse_links(self) -> None:
        """Refuse links in place of our files and folders: ara would write elsewhere.

        The workspace folder and its cache may be links; files of the cache have unique names.
        """
        places = (INDEX, LOCK_FILE, *_stage_folders(), "cache/tokens", "cache/tables")
        for place in (self.root / name for name in places):
            if place.is_symlink():
                raise WorkspaceError(
                    f"{place} is a link; of a workspace, only its own folder and its cache may be links",
                    "move the whole workspace to another disk and link to it, or remove the link",
                )

    def _discard(self) -> None:
        """Remove the files made by :meth:`open` and a failed first stage, and no others."""
        for folder in (self.cache, self.root / "decompose"):
            remove(folder)
        with suppress(OSError):
            for name in (INDEX, f".{INDEX}{PARTIAL}", LOCK_FILE, OWNER_FILE):
                (self.root / name).unlink(missing_ok=True)
            if self._made_folder:
                self.root.rmdir()

    def _recover(self) -> None:
        """Finish or undo a replacement that was interrupted between its two renames; remove files of killed runs."""
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
            # Other processes may be writing into a shared cache, which is a link.
            if left.is_file() and not self.cache.is_symlink() and not left.parent.is_symlink():
                left.unlink()


def _stage_folders() -> list[str]:
    return [stage.name for stage in stages()]


def _created(view: StageView) -> str:
    return view.manifest.created if view.manifest else ""


def _model_text(model: dict[str, Any]) -> str:
    return f"{model.get('requested')} ({model['fingerprint'][:12]})"
