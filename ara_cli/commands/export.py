"""``ara export``."""

from __future__ import annotations

from typing import Annotated

import typer

from ara.config import build
from ara_cli.options import WORKSPACE, JsonOption, QuietOption, WorkspaceOption, field
from ara_cli.session import session
from export.config import ExportConfig


def command(
    onnx: Annotated[
        bool, typer.Option("--onnx", help="write an ONNX graph for onnxruntime (the only target so far)")
    ] = True,
    precision: Annotated[str | None, field(ExportConfig, "precision")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="result of ara truncate to export [default: the latest]")
    ] = None,
    workspace: WorkspaceOption = WORKSPACE,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the chosen checkpoint for another runtime (arrives with ONNX)."""
    with session(workspace, quiet, as_json) as s:
        config = build(ExportConfig, target="onnx", precision=precision)
        from export.stage import export

        export(config, s.run(), checkpoint=checkpoint)
