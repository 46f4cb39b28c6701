"""The folders that a case runs in: made once per worker, looked at before and after every case, mended in between.

::

    in/  ws/  half/      copies of the seeds (see :mod:`tests.fuzz.seeds`), which a case spoils
    cwd/                 the current folder of every command, empty
    out/                 where a command is told to write
    cache/  tmp/  home/  what ARA_CACHE_DIR, TMPDIR and HOME name
"""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path

EMPTY = ("cwd", "out", "cache", "tmp", "home")
# What tells that a file is still the same one, or the target of a link.
_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class Link:
    """A symbolic link in the place of a file."""

    target: str


@dataclass(frozen=True)
class Pipe:
    """A named pipe in the place of a file."""


@dataclass(frozen=True)
class Folder:
    """A folder in the place of a file."""


@dataclass(frozen=True)
class Gone:
    """A file that is missing."""


Content = bytes | Link | Pipe | Folder | Gone


@dataclass
class Difference:
    """Paths below the sandbox, relative to it."""

    created: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


class Sandbox:
    """One worker's folders.

    Args:
        root: to be made.
        seeds: the folder with ``in``, ``ws`` and ``half``, which stays as it is.
    """

    def __init__(self, root: Path, seeds: Path) -> None:
        self.root, self._seeds = root, seeds
        root.mkdir(parents=True)
        for folder in seeds.iterdir():
            if folder.name not in EMPTY:
                shutil.copytree(folder, root / folder.name, symlinks=True)
        for name in EMPTY:
            (root / name).mkdir()
        self._pristine = self.look()

    def look(self) -> dict[str, _Stamp]:
        """Return what is there: path → kind, size, time of the last change, inode; times of folders are left out."""
        found: dict[str, _Stamp] = {}
        folders = [""]
        while folders:
            inside = folders.pop()
            with os.scandir(self.root / inside) as entries:
                for entry in entries:
                    name = f"{inside}/{entry.name}" if inside else entry.name
                    about = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(about.st_mode):
                        found[name] = (about.st_mode, 0, 0, 0)
                        folders.append(name)
                    else:
                        found[name] = (about.st_mode, about.st_size, about.st_mtime_ns, about.st_ino)
        return found

    def reset(self) -> None:
        """Bring back the seeds."""
        now = self.look()
        if now == self._pristine:
            return
        for name in sorted(now, reverse=True):  # what is inside a folder before the folder
            if name not in self._pristine or _kind(now[name]) != _kind(self._pristine[name]):
                _remove(self.root / name)
        for name, stamp in sorted(self._pristine.items()):
            path = self.root / name
            if stat.S_ISDIR(stamp[0]):
                path.mkdir(exist_ok=True)
                path.chmod(stat.S_IMODE(stamp[0]))
            elif now.get(name) != stamp or not path.exists():
                shutil.copy2(self._seeds / name, path)
        self._pristine = self.look()

    def put(self, files: dict[str, Content]) -> None:
        """Write the files of a case: path below the sandbox → content."""
        for name, content in files.items():
            path = self.root / name
            if path.is_symlink() or path.exists():
                _remove(path)
            if isinstance(content, Gone):
                continue
            # A case may spoil a file in the place of which it has put another file, or a link, as a folder.
            if any(
                parent.is_symlink() or (parent.exists() and not parent.is_dir()) for parent in _above(path, self.root)
            ):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif isinstance(content, Link):
                path.symlink_to(content.target)
            elif isinstance(content, Pipe):
                os.mkfifo(path)
            else:
                path.mkdir()


def _above(path: Path, root: Path) -> list[Path]:
    """Return the folders between ``root`` and ``path``."""
    return [parent for parent in path.parents if parent != root and parent.is_relative_to(root)]


def difference(before: dict[str, _Stamp], after: dict[str, _Stamp]) -> Difference:
    """Compare what :meth:`Sandbox.look` has seen."""
    return Difference(
        sorted(after.keys() - before.keys()),
        sorted(name for name in before.keys() & after.keys() if before[name] != after[name]),
        sorted(before.keys() - after.keys()),
    )


def _kind(stamp: _Stamp) -> int:
    return stat.S_IFMT(stamp[0])


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
