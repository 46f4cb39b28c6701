"""``ara eval``."""

from __future__ import annotations

from typing import Annotated

import typer

from ara.config import EvalConfig, build
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
from export.targets import backends

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
    backend: Annotated[str, field(_C, "backend", metavar="|".join(backends()))] = default(_C, "backend"),
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
        from export.find import find_for_eval

        find = find_for_eval(config.backend, export)
        view = evaluate(config, s.run(), checkpoint=checkpoint, name=name, find_export=find)
        show_evaluation(s.console, view)
        show_end(s.console, view, workspace)
