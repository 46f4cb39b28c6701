"""Errors a user can act on: what happened, what was got, what was expected, what to do next.

Every failure that is not our own bug is an :class:`AraError`. The command line prints ``str(error)``
as one line, the hint on a second one, and exits with :attr:`AraError.exit_code`. Our own bugs stay
ordinary exceptions; the command line says so in one line and keeps their traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Words by which safetensors and others wrap the operating system's ENOSPC (they do not keep errno).
_DISK_FULL_WORDS = ("no space left on device", "os error 28", "disk quota exceeded")


class AraError(Exception):
    """A user or data problem.

    Args:
        message: what happened, with what was got and what was expected; one line.
        hint: what to do next; one line, or ``None`` when there is nothing to add.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(AraError):
    """An option or argument that can never be right, whatever the data."""

    exit_code = 2


class ModelError(AraError):
    """The model cannot be found, read or reached."""


class UnsupportedModelError(ModelError):
    """The model was read, but is not one that ARA can factorise."""


class DataError(AraError):
    """A text, task or data file is missing, empty or malformed."""


class NumericalError(AraError):
    """NaN or infinity where a finite number is needed."""


class WorkspaceError(AraError):
    """The workspace is missing a stage, belongs to another model or has another format."""


class CorruptedError(WorkspaceError):
    """A file differs from the checksum in its manifest."""


class LockedError(WorkspaceError):
    """Another process is writing to the workspace."""


class DiskFullError(AraError):
    """The disk has no room for what is to be written."""


class OutputError(AraError):
    """The folder that is to be written must not be touched."""


class UnavailableError(AraError):
    """A command that is registered, but whose implementation has not arrived yet."""


class InternalError(AraError):
    """A bug of ours, as the command line tells it."""

    exit_code = 70  # EX_SOFTWARE of sysexits.h


class ProblemsError(UsageError):
    """Several independent problems, shown together."""

    def __init__(self, title: str, problems: Iterable[str], hint: str | None = None) -> None:
        self.problems = list(problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"{title}:{lines}", hint)


def near_matches(name: str, known: Iterable[str]) -> str:
    """Return ``"did you mean a or b? "`` (or an empty string) followed by nothing else."""
    close = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}? " if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of what ``error`` says, or the name of its class if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def disk_errors(target: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn "no space left on device", however a library words it, into :class:`DiskFullError`.

    Args:
        target: the folder being written, named in the error.
        needed_bytes: how much was to be written, if known.
    """
    try:
        yield
    except Exception as error:
        full = disk_full_error(error, target, needed_bytes)
        if full is None:
            raise
        raise full from error


def disk_full_error(error: Exception, target: Path, needed_bytes: int | None = None) -> DiskFullError | None:
    """Return what to say of ``error`` if it means a full disk, else ``None``; arguments as of :func:`disk_errors`."""
    if isinstance(error, AraError):  # told already
        return None
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and not any(words in str(error).lower() for words in _DISK_FULL_WORDS):
        return None
    needed = f" (about {needed_bytes / 2**20:,.0f} MiB were needed)" if needed_bytes else ""
    return DiskFullError(
        f"the disk is full: writing {target} failed{needed}",
        "free some space or choose another workspace with -w, then run the same command again",
    )
