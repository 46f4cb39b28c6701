"""What surrounds every command: a console, errors turned into exit codes, quiet libraries."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ara.errors import AraError
from ara_cli.console import Console

if TYPE_CHECKING:
    from ara.stages.common import Run

# Exit code of a command ended by Ctrl+C, as shells have it.
_INTERRUPTED = 130


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
    """Run a command's body; an :class:`AraError` becomes one line and its exit code."""
    # Set before transformers and datasets are imported; the user's own settings win.
    for variable, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }.items():
        os.environ.setdefault(variable, value)
    console = Console(quiet=quiet, as_json=as_json)
    try:
        with console.only_results_on_stdout():
            yield Session(console, root, force)
    except AraError as error:
        console.error(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        console.warn("interrupted; what was finished is kept, and the same command goes on from there")
        raise typer.Exit(_INTERRUPTED) from None


def command_line() -> str:
    """Return what the user typed, for the manifest; the program's folder is left out."""
    return shlex.join(["ara", *sys.argv[1:]])
