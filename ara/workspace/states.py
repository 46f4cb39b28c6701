"""States of the results of a workspace: done, stale, partial or damaged; manifests are checked here."""

from __future__ import annotations

from pathlib import Path

from ara.errors import CorruptedError, WorkspaceError
from ara.names import name_problem
from ara.pipeline import kind_of, may_be_made_from
from ara.workspace.manifest import MANIFEST, Manifest, Parent, read_manifest, remake
from ara.workspace.view import StageView
from ara.workspace.writer import PARTIAL

# Longest chain of parents; ours have a handful.
_MAX_DEPTH = 100


class States:
    """States of the results in ``root``. Every manifest is read once: make a new object after a change."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, StageView] = {}
        # Keys whose parents are being read.
        self._open: list[str] = []

    def view(self, key: str) -> StageView:
        """Return the state of one result without reading its files."""
        if key not in self._known:
            if len(self._open) == _MAX_DEPTH or key in self._open:
                path = self.root / key
                why = f"{key} says that it was made from {'itself' if key in self._open else 'too long a chain'}"
                return StageView(key, path, "damaged", why, remedy=f"delete {path}")
            self._open.append(key)
            self._known[key] = self._look(key)
            self._open.pop()
        return self._known[key]

    def manifest(self, key: str) -> Manifest:
        """Return the manifest of one result.

        Raises:
            WorkspaceError: missing, of a newer format, damaged, or with impossible parents or results.
        """
        folder = self.root / key
        if folder.is_symlink():
            raise CorruptedError(
                f"{folder} is a link; of a workspace, only its own folder and its cache may be links",
                "put the folder itself there, or remove the link",
            )
        manifest = read_manifest(folder)
        if manifest.key != key:
            raise CorruptedError(
                f"{folder / MANIFEST} says that it is {manifest.key!r}: the folder was renamed or copied",
                f"give the folder its name back, or delete {folder}",
            )
        problem = _wrong_parent(manifest) or results_problem(manifest)
        if problem is not None:
            raise CorruptedError(f"{folder / MANIFEST}: {problem}", remake(manifest, True))
        return manifest

    def _look(self, key: str) -> StageView:
        path = self.root / key
        stage, _, name = key.partition("/")
        if name.endswith(PARTIAL):
            return StageView(f"{stage}/{name.removeprefix('.').removesuffix(PARTIAL)}", path, "partial")
        try:
            manifest = self.manifest(key)
        except WorkspaceError as error:
            return StageView(key, path, "damaged", str(error), remedy=error.hint or "")
        for parent in manifest.parents:
            why, remedy = self._why_stale(manifest, parent)
            if why:
                return StageView(key, path, "stale", why, manifest, remedy)
        return StageView(key, path, "done", "", manifest)

    def _why_stale(self, child: Manifest, parent: Parent) -> tuple[str, str]:
        """Return why ``child`` is stale (first cause), and the remedy; two empty strings if it is not."""
        if not (self.root / parent.key).is_dir():
            again = remake(child).partition(": ")[2]
            return f"{parent.key} is gone", f"make {parent.key} again (or this result from another one: {again})"
        view = self.view(parent.key)
        if view.manifest is None:
            return f"{parent.key} is damaged", view.remedy
        if view.manifest.id != parent.id:
            return f"{parent.key} has changed since", remake(child)
        return view.why, view.remedy


def results_problem(manifest: Manifest) -> str | None:
    """Return in one line why the results do not fit their kind, or ``None``."""
    kind = kind_of(manifest.stage)
    return f"there is no stage {manifest.stage!r}" if kind is None else kind.load().problem(manifest)


def _wrong_parent(manifest: Manifest) -> str | None:
    """Return why the parents of a result contradict the order of the stages, or ``None``."""
    for parent in manifest.parents:
        stage, _, name = parent.key.partition("/")
        if not may_be_made_from(manifest.stage, stage) or name_problem(name) is not None:
            return f"it says that it was made from {parent.key!r}, which no result of ara {manifest.stage} is"
    return None
