"""Layouts: how a low-rank layer is stored, and what a rank costs; each layout is one file and one line here."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from ara.registry import Entry, Registry

if TYPE_CHECKING:
    from ara.layouts.base import Layout

# A title completes "layers are stored as …".
LAYOUTS = Registry(
    "layout",
    [
        Entry("factors", "two thin matrices each", "ara.layouts.factors:FactorsLayout"),
        Entry(
            "pivoted",
            "some of their rows, the others as combinations of those",
            "ara.layouts.pivoted:PivotedLayout",
            "PIFA, arXiv 2501.19090",
        ),
    ],
)


@cache
def layout_named(name: str) -> Layout:
    """Return the layout called ``name``.

    Raises:
        UsageError: there is none.
    """
    layout: Layout = LAYOUTS.load(name)()
    return layout
