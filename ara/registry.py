"""Registries: names of methods and where their code is. Nothing is imported before use, so ``--help`` stays fast."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ara.errors import UsageError, near_matches


def import_object(target: str) -> Any:
    """Import and return ``"package.module:name"``."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Entry:
    """One line of a registry.

    Attributes:
        name: what users type.
        title: one line that says what it does.
        target: ``"package.module:Class"``, imported on first use only.
        paper: source of the method; ``""`` if there is none.
    """

    name: str
    title: str
    target: str
    paper: str = ""

    def load(self) -> Any:
        """Import and return the target."""
        return import_object(self.target)


class Registry:
    """An ordered table of :class:`Entry`; the error for an unknown name lists near matches and all names."""

    def __init__(self, kind: str, entries: list[Entry]) -> None:
        self.kind = kind
        self._entries = {entry.name: entry for entry in entries}

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """Return all names in their order."""
        return list(self._entries)

    def entry(self, name: str) -> Entry:
        """Return the entry called ``name``.

        Raises:
            UsageError: there is none.
        """
        if name not in self._entries:
            raise UsageError(
                f"unknown {self.kind} {name!r}: {near_matches(name, self._entries)}known are {', '.join(self._entries)}"
            )
        return self._entries[name]

    def load(self, name: str) -> Any:
        """Import and return the class registered under ``name``."""
        return self.entry(name).load()
