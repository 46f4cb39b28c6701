"""Reads files within size limits, and writes files without following links.

Every problem with a file is an :class:`OSError` whose ``strerror`` describes it: a missing file, a missing permission,
a pipe instead of a file, a file that is too large.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ara.bounds import check_text
from ara.errors import UsageError

# Largest JSON file, in bytes. ARA's own largest, the manifest of a model with 10,000 tensors, has about 3 MiB.
MAX_JSON_BYTES = 64 * 2**20
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Raises:
        OSError: there is no such file, it may not be read, or it is no regular file.
    """
    # Without O_NONBLOCK a pipe would block here until something is written to it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        check_regular(path, os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: Path, found: os.stat_result) -> None:
    """Refuse what is not a regular file.

    Args:
        path: named in the error.
        found: its ``stat``.

    Raises:
        OSError: it is a folder, a pipe, a socket or a device.
    """
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, expected a regular file", str(path))


def read_bytes(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: see :func:`open_regular`; or the file is larger.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
    return content


def read_text(path: Path, limit: int = MAX_JSON_BYTES) -> str:
    """Return the content of a regular UTF-8 file of at most ``limit`` bytes.

    Raises:
        OSError: see :func:`read_bytes`.
        UnicodeDecodeError: the content is not UTF-8.
    """
    return read_bytes(path, limit).decode("utf-8")


def write_text(path: Path, text: str, *, sync: bool = False) -> None:
    """Write a text file as UTF-8; an existing file is overwritten in place, a link is not followed.

    Args:
        path: of the file.
        text: its whole content.
        sync: flush to the disk before returning.

    Raises:
        OSError: it cannot be written, or ``path`` is a link.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    # Without this a pipe would block here until something reads from it.
    flags |= getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK) and path.is_symlink():
            raise link_error(path) from None
        raise
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        check_regular(path, os.fstat(descriptor))
        file.write(text)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def expand_user(path: str | Path, what: str) -> Path:
    """Return ``path`` with a leading ``~`` or ``~user`` expanded.

    Args:
        path: from the command line or an environment variable.
        what: name of the option or variable, for the error.

    Raises:
        UsageError: there is no such user, the home folder is unknown, or the path is not valid UTF-8.
    """
    try:
        found = Path(path).expanduser()
        check_text(str(found))
    except RuntimeError:
        raise UsageError(
            f"{what} {str(path)!r} cannot be used: there is no such user, or HOME is not set",
            "give the full path (./~name is a folder called ~name)",
        ) from None
    except ValueError as problem:
        raise UsageError(
            f"{what} {str(path)!a} cannot be used: {problem}", "choose another path or rename it"
        ) from None
    return found


def existing_folder(path: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(one for one in (path, *path.resolve().parents) if one.is_dir())


def is_plain_file(path: Path) -> bool:
    """Tell whether ``path`` is a regular file and no link."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def remove(path: Path) -> None:
    """Delete a file, a folder with its content, or a link without its target.

    A missing path is no error, and neither is a part of a folder that cannot be deleted.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            _remove_with_one_file(path)


def link_error(path: Path) -> OSError:
    """Return the error for a link where a file was to be written."""
    return OSError(errno.ELOOP, "it is a link, and ARA does not write through links", str(path))


def _remove_with_one_file(folder: Path) -> None:
    """Delete a folder with few open files: ``shutil.rmtree`` opens two per level and may have reached the limit."""
    for place, folders, files in os.walk(folder, topdown=False):
        for name in (*files, *folders):
            path = Path(place, name)
            with suppress(OSError):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    with suppress(OSError):
        folder.rmdir()
