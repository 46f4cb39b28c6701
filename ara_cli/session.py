"""What surrounds every command: a console, errors turned into exit codes, quiet libraries."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ara.environment import versions
from ara.errors import (
    AraError,
    DiskFullError,
    InternalError,
    disk_full_error,
    first_line,
    is_out_of_memory,
    open_files_error,
    text_of,
)
from ara.models.cache import cache_dir, hub_dir
from ara_cli.console import Console, is_reader_gone, stdout_error
from ara_cli.interrupts import noting_interrupts

if TYPE_CHECKING:
    from ara.stages.common import Run

# Exit code of a command ended by Ctrl+C, as shells have it.
_INTERRUPTED = 130
# Exit code when the reader of a pipe has gone (`ara models | head -1`): 128 + SIGPIPE, as shells have it.
_NO_READER = 141

# Set to 1, the traceback of a bug of ours is shown instead of kept.
DEBUG_VARIABLE = "ARA_DEBUG"
# Characters of a library's message that are shown.
_SHOWN = 200

# An import that fails within these is a bug of ours.
_OWN_PACKAGES = ("", "ara", "ara_cli", "export")


@dataclass(frozen=True)
class Session:
    """One command being run."""

    console: Console
    root: Path
    force: bool

    def run(self) -> Run:
        """Return the circumstances that stages want."""
        from ara.stages.common import Run

        return Run(self.root, command_line(), self.console, self.force)


@contextmanager
def session(root: Path, quiet: bool = False, as_json: bool = False, force: bool = False) -> Iterator[Session]:
    """Run a command's body; an :class:`AraError` becomes one line and its exit code.

    So does what the machine lacks: memory, permissions, a working disk; and so do our own bugs, see :func:`our_bug`.
    """
    console = Console(quiet=quiet, as_json=as_json)
    _quiet_libraries(downloads=console.is_live)
    heard: list[int] = []
    try:
        with noting_interrupts(heard), console.only_results_on_stdout():
            yield Session(console, root, force)
    except BaseException as error:
        if heard and _may_be_interrupt(error, root):
            error = KeyboardInterrupt()
        if isinstance(error, KeyboardInterrupt):
            with suppress(OSError):
                console.warn("interrupted; what was finished is kept, and the same command goes on from there")
        code = tell(error, console, root)
        if code is None:
            raise
        raise typer.Exit(code) from None


def tell(error: BaseException, console: Console, root: Path | None = None) -> int | None:
    """Say in one line what ended a command, and return its exit code; ``None`` for what is no error of a command.

    Args:
        error: what was raised.
        console: where to say it.
        root: workspace folder; ``None`` outside a command, where help is all that is written.
    """
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED
    if root is None and isinstance(error, OSError) and error.filename is None:
        console.reader_gone = is_reader_gone(error)
        error = stdout_error(error)
        console.silence(stdout_only=True)
    if console.reader_gone:
        console.silence()
        return _NO_READER
    told = error if isinstance(error, AraError) else _machine_error(error, root) or our_bug(error)
    if told is None:
        return None
    try:
        console.error(open_files_error(told) or told)
    except (OSError, AraError):  # nobody hears it; the exit code says it
        console.silence()
    return told.exit_code


def _may_be_interrupt(error: BaseException, root: Path) -> bool:
    """Tell whether code in C may have made this of a Ctrl+C: an exception that nothing else explains."""
    explained = isinstance(error, AraError) or _is_way_to_end(error) or _machine_error(error, root) is not None
    return not explained


def _is_way_to_end(error: BaseException) -> bool:
    """Tell whether this is one of Python's or typer's own ways to end; the latter test: usage errors of any typer."""
    ends = SystemExit | GeneratorExit | typer.Exit | typer.Abort
    return isinstance(error, ends) or hasattr(error, "show")


def our_bug(error: BaseException) -> InternalError | None:
    """Keep the traceback of a bug of ours in a file, and return the line that says so.

    ``None`` where ``ARA_DEBUG`` is set, and for what is no bug: Python's and typer's own ways to end a command.
    """
    if _is_way_to_end(error):
        return None
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        return None
    kept = None
    with suppress(OSError):
        descriptor, kept = tempfile.mkstemp(prefix="ara-traceback-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{command_line()}\n{json.dumps(versions())}\n")
            traceback.print_exception(error, file=file)
    where = f"its traceback is in {kept}" if kept else "its traceback could not be written"
    return InternalError(
        f"this is a bug in ara, not in your data: {type(error).__name__}: {first_line(error)[:_SHOWN]} ({where})",
        f"please report it with that file; {DEBUG_VARIABLE}=1 shows the traceback instead",
    )


def _quiet_libraries(downloads: bool) -> None:
    """Set before transformers and datasets are imported; the user's own settings win.

    Args:
        downloads: leave the hub's download bars to :func:`ara.models.silence.silence_transformers`, which a variable
            would overrule.
    """
    settings = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if not downloads:
        settings["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for variable, value in settings.items():
        os.environ.setdefault(variable, value)


def _machine_error(error: BaseException, root: Path | None) -> AraError | None:
    """Return what to say of a failure of the machine: out of memory, or the operating system refused; else ``None``.

    So is a package that is missing or does not fit: what is imported was installed with ara.
    """
    words = (text_of(error).strip().splitlines() or [""])[0]
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] not in _OWN_PACKAGES:
        return AraError(
            f"a package that ara needs cannot be imported: {words[:_SHOWN]}",
            "install ara again in a fresh environment: pip install --force-reinstall ara-svd",
        )
    if is_out_of_memory(error):
        # Torch goes on with pages of statistics.
        short = re.match(r".*?allocate [\d.]+ \w+", words)
        said = (short[0] if short else words[:200]).rstrip(".")
        return AraError(
            f"out of memory{f': {said}' if said else ''}",
            "try --device cpu, or decompose and eval one by one with a smaller --batch-size or --moment-memory",
        )
    named = getattr(error, "filename", None)
    file = None if named is None else str(named)
    full = disk_full_error(error, Path(file or root or ".")) if isinstance(error, Exception) else None
    if full is not None:
        return DiskFullError(str(full), _elsewhere(file, root) or full.hint)
    more = open_files_error(error)
    if more is not None or not isinstance(error, OSError):
        return more
    if file is None:
        return AraError(f"{type(error).__name__}: {words or 'no reason'}", "check the disk, permissions and network")
    ours = "check that you may read and write it" + (
        f", or choose another workspace than {root} with -w" if root else ""
    )
    return AraError(f"{file}: {error.strerror or type(error).__name__}", _elsewhere(file, root) or ours)


def _elsewhere(file: str | None, root: Path | None) -> str | None:
    """Return how a cache is put elsewhere, if ``file`` lies in one or on the way to one: -w would not help."""
    if file is None:
        return None
    path = Path(file).absolute()
    workspace = (root or Path()).absolute()
    for variable, folder in {"ARA_CACHE_DIR": _cache_dir(), "HF_HOME": hub_dir()}.items():
        on_the_way = folder is not None and folder.is_relative_to(path) and not workspace.is_relative_to(path)
        if folder is not None and (path.is_relative_to(folder) or on_the_way):
            return f"set {variable} to a folder that you may write and that has room, then run the same command again"
    return None


def _cache_dir() -> Path | None:
    try:
        return cache_dir()
    except AraError:
        return None


def command_line() -> str:
    """Return what the user typed, for the manifest; the program's folder is left out."""
    return shlex.join(["ara", *sys.argv[1:]])
