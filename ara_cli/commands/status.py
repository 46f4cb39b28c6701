"""``ara status``."""

from __future__ import annotations

from ara_cli.session import Session
from ara_cli.signature import command_line


@command_line(without=("force", "offload"))
def command(*, s: Session) -> None:
    """Show what the workspace holds, what is stale or missing, and the next command."""
    from ara.workspace.store import Workspace
    from ara_cli.render import show_status

    show_status(s.console, Workspace.open(s.root))
