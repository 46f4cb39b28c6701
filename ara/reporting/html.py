"""From a report to one HTML file that needs nothing else: no script, no network, no font.

The template engine escapes every text, except what is made here or drawn by :mod:`ara.reporting.charts`. Invisible
control characters are removed from the whole page, pictures included.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from ara.artifacts.evaluation import EMPTY_TEXT
from ara.printable import printable
from ara.reporting import charts, tables
from ara.reporting.document import Report
from ara.reporting.summary import machine_words, recovery_words, rounding_words, runtime_words
from ara.version import __version__

if TYPE_CHECKING:
    from jinja2 import Template

# At the start of every page: it identifies a file as a report.
MARK = '<meta name="generator" content="ara report">'
_PAPER = "https://arxiv.org/abs/2510.19389"


def page(report: Report) -> str:
    """Return the page of a report."""
    text = _template().render(report=report, pictures=_pictures(report), paper=_PAPER, version=__version__)
    return printable(text)


def _pictures(report: Report) -> dict[str, object]:
    """Return every picture whose figures are known."""
    drawn: dict[str, object] = {}
    if report.layers:
        drawn["ranks"] = charts.rank_map(report.layers)
        drawn["spectra"] = charts.spectra(report.layers)
    if report.training is not None:
        drawn["training"] = charts.training_curves(report.training)
    if report.speed_front is not None:
        drawn["speed"] = charts.speed_front(report.speed_front)
    drawn["sizes"] = [charts.size_front(front, f"sizes-{number}") for number, front in enumerate(report.size_fronts)]
    drawn["fronts"] = [charts.keep_front(front, f"front-{number}") for number, front in enumerate(report.fronts)]
    return drawn


@cache
def _template() -> Template:
    # Deferred import: writing a checkpoint does not need it.
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
    environment.globals.update(recovery_words=recovery_words, rounding_words=rounding_words, empty_text=EMPTY_TEXT)
    return environment.get_template("report.html")
