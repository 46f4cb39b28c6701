"""Ways to damage files, and to say what a folder holds."""

from __future__ import annotations

import hashlib
from pathlib import Path


def flip(path: Path, position: int) -> None:
    """Invert one bit of the byte at ``position`` (from the end when negative)."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def listing(folder: Path) -> set[str]:
    """Return the relative paths of all files below ``folder``."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path, pattern: str = "*") -> dict[str, str]:
    """Return relative path → sha256 of all files below ``folder`` that match."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
    }


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return relative path → (inode, time of the last change in ns) of everything below ``folder``."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }
