"""``ara export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ara.errors import UsageError
from ara.files import expand_user
from ara_cli.options import NameOption, WhichCheckpoint, path_option
from ara_cli.session import Session
from ara_cli.shown import shown
from ara_cli.signature import command_line
from export.config import ExportConfig


@command_line(after={"target": ("onnx",), "last_logits": ("rewrite",)}, without=("offload",))
def command(
    *,
    config: ExportConfig,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="short for --target onnx, the only target so far", show_default=False)
    ] = True,
    which: Annotated[WhichCheckpoint, "to export"],
    source: Annotated[
        Path | None,
        path_option(
            "--source", help="export this checkpoint folder into --output, without a workspace", metavar="FOLDER"
        ),
    ] = None,
    output: Annotated[
        Path | None, path_option("--output", help="folder for the export of --source", metavar="FOLDER")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier export in --output")] = False,
    name: NameOption = None,
    s: Session,
) -> None:
    """Write a checkpoint as an ONNX graph, and compare the graph with torch."""
    if source is not None:
        # Absolute, because the report of the export contains it.
        source = expand_user(source.resolve(), "--source")
    if (source is None) != (output is None):
        raise UsageError("--source and --output belong together", "give both, or neither to export a workspace's")
    if overwrite and output is None:
        raise UsageError("--overwrite is for --output", "use --force to replace an export of the workspace")
    from ara.artifacts.graph import GraphResults
    from ara_cli.render import show_end, show_export
    from export.stage import export, export_folder

    if source is not None and output is not None:
        flags = {**which.given, "--name": name, "--force": s.force}
        given = [flag for flag, value in flags.items() if value]
        if given:
            raise UsageError(f"{given[0]} and --source are both given", f"{given[0]} is for a workspace: leave it out")
        about = export_folder(config, s.run(), source, output, overwrite=overwrite).model_dump(mode="json")
        show_export(s.console, GraphResults.parse(about))
        s.console.saved(output)
        s.console.result(about)
    else:
        view = export(config, s.run(), checkpoint=which.asked, name=name)
        with shown(view):
            show_export(s.console, GraphResults.read(view))
        show_end(s.console, view, s.root)
