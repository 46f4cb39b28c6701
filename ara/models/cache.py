"""The user's cache folder; files and folders appear in it complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ara.errors import AraError, DiskFullError, UsageError, disk_errors, disk_full_error, open_files_error
from ara.files import expand_user

# Only killed processes leave such folders. A day is longer than any download or conversion takes.
_ABANDONED_SECONDS = 24 * 3600
_ASIDE_PREFIX = ".aside-"


def cache_dir() -> Path:
    """Return the folder for results that can be fetched or computed again; it may not exist yet.

    It is ``$ARA_CACHE_DIR``, else ``$XDG_CACHE_HOME/ara``, else ``~/.cache/ara``.

    Raises:
        UsageError: the home folder is needed and unknown.
    """
    if own := os.environ.get("ARA_CACHE_DIR"):
        return expand_user(own, "ARA_CACHE_DIR").absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return expand_user(shared, "XDG_CACHE_HOME").absolute() / "ara"
    return expand_user("~/.cache/ara", "the cache folder (set ARA_CACHE_DIR to choose another)")


def hub_dir() -> Path | None:
    """Return the cache folder of the hub's libraries (``$HF_HOME``), or ``None`` if the home folder is unknown."""
    own, shared = os.environ.get("HF_HOME"), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return expand_user(own, "HF_HOME").absolute()
        return expand_user(shared or "~/.cache", "XDG_CACHE_HOME").absolute() / "huggingface"
    except UsageError:
        return None


@contextmanager
def aside(parent: Path) -> Iterator[Path]:
    """Yield an empty folder inside ``parent`` that is removed afterwards.

    It is on the same file system as its neighbours, so :func:`os.replace` is atomic. Old folders of killed processes
    are removed first.

    Raises:
        DiskFullError: the disk has no room.
        AraError: ``parent`` cannot be created or written.
    """
    with _cache_errors(parent):
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _sweep(parent)
            folder = Path(tempfile.mkdtemp(prefix=_ASIDE_PREFIX, dir=parent))
        except OSError as error:
            if disk_full_error(error, parent) or open_files_error(error):
                raise
            # For instance a home folder that is mounted read-only.
            raise AraError(
                f"the cache folder {parent} cannot be written: {error.strerror}",
                "set ARA_CACHE_DIR to a folder that you may write",
            ) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def publish_folder(made: Path, target: Path, is_complete: Callable[[Path], bool]) -> None:
    """Move the finished folder ``made`` to ``target`` in one step.

    If another process was faster, its folder stays; both have the same content.

    Args:
        made: a finished folder on the same file system, from :func:`aside`.
        target: where it belongs.
        is_complete: tells whether an existing folder at ``target`` can be used.
    """
    try:
        os.replace(made, target)
    except OSError:
        if is_complete(target):
            return
        if not target.is_dir():
            raise
        # Files of the cached folder were removed: move the damaged folder to where :func:`aside` removes it.
        os.replace(target, made.parent / "damaged")
        os.replace(made, target)


@contextmanager
def _cache_errors(parent: Path) -> Iterator[None]:
    """Report a full disk with a hint that fits the cache instead of a workspace."""
    try:
        with disk_errors(parent):
            yield
    except DiskFullError as error:
        raise DiskFullError(
            str(error),
            "free some space or set ARA_CACHE_DIR to a folder on another disk, then run the same command again",
        ) from error


def _sweep(parent: Path) -> None:
    oldest = time.time() - _ABANDONED_SECONDS
    for folder in parent.glob(f"{_ASIDE_PREFIX}*"):
        with suppress(FileNotFoundError):  # its process has just finished
            if folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)
