"""Describes the contents of a working folder for ``same_results.py``, and compares two descriptions."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

# Keys of JSON whose values are times, memory or speeds. A manifest's checksum covers its times.
MEASURED = {
    "checksum",
    "created",
    "error",  # of commands that are refused: a message, shown to whoever runs the script
    "peak_memory_bytes",
    "ratio",
    "seconds",
    "speed",
    "table_seconds",
    "tokens_per_second",
}
# Stages whose files contain times, so that their ids differ between two runs of the same code.
_TIMED_STAGES = ("bench", "compare", "eval", "report")
# A stored table of losses contains its seconds.
_ALLOWED = ["*/cache/tables/*/metadata/digest", "*/cache/tables/*/metadata/seconds"]
# The end of a verdict, and figures in the tables of a model card: some are speeds.
_SPEED, _FIGURE = re.compile(r"(generation|reading) speed .*"), re.compile(r"\d[\d.,]*")
# Only the existence of these files is compared: pages and pictures show times, and JSON files have their data.
_SHOWN_ONLY = {".html", ".png", ".svg", ".csv"}
# Caches of the library datasets, with names that depend on the working folder.
_OTHERS = "cache/tasks/"
_PLACE = "{folder}"


def document(folder: Path, commands: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the description of a case: what its commands printed, and every file in its working folder.

    Args:
        folder: the working folder; its path is taken out of all texts, so that it may be another one next time.
        commands: words → ``stdout``, ``exit`` and more.
    """
    for row in commands.values():
        row["document"] = _parsed(row.pop("stdout"))
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    names = {path: path.relative_to(folder).as_posix() for path in paths}
    files = {name: _describe(path) for path, name in names.items() if not name.startswith(_OTHERS)}
    text = json.dumps({"commands": commands, "files": files})
    for number, name in _timed_ids(commands, files).items():
        text = text.replace(number, name)
    found: dict[str, Any] = json.loads(text.replace(str(folder), _PLACE))
    return found


def _timed_ids(commands: dict[str, dict[str, Any]], files: dict[str, Any]) -> dict[str, str]:
    """Return id → a fixed name, for every result that contains times, including replaced ones."""
    manifests = [content for path, content in files.items() if path.endswith("manifest.json")]
    printed = [row["document"] for row in commands.values()]
    return {
        about["id"]: f"{{id of a result of {about['stage']}}}"
        for about in [*printed, *manifests]
        if isinstance(about, dict) and about.get("stage") in _TIMED_STAGES and about.get("id")
    }


def _describe(path: Path) -> Any:
    if path.suffix in _SHOWN_ONLY or path.name.startswith("."):
        return "present"
    if path.suffix == ".safetensors":
        return tensors(path)
    content = path.read_bytes()
    if path.suffix == ".md":
        return {"lines": [_without_speed(line) for line in content.decode().splitlines()]}
    if path.suffix != ".json":
        return _sha(content)
    found = json.loads(content)
    if path.name == "manifest.json" and found["stage"] in _TIMED_STAGES:
        # The comparable parts of these files are compared separately.
        found["files"] = sorted(found["files"])
    return found


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _without_speed(text: str) -> str:
    return _FIGURE.sub("#", text) if text.startswith("|") else _SPEED.sub("speed", text)


def tensors(path: Path) -> dict[str, Any]:
    """Return name → dtype, shape and sha256 of the bytes of every tensor of a safetensors file, and its metadata."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        found: dict[str, Any] = {"metadata": header.pop("__metadata__", None), "order": list(header)}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            file.seek(8 + length + start)
            found[name] = f"{entry['dtype']} {entry['shape']} {_sha(file.read(stop - start))}"
    return found


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def differences(before: Any, after: Any, allowed: list[str]) -> Iterator[str]:
    """Yield one line per difference of two documents, without measured fields and without the ``allowed`` ones.

    Args:
        before: nested JSON.
        after: nested JSON.
        allowed: shell patterns of a key, or of the whole path with slashes between its keys.
    """
    yield from _differences(before, after, [*_ALLOWED, *allowed], ())


def _differences(before: Any, after: Any, allowed: list[str], path: tuple[str, ...]) -> Iterator[str]:
    if path and _is_left_out(path, allowed):
        return
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*before, *after]):
            where = (*path, str(key))
            if key in before and key in after:
                yield from _differences(before[key], after[key], allowed, where)
            elif not _is_left_out(where, allowed):
                yield f"{'/'.join(where)}: only {'before' if key in before else 'after'}"
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from _differences(*pair, allowed, (*path, str(index)))
    elif path[-1] == "verdict" and _without_speed(str(before)) == _without_speed(str(after)):
        return
    elif before != after or type(before) is not type(after):
        yield f"{'/'.join(path)}: {_short(before)} → {_short(after)}"


def _is_left_out(path: tuple[str, ...], allowed: list[str]) -> bool:
    patterns = (fnmatchcase(path[-1], pattern) or fnmatchcase("/".join(path), pattern) for pattern in allowed)
    return path[-1] in MEASURED or any(patterns)


def _short(value: Any, most: int = 120) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[:most]}…"
