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
)
from ara_cli.session import session

_C = AllocateConfig


def command(
    keep: Annotated[float | None, field(_C, "keep")] = None,
    remove: Annotated[float | None, typer.Option(help="fraction to remove instead: --remove 0.2 is --keep 0.8")] = None,
    method: Annotated[str, field(_C, "method", "--method", "-m")] = default(_C, "method"),
    option: Annotated[list[str] | None, field(_C, "options", "--option", "-O", metavar="NAME=VALUE")] = None,
    rank_multiple: Annotated[int, field(_C, "rank_multiple")] = default(_C, "rank_multiple"),
    min_rank: Annotated[int, field(_C, "min_rank")] = default(_C, "min_rank"),
    ranks: Annotated[
        Path | None,
        typer.Option(help="take the ranks from this (edited) ranks.json instead of a method", metavar="FILE"),
    ] = None,
    factors: Annotated[str | None, typer.Option(help="decomposition to cut [default: the latest]")] = None,
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
            rank_multiple=rank_multiple,
            min_rank=min_rank,
        )
        from ara.stages.allocate import allocate
        from ara_cli.render import show_allocation, show_end

        view = allocate(config, s.run(), factors=factors, name=name, ranks=ranks)
        show_allocation(s.console, view)
        show_end(s.console, view, workspace)
