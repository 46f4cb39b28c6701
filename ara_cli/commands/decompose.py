"""``ara decompose``."""

from __future__ import annotations

from typing import Annotated

import typer

from ara.config import DecomposeConfig
from ara_cli.session import Session
from ara_cli.signature import command_line


@command_line(after={"dtype": ("moment_memory", "revision")}, several=True)
def command(
    *,
    config: DecomposeConfig,
    name: Annotated[str | None, typer.Option(help="name of the result [default: the method]")] = None,
    s: Session,
) -> None:
    """Factor every linear layer of MODEL once. All later budgets reuse these factors."""
    from ara.stages.decompose import decompose
    from ara_cli.render import show_decomposition, show_end

    view = decompose(config, s.run(), name)
    show_decomposition(s.console, view)
    show_end(s.console, view, s.root)
