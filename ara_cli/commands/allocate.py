"""``ara allocate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ara.config import AllocateConfig
from ara_cli.options import LATENCY_OPTIONS, FactorsOption, MasksOption, NameOption, path_option
from ara_cli.session import Session
from ara_cli.signature import command_line


@command_line(after={"exclude": ("guard",), "keep": ("remove", *LATENCY_OPTIONS)}, several=True)
def command(
    *,
    config: AllocateConfig,
    ranks: Annotated[
        Path | None,
        path_option("--ranks", help="take the ranks from this (edited) ranks.json; no method is run", metavar="FILE"),
    ] = None,
    factors: FactorsOption = None,
    masks: MasksOption = None,
    name: NameOption = None,
    s: Session,
) -> None:
    """Give every layer a rank, or leave it dense, within one budget. The factors are only read, not computed again.

    With --objective latency the budget is a share of the layers' time, which is measured on this machine.
    """
    from ara.stages.allocate import allocate
    from ara_cli.render import show_allocation, show_end
    from export.find import layers_in

    if ranks is not None and "keep" not in config.model_fields_set:
        # Ranks that were chosen by hand need no budget.
        config = config.model_copy(update={"keep": None})
    view = allocate(config, s.run(), factors=factors, name=name, ranks=ranks, masks=masks, layers=layers_in(config))
    show_allocation(s.console, view)
    show_end(s.console, view, s.root)
