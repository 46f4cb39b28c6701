"""The report as data: ``report.json``, from which the HTML page and the model card are made.

Sizes are counts of parameters or bytes, times are in seconds, losses in nats per token, shares are fractions of 1.
A figure that was not measured is ``None`` or an empty tuple. The parts are in the ``*_parts`` modules of this package.
Parts that hold just what a stage has written are the dataclasses of :mod:`ara.artifacts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ara.artifacts.report import MissingPart
from ara.reporting.benchmark_parts import Benched
from ara.reporting.checkpoint_parts import Allocated, Base, Decomposed, Layer, Stored, Work
from ara.reporting.comparison_parts import Compared, SizeFront
from ara.reporting.evaluation_parts import Evaluated
from ara.reporting.export_parts import Exported
from ara.reporting.pareto_parts import Front, SpeedFront
from ara.reporting.part import Part
from ara.reporting.training_parts import Trained

REPORT_FORMAT: Literal[3] = 3


class Report(Part):
    """The whole document, made by :mod:`ara.reporting.gather`."""

    format_version: Literal[3] = REPORT_FORMAT
    title: str
    verdict: str
    base: Base
    decomposition: Decomposed
    allocation: Allocated
    checkpoint: Stored
    layers: tuple[Layer, ...] = ()
    training: Trained | None = None
    evaluations: tuple[Evaluated, ...] = ()
    benches: tuple[Benched, ...] = ()
    fronts: tuple[Front, ...] = ()
    speed_front: SpeedFront | None = None
    comparisons: tuple[Compared, ...] = ()
    size_fronts: tuple[SizeFront, ...] = ()
    exports: tuple[Exported, ...] = ()
    work: tuple[Work, ...]
    versions: Mapping[str, tuple[str, ...]]
    missing: tuple[MissingPart, ...] = ()
