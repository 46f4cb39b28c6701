"""The state of one result of a workspace, and its ancestors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ara.errors import CorruptedError
from ara.pipeline import kind_of, producers
from ara.workspace.manifest import MANIFEST, Manifest, Parent, remake


@dataclass(frozen=True)
class StageView:
    """One stage result with its state.

    Attributes:
        key: ``stage/name``.
        state: done, stale, partial or damaged.
        why: first cause for being stale or damaged; ``""`` otherwise.
        manifest: ``None`` when partial or damaged.
        remedy: hint for a stale or damaged result.
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
    def kind(self) -> str:
        """The kind of the result, such as ``factors``."""
        kind = kind_of(self.stage)
        assert kind is not None, self.stage
        return kind.name

    @property
    def name(self) -> str:
        """The name of the result within the stage."""
        return self.key.partition("/")[2]


def parent_of(view: StageView) -> Parent:
    """Return the reference to ``view`` that a child stores."""
    assert view.manifest is not None
    return Parent(key=view.key, id=view.manifest.id)


def ancestors(view: StageView, look: Callable[[str], StageView]) -> Iterator[str]:
    """Yield ``stage/name`` of the results that ``view`` was made from, the nearest first.

    Args:
        view: the result to start from.
        look: returns the result of a key.
    """
    generation, seen = [view], {view.key}
    while generation:
        parents = [parent.key for one in generation if one.manifest is not None for parent in one.manifest.parents]
        fresh = [key for key in dict.fromkeys(parents) if key not in seen]
        yield from fresh
        seen.update(fresh)
        generation = [look(key) for key in fresh]


def ancestor_key(view: StageView, kind: str, look: Callable[[str], StageView]) -> str:
    """Return ``stage/name`` of the nearest ancestor of ``view`` of a kind.

    Args:
        view: the result to start from.
        kind: of the ancestor.
        look: returns the result of a key.

    Raises:
        CorruptedError: no parent leads to one.
    """
    assert view.manifest is not None
    makers = producers(kind)
    for key in ancestors(view, look):
        if key.partition("/")[0] in makers:
            return key
    made_by = " or ".join(f"ara {stage}" for stage in makers)
    raise CorruptedError(
        f"{view.path / MANIFEST} names no result of {made_by} that it was made from", remake(view.manifest, True)
    )
