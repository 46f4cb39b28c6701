"""Parts of the report about ``ara compare``: allocators at one budget, forms of the model at several sizes."""

from __future__ import annotations

from collections.abc import Mapping

from ara.config.latency import Objective
from ara.layout_names import LayoutName
from ara.reporting.part import Part


class AllocatorRow(Part):
    """One allocator of a comparison; ``error`` says why it failed.

    ``linear_keep`` is the share of the parameters that it keeps, and ``time_keep`` that of the predicted time, if the
    budget is one of time.
    """

    linear_keep: float | None
    time_keep: float | None
    held_out: float | None
    perplexity: Mapping[str, float]
    gap_closed: Mapping[str, float | None]
    dense_layers: int | None
    seconds: float | None
    backward_passes: int | None
    error: str | None


class Compared(Part):
    """One result of ``ara compare --keep``; ``objective`` says what the budget is a share of."""

    name: str
    keep: float
    objective: Objective
    layout: LayoutName
    tasks: tuple[str, ...]
    methods: Mapping[str, AllocatorRow]


class SizedPoint(Part):
    """One form of the model.

    ``size`` is what it was made for, as it was given; ``None`` for a dense model of one width. ``recovered`` has the
    levels that have repaired it; ``None`` if none was tried. A form that does not fit has only its ``error``.
    """

    title: str
    size: str | None
    bytes: int | None
    layers: Mapping[str, int] | None
    dense_layers: int | None
    held_out: float | None
    perplexity: float | None
    recovered: tuple[str, ...] | None = None
    error: str | None


class SizeFront(Part):
    """One result of ``ara compare --size``; ``verdict`` says which form is best for which size."""

    name: str
    layout: LayoutName
    verdict: str
    points: tuple[SizedPoint, ...]
