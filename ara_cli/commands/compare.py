"""``ara compare``."""

from __future__ import annotations

from typing import Annotated

import typer

from ara.config import CompareConfig
from ara_cli.options import FactorsOption, NameOption
from ara_cli.session import Session
from ara_cli.signature import command_line


@command_line()
def command(
    *,
    config: CompareConfig,
    factors: FactorsOption = None,
    masks: Annotated[str | None, typer.Option(help="training that ara uses [default: at the nearest budget]")] = None,
    name: NameOption = None,
    s: Session,
) -> None:
    """Measure all allocators side by side: same factors, same budget, same text, one run."""
    from ara.stages.compare import compare
    from ara_cli.render import show_comparison, show_end

    view = compare(config, s.run(), factors=factors, masks=masks, name=name)
    show_comparison(s.console, view)
    show_end(s.console, view, s.root)
