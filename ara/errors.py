"""Errors a user can act on: what happened, what was got, what was expected, what to do next.

Every failure that is not a bug of ARA is an :class:`AraError`. The command line prints ``str(error)`` on one line, the
hint on a second one, and exits with :attr:`AraError.exit_code`. Bugs are ordinary exceptions: the command line reports
them in one line and keeps the traceback.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Torch raises its own class when GPU memory is short, else a RuntimeError with one of these texts.
_OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory", "alloc_failed")
# Texts of operating system errors, for libraries such as safetensors that do not keep errno.
_DISK_FULL_WORDS = ("no space left on device", "os error 28", "disk quota exceeded")
_FILE_LIMIT_WORDS = ("file too large", "os error 27")
_OPEN_FILES_WORDS = ("too many open files", "os error 24")
# numpy's error when it writes ONNX weights: "4096 requested and 1024 written", whatever the reason.
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


class AraError(Exception):
    """A user or data problem.

    Args:
        message: what happened, what was got and what was expected; one line.
        hint: what to do next; one line, or ``None``.
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


class MemoryShortError(AraError):
    """Memory is short for work that was already under way."""


class NumericalError(AraError):
    """NaN or infinity where a finite number is needed."""


NAN_HINT = "the model computes NaN or infinity: try --dtype float32, and check its weights"


class WorkspaceError(AraError):
    """The workspace is missing a stage, belongs to another model or has another format."""


class CorruptedError(WorkspaceError):
    """A file differs from the checksum in its manifest."""


class LockedError(WorkspaceError):
    """Another process is writing to the workspace."""


class DiskFullError(AraError):
    """The disk is full, or a file would exceed a size limit."""


class OutputError(AraError):
    """The output path must not be written."""


class UnavailableError(AraError):
    """This machine lacks something that the command needs."""


class ProcessLostError(AraError):
    """Another process of the same run has ended, or cannot be reached."""


class UnequalError(AraError):
    """The processes of one run differ in what must be the same."""


class InternalError(AraError):
    """A bug of ARA, as the command line reports it."""

    exit_code = 70  # EX_SOFTWARE of sysexits.h


class ProblemsError(UsageError):
    """Several independent problems, shown together."""

    def __init__(self, title: str, problems: Iterable[str], hint: str | None = None) -> None:
        self.problems = list(problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"{title}:{lines}", hint)


def near_matches(name: str, known: Iterable[str]) -> str:
    """Return ``"did you mean a or b? "``, or an empty string."""
    close = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}? " if close else ""


def text_of(error: BaseException) -> str:
    """Return ``str(error)``, or an empty string if that fails."""
    try:
        return str(error)
    except Exception:
        return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory is short; does not import torch."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(words in text_of(error).lower() for words in _OUT_OF_MEMORY_WORDS)


def first_line(error: BaseException) -> str:
    """Return the first line of the error's text, or the name of its class if the text is empty.

    A line that ends in a colon is joined with the next one. A ``KeyError`` holds only the key, so the line says that it
    is missing. From huggingface_hub's config errors the cause is taken, which names the field.
    """
    lines = [line.strip() for line in text_of(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, KeyError) and len(error.args) == 1:
        key = error.args[0]
        return key if isinstance(key, str) and " " in key else f"there is no {lines[0]}"
    said = lines[0]
    for line in lines[1:]:
        if not said.endswith(":"):
            break
        said = line if type(error).__name__.startswith("StrictDataclass") else f"{said} {line}"
    if type(error).__name__.startswith("StrictDataclass"):
        return re.sub(r"^\w+(Error|Exception): ", "", said)
    return said


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
    """Return the error to raise if ``error`` means a full disk, else ``None``; arguments as of :func:`disk_errors`."""
    if isinstance(error, AraError):
        return None
    told = text_of(error).lower()
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    needed = f" (about {needed_bytes / 2**20:,.0f} MiB were needed)" if needed_bytes else ""
    if full or any(words in told for words in _DISK_FULL_WORDS):
        return DiskFullError(
            f"the disk is full: writing {target} failed{needed}",
            "free some space or choose another workspace with -w, then run the same command again",
        )
    limited = any(words in told for words in _FILE_LIMIT_WORDS)
    if limited or _SHORT_WRITE.search(told):
        what = "" if limited else "the disk is full, or "
        return DiskFullError(
            f"{what}a file exceeds the size limit: writing {target} failed{needed}",
            "raise the limit (ulimit -f unlimited), or use a disk with more space and support for larger files",
        )
    return None


def open_files_error(error: BaseException) -> AraError | None:
    """Return the error to raise if ``error`` means that too many files are open, else ``None``."""
    if not any(words in text_of(error).lower() for words in _OPEN_FILES_WORDS):
        return None
    # The hint of a reader's error is wrong here: the file is not damaged.
    told = str(error) if isinstance(error, AraError) else "too many open files: this process may open no more"
    return AraError(told, "raise the limit, such as with ulimit -n 4096")
