"""``ara status``."""

from __future__ import annotations

from ara_cli.options import WORKSPACE, JsonOption, QuietOption, WorkspaceOption
from ara_cli.session import session


def command(workspace: WorkspaceOption = WORKSPACE, quiet: QuietOption = False, as_json: JsonOption = False) -> None:
    """Show what the workspace holds, what is stale or missing, and the next command."""
    with session(workspace, quiet, as_json) as s:
        from ara.workspace.store import Workspace
        from ara_cli.render import show_status

        show_status(s.console, Workspace.open(workspace))
