"""``ara serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ara.config import ServeConfig
from ara_cli.options import WhichCheckpoint, path_option
from ara_cli.session import Session
from ara_cli.signature import command_line


@command_line(without=("force", "offload"))
def command(
    *,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="-- WORDS", help="further options of the server, as it names them")
    ] = None,
    config: ServeConfig,
    which: Annotated[WhichCheckpoint, "to serve"],
    source: Annotated[
        Path | None, path_option("--source", help="serve this checkpoint folder, without a workspace", metavar="FOLDER")
    ] = None,
    s: Session,
) -> None:
    """Serve the compressed model with vLLM's OpenAI-compatible server, or with that of transformers.

    The process becomes the server: Ctrl+C ends it.
    """
    from export.serve import service

    found = service(config, s.run(), words or (), checkpoint=which.asked, source=source)
    s.console.step(f"Starting the server of {found.title}; requests name the model {found.folder}")
    if s.console.as_json:
        s.console.result({"server": found.server, "url": found.url, "model": found.folder})
    else:
        s.console.text(found.url)
    found.start()
