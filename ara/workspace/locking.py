"""One writer per workspace."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ara.environment import now
from ara.errors import LockedError, disk_errors
from ara.files import remove, write_text
from ara.jsonfile import read

LOCK_FILE, OWNER_FILE = ".lock", ".lock-owner.json"
# Limit of the owner file, enough for a long command line.
_MAX_OWNER_BYTES = 1 << 20


class _Owner(BaseModel):
    model_config = ConfigDict(defer_build=True)
    pid: int
    command: str
    since: str


@contextmanager
def exclusive(root: Path, command: str) -> Iterator[None]:
    """Hold the lock of the folder ``root``; the system releases it if this process dies.

    Args:
        root: an existing folder.
        command: shown to other processes that find the lock taken.

    Raises:
        LockedError: another process holds the lock.
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
            remove(owner)  # the file of a dead process, or a foreign link
            write_text(owner, json.dumps({"pid": os.getpid(), "command": command, "since": now()}))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _owner_text(path: Path) -> str:
    try:
        owner = _Owner.model_validate(read(path, limit=_MAX_OWNER_BYTES))
    except (OSError, ValueError):
        return "another process"
    return " ".join(f"process {owner.pid} ({owner.command}, since {owner.since[:19]} UTC)".split())
