"""``ara eval``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from ara.config import EvalConfig, build
from ara.errors import UsageError
from ara.names import check_name
from ara_cli.options import (
    WORKSPACE,
    ForceOption,
    JsonOption,
    NameOption,
    QuietOption,
    WorkspaceOption,
    default,
    field,
    task_names,
)
from ara_cli.session import session

_C = EvalConfig


def command(
    tasks: Annotated[str, field(_C, "tasks")] = ",".join(default(_C, "tasks")),
    checkpoint: Annotated[
        str | None, typer.Option(help="result of ara truncate to measure [default: the latest]")
    ] = None,
    seq_len: Annotated[int | None, field(_C, "seq_len")] = None,
    max_windows: Annotated[int | None, field(_C, "max_windows")] = None,
    include_path: Annotated[list[str] | None, field(_C, "include_path", metavar="DIR")] = None,
    limit: Annotated[int | None, field(_C, "limit")] = None,
    seed: Annotated[int, field(_C, "seed")] = default(_C, "seed"),
    batch_size: Annotated[int, field(_C, "batch_size")] = default(_C, "batch_size"),
    name: NameOption = None,
    backend: Annotated[str, field(_C, "backend", metavar="torch|onnx")] = default(_C, "backend"),
    export: Annotated[
        str | None, typer.Option(help="export that --backend onnx measures [default: the latest]")
    ] = None,
    continuations: Annotated[int, field(_C, "continuations")] = default(_C, "continuations"),
    prompt: Annotated[str | None, field(_C, "prompt")] = None,
    max_new_tokens: Annotated[int, field(_C, "max_new_tokens")] = default(_C, "max_new_tokens"),
    device: Annotated[str, field(_C, "device")] = default(_C, "device"),
    dtype: Annotated[str, field(_C, "dtype")] = default(_C, "dtype"),
    workspace: WorkspaceOption = WORKSPACE,
    force: ForceOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the dense, the uniform and the chosen model side by side, in one run."""
    with session(workspace, quiet, as_json, force) as s:
        config = build(
            EvalConfig,
            tasks=task_names(tasks),
            seq_len=seq_len,
            max_windows=max_windows,
            include_path=tuple(include_path or ()),
            limit=limit,
            seed=seed,
            continuations=continuations,
            batch_size=batch_size,
            backend=backend,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            device=device,
            dtype=dtype,
        )
        from ara.stages.evaluate import evaluate
        from ara_cli.render import show_end
        from ara_cli.render_eval import show_evaluation

        find = None
        if config.backend == "onnx":
            from export.onnx.evaluation import find_export

            find = partial(find_export, name=None if export is None else check_name(export))
        elif export is not None:
            raise UsageError(f"--export {export} is given, and --backend is torch", "add --backend onnx")
        view = evaluate(config, s.run(), checkpoint=checkpoint, name=name, find_export=find)
        show_evaluation(s.console, view)
        show_end(s.console, view, workspace)
