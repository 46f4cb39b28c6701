"""``ara eval``."""

from __future__ import annotations

from typing import Annotated

import typer

from ara.config import EvalConfig
from ara_cli.options import NameOption, WhichCheckpoint, WhichExport, stage_and_name
from ara_cli.session import Session
from ara_cli.signature import command_line

_AFTER = {
    "tasks": ("checkpoint", "origin", "beside"),
    "max_windows": ("include_path",),
    "batch_size": ("name",),
    "backend": ("export",),
}


@command_line(after=_AFTER, several=True)
def command(
    *,
    config: EvalConfig,
    which: Annotated[WhichCheckpoint, "to measure"],
    exported: Annotated[WhichExport, "measures"],
    beside: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE/NAME", help="measure this checkpoint as well; may be repeated"),
    ] = None,
    name: NameOption = None,
    s: Session,
) -> None:
    """Measure the dense model, uniform ranks and the compressed model side by side, in one run."""
    from ara.stages.evaluate import evaluate
    from ara_cli.render import show_end
    from ara_cli.render_eval import show_evaluation
    from export.find import find_for_eval
    from export.targets import runtime_of

    find = find_for_eval(config.backend, exported.asked(config.backend))
    others = [stage_and_name("--beside", key) for key in beside or ()]
    runtime = runtime_of(config.backend)
    view = evaluate(
        config, s.run(), checkpoint=which.asked, beside=others, name=name, find_export=find, runtime=runtime
    )
    show_evaluation(s.console, view)
    show_end(s.console, view, s.root)
