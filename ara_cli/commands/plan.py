"""``ara plan``."""

from __future__ import annotations

from ara.config import PlanConfig
from ara_cli.session import Session
from ara_cli.signature import command_line


@command_line(after={"dtype": ("revision",)}, without=("force", "offload"))
def command(*, config: PlanConfig, s: Session) -> None:
    """Say what compressing MODEL will take, from its config alone: memory, disk, FLOPs and time of every stage."""
    from ara.planning.plan import make_plan
    from ara_cli.render_plan import show_plan

    show_plan(s.console, make_plan(config, s.root, s.console))
