"""One writer per workspace."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ara.environment import now
from ara.errors import LockedError, disk_errors

LOCK_FILE, OWNER_FILE = ".lock", ".lock-owner.json"


@contextmanager
def exclusive(root: Path, command: str) -> Iterator[None]:
    """Hold the lock of the folder ``root``; the system releases it if this process dies.

    Args:
        root: an existing folder.
        command: told to whoever finds the lock taken.

    Raises:
        LockedError: another process holds the lock; says which.
    """
    from filelock import FileLock, Timeout

    owner = root / OWNER_FILE
    lock = FileLock(root / LOCK_FILE, timeout=0)
    try:
        with disk_errors(root):
            lock.acquire()
    except Timeout:
        raise LockedError(
            f"{root} is being written by {_owner_text(owner)}", "wait for it to end, or use another workspace"
        ) from None
    try:
        with disk_errors(root):
            owner.write_text(json.dumps({"pid": os.getpid(), "command": command, "since": now()}))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _owner_text(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} ({owner['command']}, since {owner['since'][:19]} UTC)"
    except (OSError, ValueError, KeyError):
        return "another process"
