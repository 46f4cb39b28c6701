"""``ara allocate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ara.config import AllocateConfig
from ara_cli.options import FactorsOption, NameOption, path_option
from ara_cli.session import Session
from ara_cli.signature import command_line


@command_line(after={"exclude": ("guard",)})
def command(
    *,
    config: AllocateConfig,
    ranks: Annotated[
        Path | None,
        path_option("--ranks", help="take the ranks from this (edited) ranks.json instead of a method", metavar="FILE"),
    ] = None,
    factors: FactorsOption = None,
    masks: Annotated[
        str | None, typer.Option(help="training that --method ara uses [default: at the nearest budget]")
    ] = None,
    name: NameOption = None,
    s: Session,
) -> None:
    """Give every layer a rank, or leave it dense, under one budget. Factors are only read, never computed again."""
    from ara.stages.allocate import allocate
    from ara_cli.render import show_allocation, show_end

    if ranks is not None and "keep" not in config.model_fields_set:
        # Ranks that were chosen by hand need no budget.
        config = config.model_copy(update={"keep": None})
    view = allocate(config, s.run(), factors=factors, name=name, ranks=ranks, masks=masks)
    show_allocation(s.console, view)
    show_end(s.console, view, s.root)
