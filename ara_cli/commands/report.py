"""``ara report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ara_cli.options import WhichCheckpoint, path_option
from ara_cli.session import Session
from ara_cli.signature import command_line


@command_line(without=("offload",))
def command(
    *,
    which: Annotated[WhichCheckpoint, "to report on"],
    output: Annotated[
        Path | None,
        path_option(
            "--output",
            help="also write the page to this file; an earlier report there is replaced",
            metavar="FILE.html",
        ),
    ] = None,
    model_card: Annotated[
        Path | None,
        path_option(
            "--model-card", help="also write the model card, with all results, to this file", metavar="FILE.md"
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="name of the result [default: that of the checkpoint]")] = None,
    s: Session,
) -> None:
    """Write all results about a checkpoint as one HTML page, and as report.json."""
    from ara.stages.report import report
    from ara_cli.render import show_report

    view = report(s.run(), checkpoint=which.asked, name=name, output=output, model_card=model_card)
    show_report(s.console, view, s.root, [path for path in (output, model_card) if path])
