"""``ara quantise``."""

from __future__ import annotations

from typing import Annotated

from ara.config import QuantiseConfig
from ara_cli.options import NameOption, WhichCheckpoint
from ara_cli.session import Session
from ara_cli.signature import command_line


@command_line()
def command(
    *,
    config: QuantiseConfig,
    which: Annotated[WhichCheckpoint, "to round"],
    name: NameOption = None,
    s: Session,
) -> None:
    """Round the matrices of a compressed checkpoint to few bits and write a further one.

    Rounding errors of one weight are made up for by others, on calibration text. Embedding and head stay, unless they
    get bits of their own.
    """
    from ara.stages.quantise import quantise
    from ara_cli.render import show_checkpoint, show_end

    view = quantise(config, s.run(), checkpoint=which.asked, name=name)
    show_checkpoint(s.console, view)
    show_end(s.console, view, s.root)
