"""One stage result of a workspace, as it stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ara.manifest import Manifest, Parent


@dataclass(frozen=True)
class StageView:
    """One stage result as ``ara status`` sees it.

    Attributes:
        key: ``stage/name``.
        state: done, stale, partial or damaged.
        why: what makes it stale or damaged; ``""`` otherwise.
        manifest: ``None`` when partial or damaged.
    """

    key: str
    path: Path
    state: str
    why: str = ""
    manifest: Manifest | None = None

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
