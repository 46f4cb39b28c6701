"""Parts of the report about the checkpoint and how it was made: dense model, factors, ranks, sizes, commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ara.artifacts.base import Number
from ara.artifacts.checkpoint import RecoveryFigures, RoundingFigures
from ara.artifacts.factors import LayerShape
from ara.layout_names import LayoutName
from ara.reporting.part import Part


class Base(Part):
    """The dense model; ``requested`` is the name that the user typed, ``fingerprint`` identifies its weights."""

    name: str
    requested: str
    kind: str
    architecture: str | None
    revision: str | None
    fingerprint: str


class Decomposed(Part):
    """The factors; ``windows`` is (count, tokens) of the calibration text."""

    name: str
    method: str
    text: str | None
    origin: str | None
    windows: tuple[int, int] | None
    dtype: str | None
    seed: int | None


class Kind(Part):
    """Layers of one kind: (m, n), how many, how many of them dense, the ranks of the others, share kept."""

    kind: str
    shape: tuple[int, int]
    layers: int
    dense: int
    rank_min: int | None
    rank_mean: float | None
    rank_max: int | None
    keep: float


class Guard(Part):
    """Losses of the candidates on held-out calibration text, and the chosen one.

    ``behind`` is each candidate's loss less the winner's, ``stderr`` the standard error of this difference.
    """

    winner: str
    held_out: Mapping[str, float | None]
    behind: Mapping[str, float | None]
    stderr: Mapping[str, float | None]


class Latency(Part):
    """Times of the factorised layers, from which the ranks were chosen; nanoseconds.

    Attributes:
        library, device, precision, threads: where and how layers were timed.
        tokens: in the input of a timed layer.
        limit_ns: the budget.
    """

    library: str
    device: str
    precision: str
    threads: int
    tokens: int
    dense_ns: int
    limit_ns: int
    predicted_ns: int


class Allocated(Part):
    """The ranks.

    Attributes:
        keep: budget that was asked for, a share of the parameters; ``None`` for other budgets.
        latency: ``None`` unless the budget was one of time.
    """

    name: str
    method: str
    keep: float | None
    layout: LayoutName
    linear_parameters_dense: int
    linear_parameters: int
    linear_keep: float
    model_parameters_dense: int
    model_parameters: int
    model_keep: float
    kinds: tuple[Kind, ...]
    guard: Guard | None
    latency: Latency | None = None


class Stored(Part):
    """The checkpoint.

    Attributes:
        disk_keep: ``disk_bytes`` as a share of the dense model's weights.
        recovery: ``None`` if it was only truncated.
        rounding: ``None`` if it was not rounded to few bits.
        recovery_after_rounding: ``None`` if it was not repaired after that.
    """

    name: str
    dtype: str
    densified: bool
    low_rank_layers: int
    dense_layers: int
    dense_weight_bytes: int
    disk_bytes: int
    disk_keep: float
    recovery: RecoveryFigures | None = None
    rounding: RoundingFigures | None = None
    recovery_after_rounding: RecoveryFigures | None = None


@dataclass(frozen=True)
class Layer(LayerShape):
    """One factorised layer.

    Attributes:
        rank: kept; ``None`` when it stays dense.
        keep: share of its parameters that stays.
        left: share of the sum of its spectrum that is cut off: its squared error, in the metric of the decomposition.
        components: indices of the components that ``spectrum`` lists, from 1 to r.
        spectrum: their values, as shares of the sum over all components.
    """

    rank: int | None
    keep: Number
    left: Number
    components: tuple[int, ...]
    spectrum: tuple[Number, ...]


class Work(Part):
    """One stage of the chain, and the command that repeats it."""

    key: str
    id: str
    created: str
    command: str
    device: str | None
    dtype: str | None
    seconds: float
    peak_memory_bytes: int
