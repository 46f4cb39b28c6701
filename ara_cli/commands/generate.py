"""``ara generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ara.config import GenerateConfig
from ara.errors import UsageError
from ara.prompts import check_prompt, piped_prompt
from ara_cli.options import WhichCheckpoint, WhichExport, path_option
from ara_cli.session import Session
from ara_cli.signature import command_line
from export.targets import target_of


@command_line(after={"source": ("device", "dtype")}, without=("force",))
def command(
    *,
    prompt: Annotated[str, typer.Argument(help="text to answer or to continue; - reads it from stdin")],
    config: GenerateConfig,
    which: Annotated[WhichCheckpoint, ""],
    exported: Annotated[WhichExport, "runs"],
    source: Annotated[
        Path | None,
        path_option(
            "--source", help="run this checkpoint folder or exported folder, without a workspace", metavar="FOLDER"
        ),
    ] = None,
    s: Session,
) -> None:
    """Answer a prompt with the compressed model, word by word."""
    export = exported.asked(config.backend)
    target_of(config.backend)
    text = _piped() if prompt == "-" else check_prompt(prompt)
    from export.generate import answer

    pieces = []
    for piece in answer(config, s.run(), text, checkpoint=which.asked, source=source, export=export):
        pieces.append(piece)
        s.console.stream(piece)
    s.console.stream("\n")
    found = "".join(pieces)
    s.console.result({"prompt": text, "answer": found, "empty": not found.strip(), "backend": config.backend})


def _piped() -> str:
    """Return the prompt from stdin.

    Raises:
        UsageError: stdin is closed, or its content is not a prompt.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError("the prompt - is read from stdin, which is closed", "echo 'Who are you?' | ara generate -")
    return piped_prompt(sys.stdin.buffer)
