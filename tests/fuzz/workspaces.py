"""Spoilt workspaces that still fit their own checksums, so that what they say is believed and read."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.fuzz import mutate

# In the order in which they are made from each other.
STAGES = ("decompose", "train-masks", "allocate", "truncate", "eval", "bench", "compare", "export", "report")


class Seeds:
    """Read access to the valid files (see :mod:`tests.fuzz.seeds`)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._bytes: dict[str, bytes] = {}

    def bytes(self, name: str) -> bytes:
        """Return the content of a file."""
        if name not in self._bytes:
            self._bytes[name] = (self.root / name).read_bytes()
        return self._bytes[name]

    def json(self, name: str) -> Any:
        """Return what a JSON file holds; a copy."""
        return json.loads(self.bytes(name))

    def names(self, folder: str, pattern: str = "*") -> list[str]:
        """Return the files of a folder, and of those in it, that match."""
        found = (
            path.relative_to(self.root).as_posix() for path in (self.root / folder).rglob(pattern) if path.is_file()
        )
        return sorted(found)

    @cached_property
    def results(self) -> tuple[str, ...]:
        """Stage results of the workspace, ``stage/name``, parents first."""
        found = [
            path.parent.relative_to(self.root / "ws").as_posix()
            for path in (self.root / "ws").glob("*/*/manifest.json")
        ]
        return tuple(sorted(found, key=lambda key: STAGES.index(key.partition("/")[0])))


def sealed(seeds: Seeds, spoilt: dict[str, Any], files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files of a workspace with spoilt content whose checksums are right again, children included.

    Args:
        seeds: the valid workspace.
        spoilt: ``stage/name`` → its manifest as it is to be, :class:`mutate.Raw` values allowed.
        files: further spoilt files, path below the seeds → content.
    """
    ids: dict[str, str] = {}
    written: dict[str, bytes] = dict(files)
    for key in seeds.results:
        folder = f"ws/{key}/"
        manifest = spoilt.get(key) or seeds.json(f"{folder}manifest.json")
        touched = key in spoilt
        if isinstance(manifest, dict):
            touched |= _new_records(manifest, folder, files)
            touched |= _new_parents(manifest, ids)
        if not touched:
            continue
        text = mutate.dumps(manifest)
        with contextlib.suppress(Exception):  # what does not read at all is written as it is
            text, ids[key] = _seal(text)
        written[f"{folder}manifest.json"] = text.encode()
    return written


def _seal(text: str) -> tuple[str, str]:
    from ara.workspace.manifest import Manifest

    manifest = Manifest.model_validate(json.loads(text)).sealed()
    return manifest.model_dump_json(indent=1) + "\n", manifest.id


def _new_records(manifest: dict[str, Any], folder: str, files: dict[str, bytes]) -> bool:
    table = manifest.get("files")
    mine = [name for name in files if name.startswith(folder) and not name.endswith("manifest.json")]
    for name in mine:
        if isinstance(table, dict) and name.removeprefix(folder) in table:
            record = {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
            table[name.removeprefix(folder)] = record
    return bool(mine)


def _new_parents(manifest: dict[str, Any], ids: dict[str, str]) -> bool:
    parents = manifest.get("parents")
    touched = False
    for parent in parents if isinstance(parents, Iterable) else ():
        if isinstance(parent, dict) and isinstance(parent.get("key"), str) and parent["key"] in ids:
            parent["id"] = ids[parent["key"]]
            touched = True
    return touched
