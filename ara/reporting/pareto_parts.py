"""Parts of the report about checkpoints of the same factors: perplexity against size, quality against speed."""

from __future__ import annotations

from typing import Literal

from ara.artifacts.evaluation import SpreadFigures
from ara.reporting.part import Part


class FrontPoint(Part):
    """One model on a perplexity-against-keep front; ``current`` marks the checkpoint of the report."""

    checkpoint: str
    series: str
    linear_keep: float
    model_keep: float
    perplexity: float
    current: bool


class Front(Part):
    """All checkpoints of the same factors on the same windows of one text."""

    task: str
    windows: int
    seq_len: int
    dtype: str | None
    dense: float
    points: tuple[FrontPoint, ...]


class SpeedPoint(Part):
    """One model on a quality-against-speed front; ``ratio`` is speed relative to the dense model of the same run."""

    checkpoint: str
    series: str
    ratio: SpreadFigures
    quality: float
    stderr: float | None
    current: bool


class SpeedFront(Part):
    """Quality against speed; ``measure`` says which quality, ``speed`` which speed."""

    measure: Literal["accuracy", "perplexity"]
    task: str
    speed: str
    points: tuple[SpeedPoint, ...]
