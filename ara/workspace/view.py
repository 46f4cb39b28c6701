"""One stage result of a workspace, as it stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ara.errors import CorruptedError
from ara.workspace.manifest import MANIFEST, Manifest, Parent, remake


@dataclass(frozen=True)
class StageView:
    """One stage result as ``ara status`` sees it.

    Attributes:
        key: ``stage/name``.
        state: done, stale, partial or damaged.
        why: what makes it stale or damaged, the first cause of it; ``""`` otherwise.
        manifest: ``None`` when partial or damaged.
        remedy: what to do about a stale or damaged one.
    """

    key: str
    path: Path
    state: str
    why: str = ""
    manifest: Manifest | None = None
    remedy: str = ""

    @property
    def stage(self) -> str:
        """The stage's name, such as ``decompose``."""
        return self.key.partition("/")[0]

    @property
    def name(self) -> str:
        """The name of the result within the stage."""
        return self.key.partition("/")[2]


def parent_of(view: StageView) -> Parent:
    """Return the reference that a child keeps of ``view``."""
    assert view.manifest is not None
    return Parent(key=view.key, id=view.manifest.id)


def parent_name(view: StageView, stage: str) -> str:
    """Return the name of the result of ``stage`` that ``view`` was made from.

    Raises:
        CorruptedError: its manifest names none.
    """
    assert view.manifest is not None
    for parent in view.manifest.parents:
        found, _, name = parent.key.partition("/")
        if found == stage:
            return name
    raise CorruptedError(
        f"{view.path / MANIFEST} names no result of ara {stage} that it was made from", remake(view.manifest, True)
    )
