"""The names of the layouts. Their classes are in :mod:`ara.layouts`, which imports torch."""

from __future__ import annotations

from typing import Literal, get_args

LayoutName = Literal["factors", "pivoted"]
LAYOUT_NAMES: tuple[LayoutName, ...] = get_args(LayoutName)
# The names of results in other layouts end in the layout's name.
DEFAULT_LAYOUT: LayoutName = "factors"
