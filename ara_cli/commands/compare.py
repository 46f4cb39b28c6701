"""``ara compare``."""

from __future__ import annotations

from ara.config import CompareConfig
from ara_cli.options import LATENCY_OPTIONS, FactorsOption, MasksOption, NameOption
from ara_cli.session import Session
from ara_cli.signature import command_line


@command_line(after={"keep": ("remove", *LATENCY_OPTIONS)})
def command(
    *,
    config: CompareConfig,
    factors: FactorsOption = None,
    masks: MasksOption = None,
    name: NameOption = None,
    s: Session,
) -> None:
    """Measure all allocators side by side: same factors, same budget, same text, one run.

    With --objective latency the budget is a share of the layers' time, which is measured on this machine.

    With --size: measure dense models in fewer bits, ranks, and both together, and say which is best for which size.
    """
    from ara.stages.compare import compare
    from ara_cli.render import show_comparison, show_end
    from export.find import layers_in

    view = compare(config, s.run(), factors=factors, masks=masks, name=name, layers=layers_in(config))
    show_comparison(s.console, view)
    show_end(s.console, view, s.root)
