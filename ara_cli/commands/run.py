"""``ara run``: the whole pipeline."""

from __future__ import annotations

from typing import Annotated

import typer

from ara.config import AllocateConfig, DecomposeConfig, EvalConfig, StageConfig, TruncateConfig, build
from ara_cli.options import (
    WORKSPACE,
    ForceOption,
    JsonOption,
    QuietOption,
    WorkspaceOption,
    default,
    field,
    keep_of,
    task_names,
)
from ara_cli.session import session


def command(
    model: Annotated[str, typer.Argument(help=DecomposeConfig.model_fields["model"].description, metavar="MODEL")],
    keep: Annotated[list[float] | None, field(AllocateConfig, "keep", "--keep", metavar="FLOAT")] = None,
    remove: Annotated[float | None, typer.Option(help="fraction to remove instead: --remove 0.2 is --keep 0.8")] = None,
    method: Annotated[str, field(AllocateConfig, "method", "--method", "-m")] = default(AllocateConfig, "method"),
    decomposition: Annotated[str, field(DecomposeConfig, "method", "--decomposition")] = default(
        DecomposeConfig, "method"
    ),
    layout: Annotated[str, field(AllocateConfig, "layout", metavar="factors|pivoted")] = default(
        AllocateConfig, "layout"
    ),
    rank_multiple: Annotated[int, field(AllocateConfig, "rank_multiple")] = default(AllocateConfig, "rank_multiple"),
    text: Annotated[str, field(DecomposeConfig, "text", metavar="TEXT")] = default(DecomposeConfig, "text"),
    samples: Annotated[int, field(DecomposeConfig, "samples")] = default(DecomposeConfig, "samples"),
    rank_samples: Annotated[int, field(AllocateConfig, "samples", "--rank-samples")] = default(
        AllocateConfig, "samples"
    ),
    held_out: Annotated[int, field(AllocateConfig, "held_out")] = default(AllocateConfig, "held_out"),
    seq_len: Annotated[int, field(DecomposeConfig, "seq_len")] = default(DecomposeConfig, "seq_len"),
    seed: Annotated[int, field(DecomposeConfig, "seed")] = default(DecomposeConfig, "seed"),
    tasks: Annotated[str, field(EvalConfig, "tasks")] = ",".join(default(EvalConfig, "tasks")),
    eval_seq_len: Annotated[int | None, field(EvalConfig, "seq_len", "--eval-seq-len")] = None,
    max_windows: Annotated[int | None, field(EvalConfig, "max_windows")] = None,
    limit: Annotated[int | None, field(EvalConfig, "limit")] = None,
    prompt: Annotated[str | None, field(EvalConfig, "prompt")] = None,
    device: Annotated[str, field(DecomposeConfig, "device")] = default(DecomposeConfig, "device"),
    dtype: Annotated[str, field(DecomposeConfig, "dtype")] = default(DecomposeConfig, "dtype"),
    revision: Annotated[str | None, field(DecomposeConfig, "revision")] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="stop after the checkpoint")] = False,
    workspace: WorkspaceOption = WORKSPACE,
    force: ForceOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Decompose, allocate, truncate and evaluate MODEL, resuming what is done. --keep may be repeated."""
    with session(workspace, quiet, as_json, force) as s:
        placement = {"device": device, "dtype": dtype}
        decompose_config = build(
            DecomposeConfig,
            model=model,
            method=decomposition,
            text=text,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            revision=revision,
            **placement,
        )
        keeps = [keep_of(value, remove, None) for value in (keep or (None,))]
        allocate_configs = [
            build(
                AllocateConfig,
                method=method,
                layout=layout,
                rank_multiple=rank_multiple,
                keep=default(AllocateConfig, "keep") if value is None else value,
                samples=rank_samples,
                held_out=held_out,
                seed=seed,
                **placement,
            )
            for value in dict.fromkeys(keeps)
        ]
        later: dict[str, StageConfig] = {"truncate": TruncateConfig()}
        if not no_eval:
            later["eval"] = build(
                EvalConfig,
                tasks=task_names(tasks),
                seq_len=eval_seq_len,
                max_windows=max_windows,
                limit=limit,
                prompt=prompt,
                **placement,
            )
        from ara.stages.run import run_pipeline
        from ara_cli.render import show_pipeline

        views = run_pipeline(decompose_config, allocate_configs, later, s.run())
        show_pipeline(s.console, views, workspace)
