"""A disk of its own for every drilling process: a small tmpfs at one and the same path, that can be made full.

It is mounted in a mount namespace of the process (as root, or in a user namespace), so nobody else sees it and nothing
stays behind. Where the system forbids that, a folder stands in its place: one process at a time, and never full.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_NAMESPACE, _NEW_USER = 0x00020000, 0x10000000
_PARENT_DEATH_SIGNAL = 1
_REMOUNT, _PRIVATE = 32, (1 << 18) | 16384
# Bytes; the largest scenario needs about a tenth.
SIZE = 256 * 2**20
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Disk:
    """The folder in which a drilling process works.

    Attributes:
        root: where it is; the same for all of them.
        mounted: whether it is a file system of this process.
    """

    def __init__(self, root: Path, mounted: bool) -> None:
        self.root, self.mounted = root, mounted

    @classmethod
    def mount(cls, root: Path) -> Disk:
        """Give this process a file system at ``root``, or the plain folder where that is not allowed."""
        root.mkdir(exist_ok=True)
        return cls(root, _own_namespace() and _mount(b"none", root, b"tmpfs", 0, f"size={SIZE}"))

    def fill(self, source: Path) -> None:
        """Put a copy of all that lies in ``source`` here, in the place of what was here."""
        self.limit(None)
        self.clear()
        shutil.copytree(source, self.root, dirs_exist_ok=True, symlinks=True)

    def clear(self) -> None:
        """Remove all that is here."""
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def used(self) -> int:
        """Return the bytes that are taken."""
        about = os.statvfs(self.root)
        return (about.f_blocks - about.f_bfree) * about.f_frsize

    def limit(self, free: int | None) -> None:
        """Leave so many bytes free, in whole pages; ``None``: as many as at first."""
        if self.mounted:
            size = SIZE if free is None else self.used() + free // _PAGE * _PAGE
            assert _mount(b"none", self.root, None, _REMOUNT, f"size={size}"), "a tmpfs can be resized"


def end_with_parent() -> None:
    """Have the system kill this process when the one that forked it is gone."""
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _own_namespace() -> bool:
    if not hasattr(_LIBC, "unshare"):
        return False
    user, group = os.getuid(), os.getgid()
    if _LIBC.unshare(_NEW_NAMESPACE) != 0:
        if _LIBC.unshare(_NEW_NAMESPACE | _NEW_USER) != 0:
            return False
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path("/proc/self", name).write_text(text)
    return _mount(b"none", Path("/"), None, _PRIVATE, None)


def _mount(what: bytes, where: Path, kind: bytes | None, flags: int, options: str | None) -> bool:
    data = None if options is None else options.encode()
    return _LIBC.mount(what, os.fsencode(where), kind, flags, data) == 0
