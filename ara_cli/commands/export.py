"""``ara export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ara.config import build
from ara.errors import UsageError
from ara.files import expand_user
from ara_cli.options import (
    WORKSPACE,
    ForceOption,
    JsonOption,
    NameOption,
    QuietOption,
    WorkspaceOption,
    default,
    field,
    path_option,
)
from ara_cli.session import session
from ara_cli.shown import shown
from export.config import ExportConfig
from export.targets import TARGETS

_C = ExportConfig


def command(
    target: Annotated[str, field(_C, "target", metavar="|".join(TARGETS.names()))] = default(_C, "target"),
    onnx: Annotated[
        bool, typer.Option("--onnx", help="write an ONNX graph for onnxruntime (the only target so far)")
    ] = True,
    precision: Annotated[str | None, field(_C, "precision")] = None,
    execution_provider: Annotated[str, field(_C, "execution_provider", metavar="auto|cpu|cuda")] = default(
        _C, "execution_provider"
    ),
    merge_shared_inputs: Annotated[bool, field(_C, "merge_shared_inputs", "--merge-shared-inputs")] = False,
    last_logits: Annotated[bool, field(_C, "last_logits", "--last-logits")] = False,
    rewrite: Annotated[str | None, field(_C, "rewrite", metavar="DENSE.onnx")] = None,
    parity_tokens: Annotated[int, field(_C, "parity_tokens")] = default(_C, "parity_tokens"),
    parity: Annotated[bool, field(_C, "parity", "--parity/--no-parity")] = True,
    checkpoint: Annotated[
        str | None, typer.Option(help="result of ara truncate to export [default: the latest]")
    ] = None,
    source: Annotated[
        Path | None,
        path_option("--source", help="export this checkpoint folder instead, into --output", metavar="FOLDER"),
    ] = None,
    output: Annotated[
        Path | None, path_option("--output", help="folder for the export of --source", metavar="FOLDER")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is in --output")] = False,
    name: NameOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    force: ForceOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the chosen checkpoint as an ONNX graph and prove it against torch."""
    with session(workspace, quiet, as_json, force) as s:
        config = build(
            ExportConfig,
            target=target,
            precision=precision,
            execution_provider=execution_provider,
            merge_shared_inputs=merge_shared_inputs,
            last_logits=last_logits,
            rewrite=None if rewrite is None else str(expand_user(rewrite, "--rewrite")),
            parity=parity,
            parity_tokens=parity_tokens,
        )
        if source is not None:
            # It goes into the report of the export, with the folder that it is relative to.
            source = expand_user(source.resolve(), "--source")
        if (source is None) != (output is None):
            raise UsageError("--source and --output belong together", "give both, or neither to export a workspace's")
        if overwrite and output is None:
            raise UsageError("--overwrite is for --output", "use --force to replace an export of the workspace")
        from ara.artifacts.graph import GraphResults
        from ara_cli.render import show_end, show_export
        from export.stage import export, export_folder

        if source is not None and output is not None:
            flags = {"--checkpoint": checkpoint, "--name": name, "--force": force}
            given = [flag for flag, value in flags.items() if value]
            if given:
                raise UsageError(
                    f"{given[0]} and --source are both given", f"{given[0]} is for a workspace: leave it out"
                )
            about = export_folder(config, s.run(), source, output, overwrite=overwrite).model_dump(mode="json")
            show_export(s.console, GraphResults.parse(about))
            s.console.saved(output)
            s.console.result(about)
        else:
            view = export(config, s.run(), checkpoint=checkpoint, name=name)
            with shown(view):
                show_export(s.console, GraphResults.read(view))
            show_end(s.console, view, workspace)
