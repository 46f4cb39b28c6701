"""The names of the layouts, without their classes: :mod:`ara.layouts` says what each is, and imports torch."""

from __future__ import annotations

from typing import Literal, get_args

LayoutName = Literal["factors", "pivoted"]
LAYOUT_NAMES: tuple[LayoutName, ...] = get_args(LayoutName)
# The layout of a result that names none; a result in another layout carries its name.
DEFAULT_LAYOUT: LayoutName = "factors"
