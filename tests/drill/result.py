"""What counts as the same result: every file byte for byte, but for times, memory and the date."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

from ara.errors import AraError
from ara.workspace.index import INDEX
from ara.workspace.manifest import verify_files
from ara.workspace.store import Workspace

WORKSPACE = "ws"
# What is measured anew by every run, under these names in any JSON of ours.
_MEASURED = {"created", "checksum", "seconds", "table_seconds", "peak_memory_bytes", "tokens_per_second", "ratio"}
# Stages whose files hold such figures, so that checksums and content hash differ from run to run.
_MEASURING = ("eval", "bench", "compare", "report")


def snapshot(root: Path, raw: bool = False) -> dict[str, str]:
    """Return relative path → sha256 of what is the same in every run, or of all bytes, for all files below ``root``."""
    locks = (f"{WORKSPACE}/.lock", f"{WORKSPACE}/.lock-owner.json") if raw else (f"{WORKSPACE}/.lock",)
    return {
        name: hashlib.sha256(path.read_bytes() if raw else _lasting(path, name)).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and (name := path.relative_to(root).as_posix()) not in locks
    }


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Say file by file how two snapshots differ."""
    told = [f"{name} is missing" for name in expected if name not in found]
    told += [f"{name} is left over" for name in found if name not in expected]
    return told + [f"{name} differs" for name in found if name in expected and found[name] != expected[name]]


def faults_of(root: Path) -> list[str]:
    """Return what is wrong with the finished results below ``root``: every one must be whole at any moment."""
    if not (root / WORKSPACE / INDEX).exists():
        return []
    told = []
    for view in Workspace.open(root / WORKSPACE).views():
        if view.state == "partial":
            continue
        try:
            assert view.manifest is not None, view.why
            verify_files(view.path, view.manifest)
        except (AraError, AssertionError) as error:
            told.append(f"{view.key}: {error}")
    return told


def finished(root: Path) -> set[str]:
    """Return the keys of all finished results."""
    return {view.key for view in Workspace.open(root / WORKSPACE).views() if view.manifest is not None}


def _lasting(path: Path, name: str) -> bytes:
    """Return the part of a file that is the same in every run."""
    content = path.read_bytes()
    inside = name.startswith(f"{WORKSPACE}/")
    if name.startswith(f"{WORKSPACE}/cache/tables/"):
        return _tensors(content)
    if inside and path.name == "log.csv":
        rows = [{**row, "seconds": ""} for row in csv.DictReader(io.StringIO(content.decode()))]
        return json.dumps(rows).encode()
    if inside and path.suffix == ".json":
        try:
            document = _without_figures(json.loads(content))
        except ValueError:  # damaged by the drill, and to be left as it is
            return content
        if path.name == "manifest.json":
            _loosen(document)
        return json.dumps(document).encode()
    return content


def _tensors(content: bytes) -> bytes:
    """Return a safetensors file without its metadata, where the time stands that the table took."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return json.dumps(header, sort_keys=True).encode() + content[8 + length :]


def _without_figures(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_figures(item) for key, item in value.items() if key not in _MEASURED}
    return [_without_figures(item) for item in value] if isinstance(value, list) else value


def _loosen(manifest: dict[str, Any]) -> None:
    """Take out the checksums of files that hold figures; these files are compared themselves."""
    for parent in manifest["parents"]:
        if parent["key"].partition("/")[0] in _MEASURING:
            del parent["id"]
    if manifest["stage"] in _MEASURING:
        del manifest["id"]
        manifest["files"] = {
            name: None if name.endswith((".json", ".html")) else record for name, record in manifest["files"].items()
        }
