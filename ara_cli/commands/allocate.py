"""``ara allocate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ara.config import AllocateConfig, build
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
    pairs,
    path_option,
)
from ara_cli.session import session

_C = AllocateConfig


def command(
    keep: Annotated[float | None, field(_C, "keep")] = None,
    remove: Annotated[float | None, typer.Option(help="fraction to remove instead: --remove 0.2 is --keep 0.8")] = None,
    method: Annotated[str, field(_C, "method", "--method", "-m")] = default(_C, "method"),
    option: Annotated[list[str] | None, field(_C, "options", "--option", "-O", metavar="NAME=VALUE")] = None,
    layout: Annotated[str, field(_C, "layout", metavar="factors|pivoted")] = default(_C, "layout"),
    rank_multiple: Annotated[int, field(_C, "rank_multiple")] = default(_C, "rank_multiple"),
    min_rank: Annotated[int, field(_C, "min_rank")] = default(_C, "min_rank"),
    min_keep: Annotated[float, field(_C, "min_keep")] = default(_C, "min_keep"),
    exclude: Annotated[list[str] | None, field(_C, "exclude", metavar="PATTERN")] = None,
    guard: Annotated[bool, field(_C, "guard", "--guard/--no-guard")] = True,
    samples: Annotated[int, field(_C, "samples")] = default(_C, "samples"),
    held_out: Annotated[int, field(_C, "held_out")] = default(_C, "held_out"),
    batch_size: Annotated[int, field(_C, "batch_size")] = default(_C, "batch_size"),
    seed: Annotated[int, field(_C, "seed")] = default(_C, "seed"),
    device: Annotated[str, field(_C, "device")] = default(_C, "device"),
    dtype: Annotated[str, field(_C, "dtype")] = default(_C, "dtype"),
    ranks: Annotated[
        Path | None,
        path_option("--ranks", help="take the ranks from this (edited) ranks.json instead of a method", metavar="FILE"),
    ] = None,
    factors: Annotated[str | None, typer.Option(help="decomposition to cut [default: the latest]")] = None,
    masks: Annotated[
        str | None, typer.Option(help="training that --method ara uses [default: at the nearest budget]")
    ] = None,
    name: NameOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    force: ForceOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Give every layer a rank, or leave it dense, under one budget. Factors are only read, never computed again."""
    with session(workspace, quiet, as_json, force) as s:
        config = build(
            AllocateConfig,
            keep=keep_of(keep, remove, None if ranks else default(_C, "keep")),
            method=method,
            options=pairs(option),
            layout=layout,
            rank_multiple=rank_multiple,
            min_rank=min_rank,
            min_keep=min_keep,
            exclude=tuple(exclude or ()),
            guard=guard,
            samples=samples,
            held_out=held_out,
            batch_size=batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        from ara.stages.allocate import allocate
        from ara_cli.render import show_allocation, show_end

        view = allocate(config, s.run(), factors=factors, name=name, ranks=ranks, masks=masks)
        show_allocation(s.console, view)
        show_end(s.console, view, workspace)
