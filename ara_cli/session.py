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
from ara.errors import AraError, InternalError, disk_full_error, first_line
from ara_cli.console import Console
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

# Torch's ways to say that memory is short: a class of its own for GPUs, else a RuntimeError with these words.
_OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory", "alloc_failed")


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
    except AraError as error:
        console.error(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        raise _interrupted(console) from None
    except Exception as error:
        if console.reader_gone:
            console.silence()
            raise typer.Exit(_NO_READER) from None
        told = _machine_error(error, root)
        if told is None and heard and not _is_way_to_end(error):
            raise _interrupted(console) from None
        told = told or our_bug(error)
        if told is None:
            raise
        console.error(told)
        raise typer.Exit(told.exit_code) from None


def _interrupted(console: Console) -> typer.Exit:
    console.warn("interrupted; what was finished is kept, and the same command goes on from there")
    return typer.Exit(_INTERRUPTED)


def _is_way_to_end(error: Exception) -> bool:
    """Tell whether this is one of typer's own ways to end a command; the latter test: usage errors of any typer."""
    return isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "show")


def our_bug(error: Exception) -> InternalError | None:
    """Keep the traceback of a bug of ours in a file, and return the line that says so.

    ``None`` where ``ARA_DEBUG`` is set, and for what is no bug: typer's own ways to end a command.
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
        downloads: leave the hub's download bars to :func:`ara.models.quiet.quiet_transformers`, which a variable would
            overrule.
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


def _machine_error(error: Exception, root: Path) -> AraError | None:
    """Return what to say of a failure of the machine: out of memory, or the operating system refused; else ``None``."""
    words = (str(error).strip().splitlines() or [""])[0]
    if _is_out_of_memory(error):
        # Torch goes on with pages of statistics.
        short = re.match(r".*?allocate [\d.]+ \w+", words)
        said = (short[0] if short else words[:200]).rstrip(".")
        return AraError(
            f"out of memory{f': {said}' if said else ''}",
            "try --device cpu, or decompose and eval one by one with a smaller --batch-size or --moment-memory",
        )
    if not isinstance(error, OSError):
        return None
    file = None if error.filename is None else str(error.filename)
    full = disk_full_error(error, Path(file or root))
    if full is not None:
        return full
    if file is None:
        return AraError(f"{type(error).__name__}: {words or 'no reason'}", "check the disk, permissions and network")
    return AraError(
        f"{file}: {error.strerror or type(error).__name__}",
        f"check that you may read and write it, or choose another workspace than {root} with -w",
    )


def _is_out_of_memory(error: Exception) -> bool:
    """Tell without importing torch, which is slow and may not be what failed."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(known in str(error).lower() for known in _OUT_OF_MEMORY_WORDS)


def command_line() -> str:
    """Return what the user typed, for the manifest; the program's folder is left out."""
    return shlex.join(["ara", *sys.argv[1:]])
