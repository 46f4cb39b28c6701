"""``ara recover``."""

from __future__ import annotations

from typing import Annotated

from ara.config import RecoverConfig
from ara_cli.options import NameOption, WhichCheckpoint
from ara_cli.session import Session
from ara_cli.signature import command_line


@command_line(several=True)
def command(
    *,
    config: RecoverConfig,
    which: Annotated[WhichCheckpoint, "to repair"],
    name: NameOption = None,
    s: Session,
) -> None:
    """Repair the values of a compressed checkpoint and write a further one. Its ranks stay.

    Each level runs the ones before it, unless --only is given. A level that raises the divergence from the dense model
    on held-out text is taken back. Of a checkpoint that is rounded to few bits, the levels block and distill train the
    scales; its whole numbers stay.
    """
    from ara.stages.recover import recover
    from ara_cli.render import show_checkpoint, show_end

    view = recover(config, s.run(), checkpoint=which.asked, name=name, keep_on_interrupt=True)
    show_checkpoint(s.console, view)
    show_end(s.console, view, s.root)
