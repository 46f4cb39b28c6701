"""From a report to one HTML file that needs nothing else: no script, no network, no font.

Every text is escaped by the template engine. What is not escaped is made here or drawn by :mod:`ara.reporting.charts`.
Characters that do not show but steer are taken out of the whole page at once, pictures included.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from ara.printable import printable
from ara.reporting import charts, tables
from ara.reporting.document import Report
from ara.reporting.summary import machine_words, runtime_words
from ara.version import __version__

if TYPE_CHECKING:
    from jinja2 import Template

# In the front of every page: by this a file is known to be a report.
MARK = '<meta name="generator" content="ara report">'
_PAPER = "https://arxiv.org/abs/2510.19389"


def page(report: Report) -> str:
    """Return the page of a report."""
    text = _template().render(report=report, pictures=_pictures(report), paper=_PAPER, version=__version__)
    return printable(text)


def _pictures(report: Report) -> dict[str, object]:
    """Return every picture that there are figures for."""
    drawn: dict[str, object] = {}
    if report.layers:
        drawn["ranks"] = charts.rank_map(report.layers)
        drawn["spectra"] = charts.spectra(report.layers)
    if report.training is not None:
        drawn["training"] = charts.training_curves(report.training)
    if report.speed_front is not None:
        drawn["speed"] = charts.speed_front(report.speed_front)
    drawn["fronts"] = [charts.keep_front(front, f"front-{number}") for number, front in enumerate(report.fronts)]
    return drawn


@cache
def _template() -> Template:
    # Imported late: a checkpoint is written without it.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ara.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = [name for name in vars(tables) if name.endswith(("_table", "_tables"))]
    environment.globals.update({name: getattr(tables, name) for name in names})
    environment.globals.update(mark=MARK, runtime_words=runtime_words, machine_words=machine_words)
    return environment.get_template("report.html")
