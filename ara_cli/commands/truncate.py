"""``ara truncate``."""

from __future__ import annotations

from typing import Annotated

import typer

from ara.config import TruncateConfig
from ara_cli.options import NameOption
from ara_cli.session import Session
from ara_cli.signature import command_line


@command_line(without=("offload",))
def command(
    *,
    allocation: Annotated[
        str | None, typer.Option(help="result of ara allocate to apply [default: the latest]")
    ] = None,
    config: TruncateConfig,
    name: NameOption = None,
    s: Session,
) -> None:
    """Cut the factors at the allocated ranks and write a checkpoint that transformers loads."""
    from ara.stages.truncate import truncate
    from ara_cli.render import show_checkpoint, show_end

    view = truncate(config, s.run(), allocation=allocation, name=name)
    show_checkpoint(s.console, view)
    show_end(s.console, view, s.root)
