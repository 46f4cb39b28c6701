"""The session of a command: its console, exit codes for errors, silenced libraries."""

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
from dataclasses import dataclass, field, replace
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
from ara.models.offload import Offload
from ara_cli.console import Console, is_reader_gone, stdout_error
from ara_cli.interrupts import recording_interrupts
from ara_cli.processes import Processes

if TYPE_CHECKING:
    from ara.distributed.group import Group
    from ara.stages.common import Run

# Exit code after Ctrl+C: 128 + SIGINT, as in shells.
_INTERRUPTED = 130
# Exit code when the reader of a pipe has ended (`ara models | head -1`): 128 + SIGPIPE, as in shells.
_NO_READER = 141

# If 1, the traceback of a bug in ARA is shown instead of written to a file.
DEBUG_VARIABLE = "ARA_DEBUG"
# Longest part of a library's message that is shown, in characters.
_SHOWN = 200

# A failed import of one of these is a bug in ARA.
_OWN_PACKAGES = ("", "ara", "ara_cli", "export")


@dataclass(frozen=True)
class Session:
    """One run of a command.

    Attributes:
        console: prints.
        root: workspace folder.
        force: make results again.
        offload: whether weights stay in their files on a CPU.
        interrupts: one number for every Ctrl+C that nobody has handled yet.
        group: the processes that run the command; ``None`` for one process.
    """

    console: Console
    root: Path
    force: bool
    offload: Offload = "auto"
    interrupts: list[int] = field(default_factory=list)
    group: Group | None = None

    def run(self) -> Run:
        """Return what stages need besides their config."""
        from ara.distributed.group import ALONE
        from ara.progress import SILENT
        from ara.stages.common import Run

        group = self.group or ALONE
        report = self.console if group.writes else SILENT
        return Run(self.root, command_line(), report, self.force, self.offload, group)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Run a part of the command that Ctrl+C ends by a KeyboardInterrupt, whatever C code makes of it.

        The caller handles the exception; the command can go on.
        """
        try:
            yield
        except BaseException as error:
            if self.interrupts and _may_be_interrupt(error, self.root):
                raise KeyboardInterrupt from error
            raise
        finally:
            self.interrupts.clear()


@contextmanager
def session(
    root: Path,
    quiet: bool = False,
    as_json: bool = False,
    force: bool = False,
    offload: Offload = "auto",
    several: bool = False,
) -> Iterator[Session]:
    """Run a command's body; an error becomes one line and an exit code, see :func:`report_error`.

    Args:
        root: workspace folder.
        quiet: see :class:`Console`.
        as_json: see :class:`Console`.
        force: make results again.
        offload: whether weights stay in their files on a CPU.
        several: whether the command can be run in several processes.
    """
    console = Console(quiet=quiet, as_json=as_json)
    _quiet_libraries(downloads=console.is_live)
    started, processes = Session(console, root, force, offload), Processes()
    try:
        with (
            recording_interrupts(started.interrupts),
            console.only_results_on_stdout(),
            started.interruptible(),
            processes.join(several) as group,
        ):
            yield replace(started, group=group)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            with suppress(OSError):
                console.warn("interrupted; finished work is kept, and the same command continues from there")
        if processes.launch.size > 1 and not isinstance(error, KeyboardInterrupt):
            console = _speaker(processes.reports(error), processes.launch.rank, console)
        code = report_error(error, console, root)
        if code is None:
            raise
        raise typer.Exit(code) from None


def _speaker(reports: bool, rank: int, console: Console) -> Console:
    """Return the console for the error of one of several processes, whose stdout and stderr are silent after the first.

    Args:
        reports: whether it reports the error.
        rank: of the process.
        console: of the session.
    """
    if not reports:
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 – until the process ends
        return Console(stdout=nowhere, stderr=nowhere)
    if rank == 0:
        return console
    return Console(as_json=console.as_json, stdout=sys.__stdout__, stderr=sys.__stderr__)


def report_error(error: BaseException, console: Console, root: Path | None = None) -> int | None:
    """Report in one line the error that ended a command, and return its exit code; ``None``: not an error.

    Besides :class:`AraError` these are errors of the machine (memory, permissions, disk) and bugs in ARA.

    Args:
        error: what was raised.
        console: for the message.
        root: workspace folder; ``None`` outside a command, where only help is written to stdout.
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
    reported = error if isinstance(error, AraError) else _machine_error(error, root) or _bug(error)
    if reported is None:
        return None
    try:
        console.error(open_files_error(reported) or reported)
    except (OSError, AraError):  # stderr cannot be written; the exit code remains
        console.silence()
    return reported.exit_code


def _may_be_interrupt(error: BaseException, root: Path) -> bool:
    """Tell whether C code may have turned a Ctrl+C into this exception: one with no other explanation."""
    return not (isinstance(error, AraError) or _is_regular_exit(error) or _machine_error(error, root) is not None)


def _is_regular_exit(error: BaseException) -> bool:
    """Tell whether Python or typer ends a command by this exception; typer's usage errors have ``show``."""
    return isinstance(error, SystemExit | GeneratorExit | typer.Exit | typer.Abort) or hasattr(error, "show")


def _bug(error: BaseException) -> InternalError | None:
    """Write the traceback of a bug in ARA to a file, and return the error that names the file.

    ``None`` if ``ARA_DEBUG`` is set, or if the exception is a regular exit.
    """
    if _is_regular_exit(error) or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
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
    """Set variables before transformers and datasets are imported; the user's own settings have priority.

    Args:
        downloads: do not set the variable for download bars; it would overrule
            :func:`ara.models.silence.silence_transformers`.
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
    """Return the error for a failure of the machine: memory, operating system, a package that cannot be imported.

    ``None`` for other exceptions.
    """
    message = (text_of(error).strip().splitlines() or [""])[0]
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] not in _OWN_PACKAGES:
        return AraError(
            f"a package that ara needs cannot be imported: {message[:_SHOWN]}",
            "install ara again in a fresh environment: pip install --force-reinstall ara-svd",
        )
    if is_out_of_memory(error):
        # Torch adds pages of statistics.
        short = re.match(r".*?allocate [\d.]+ \w+", message)
        detail = (short[0] if short else message[:_SHOWN]).rstrip(".")
        return AraError(
            f"out of memory{f': {detail}' if detail else ''}",
            "try --device cpu, or run the stages one by one with a smaller --batch-size, --samples or --moment-memory",
        )
    named = getattr(error, "filename", None)
    file = None if named is None else str(named)
    full = disk_full_error(error, Path(file or root or ".")) if isinstance(error, Exception) else None
    if full is not None:
        return DiskFullError(str(full), _cache_hint(file, root) or full.hint)
    too_many_files = open_files_error(error)
    if too_many_files is not None or not isinstance(error, OSError):
        return too_many_files
    if file is None:
        return AraError(f"{type(error).__name__}: {message or 'no reason'}", "check the disk, permissions and network")
    hint = "check that you may read and write it" + (
        f", or choose another workspace than {root} with -w" if root else ""
    )
    return AraError(f"{file}: {error.strerror or type(error).__name__}", _cache_hint(file, root) or hint)


def _cache_hint(file: str | None, root: Path | None) -> str | None:
    """Return how to move a cache if ``file`` is in one or is a parent of one: -w would not help."""
    if file is None:
        return None
    path = Path(file).absolute()
    workspace = (root or Path()).absolute()
    for variable, folder in {"ARA_CACHE_DIR": _cache_dir(), "HF_HOME": hub_dir()}.items():
        is_parent = folder is not None and folder.is_relative_to(path) and not workspace.is_relative_to(path)
        if folder is not None and (path.is_relative_to(folder) or is_parent):
            return f"set {variable} to a writable folder with free space, then run the same command again"
    return None


def _cache_dir() -> Path | None:
    try:
        return cache_dir()
    except AraError:
        return None


def command_line() -> str:
    """Return the command as typed, without the folder of the program; it goes into the manifest."""
    return shlex.join(["ara", *sys.argv[1:]])
