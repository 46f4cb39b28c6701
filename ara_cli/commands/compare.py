"""``ara compare``."""

from __future__ import annotations

from typing import Annotated

import typer

from ara.config import CompareConfig, build
from ara_cli.options import (
    WORKSPACE,
    ForceOption,
    JsonOption,
    NameOption,
    QuietOption,
    WorkspaceOption,
    default,
    field,
    keep_of,
    task_names,
)
from ara_cli.session import session

_C = CompareConfig


def command(
    keep: Annotated[float | None, field(_C, "keep")] = None,
    remove: Annotated[float | None, typer.Option(help="fraction to remove instead: --remove 0.2 is --keep 0.8")] = None,
    methods: Annotated[str | None, field(_C, "methods", metavar="NAMES")] = None,
    tasks: Annotated[str, field(_C, "tasks", metavar="TASKS")] = ",".join(default(_C, "tasks")),
    eval_seq_len: Annotated[int | None, field(_C, "eval_seq_len")] = None,
    max_windows: Annotated[int | None, field(_C, "max_windows")] = None,
    eval_batch_size: Annotated[int, field(_C, "eval_batch_size")] = default(_C, "eval_batch_size"),
    layout: Annotated[str, field(_C, "layout", metavar="factors|pivoted")] = default(_C, "layout"),
    rank_multiple: Annotated[int, field(_C, "rank_multiple")] = default(_C, "rank_multiple"),
    min_rank: Annotated[int, field(_C, "min_rank")] = default(_C, "min_rank"),
    min_keep: Annotated[float, field(_C, "min_keep")] = default(_C, "min_keep"),
    exclude: Annotated[list[str] | None, field(_C, "exclude", metavar="PATTERN")] = None,
    samples: Annotated[int, field(_C, "samples")] = default(_C, "samples"),
    held_out: Annotated[int, field(_C, "held_out")] = default(_C, "held_out"),
    batch_size: Annotated[int, field(_C, "batch_size")] = default(_C, "batch_size"),
    seed: Annotated[int, field(_C, "seed")] = default(_C, "seed"),
    device: Annotated[str, field(_C, "device")] = default(_C, "device"),
    dtype: Annotated[str, field(_C, "dtype")] = default(_C, "dtype"),
    factors: Annotated[str | None, typer.Option(help="decomposition to cut [default: the latest]")] = None,
    masks: Annotated[str | None, typer.Option(help="training that ara uses [default: at the nearest budget]")] = None,
    name: NameOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    force: ForceOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure all allocators side by side: same factors, same budget, same text, one run."""
    with session(workspace, quiet, as_json, force) as s:
        config = build(
            CompareConfig,
            keep=keep_of(keep, remove, default(_C, "keep")),
            methods=task_names(methods, "--methods", "allocator", "uniform,ara") if methods else (),
            tasks=task_names(tasks),
            eval_seq_len=eval_seq_len,
            max_windows=max_windows,
            eval_batch_size=eval_batch_size,
            layout=layout,
            rank_multiple=rank_multiple,
            min_rank=min_rank,
            min_keep=min_keep,
            exclude=tuple(exclude or ()),
            samples=samples,
            held_out=held_out,
            batch_size=batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        from ara.stages.compare import compare
        from ara_cli.render import show_comparison, show_end

        view = compare(config, s.run(), factors=factors, masks=masks, name=name)
        show_comparison(s.console, view)
        show_end(s.console, view, workspace)
