"""The kind ``ranks``: a rank, or dense, for every factorised layer, and the resulting sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, Strict, StrictBool

from ara.artifacts.base import LEFT_OUT, Count, Least1, Number, Part, Results, Settings, Share
from ara.config.latency import Objective
from ara.layout_names import DEFAULT_LAYOUT, LayoutName
from ara.workspace.view import StageView

if TYPE_CHECKING:
    from ara.models.weights import LinearSpec
    from ara.solver.problem import Allocation


@dataclass(frozen=True)
class RanksSettings(Settings):
    """The settings that later stages read; see :class:`ara.config.AllocateConfig`."""

    method: str
    rank_multiple: Least1
    min_rank: Least1
    min_keep: Annotated[float, Strict(), Field(ge=0, le=1)]
    exclude: tuple[str, ...]
    layout: LayoutName = DEFAULT_LAYOUT
    keep: Share | None = None
    objective: Objective = "parameters"
    ranks_sha256: str | None = None


@dataclass(frozen=True)
class KindRanks(Part):
    """Layers of one kind.

    Attributes:
        layers: count.
        shape: (m, n) of each.
        dense: count of layers that stay dense.
        rank_min, rank_mean, rank_max: over the other layers; ``None`` without any.
        keep: share of their dense parameters kept.
    """

    layers: Count
    shape: tuple[Least1, ...]
    dense: Count
    rank_min: Least1 | None
    rank_mean: Number | None
    rank_max: Least1 | None
    keep: Number


@dataclass(frozen=True)
class GuardResults(Part):
    """Losses that the guard measured on held-out calibration text; see :class:`ara.allocation.guard.Verdict`.

    A candidate with a loss of NaN or infinity has ``None``.
    """

    winner: str
    held_out: Mapping[str, Number | None]
    stderr: Mapping[str, Number | None]

    @classmethod
    def of(cls, winner: str, held_out: Mapping[str, float], stderr: Mapping[str, float | None]) -> GuardResults:
        """Return a verdict as it can be written in JSON."""
        return cls(winner, _finite(held_out), _finite(stderr))


@dataclass(frozen=True)
class SizeResults(Part):
    """Bytes of the checkpoint after ``ara quantise``.

    Attributes:
        limit: of the weight files.
        linear, others: of the factorised layers, and of all other tensors and headers.
        layers: bits per weight → number of layers.
        block, zero_points: grid of few bits; the block of layers for which ranks.json names no other.
        blocks: weights per scale → number of layers with few bits; ``None`` if there was no choice.
        embedding_bits: bits per weight of the embedding and the head; ``None`` if they are not rounded.
    """

    limit: Count
    linear: Count
    others: Count
    layers: Mapping[str, Count]
    block: Count
    zero_points: StrictBool
    embedding_bits: Count | None = field(default=None, metadata=LEFT_OUT)
    blocks: Mapping[str, Count] | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class ShapeLatency(Part):
    """Measured times of the layers of one shape, nanoseconds.

    Attributes:
        shape: (m, n).
        dense: of the dense layer.
        ranks: rank → time; between them times are linear in the rank.
    """

    shape: tuple[Least1, ...]
    dense: Least1
    ranks: Mapping[str, Least1]


@dataclass(frozen=True)
class LatencyResults(Part):
    """Times of the factorised layers for a budget of time.

    Attributes:
        backend, device, precision, threads, library: where and how layers were timed.
        machine: see :func:`ara.environment.machine`.
        tokens: in the input of a timed layer.
        dense_ns: all layers dense, nanoseconds.
        limit_ns: the budget.
        predicted_ns: all layers at the chosen ranks.
        shapes: what was measured.
    """

    backend: str
    device: str
    precision: str
    threads: Least1
    library: str
    machine: Mapping[str, Any]
    tokens: Least1
    dense_ns: Least1
    limit_ns: Least1
    predicted_ns: Least1
    shapes: tuple[ShapeLatency, ...]

    @property
    def share(self) -> float:
        """Predicted time, as a share of the dense layers'."""
        return self.predicted_ns / self.dense_ns


@dataclass(frozen=True)
class RanksResults(Results):
    """Results of ``ara allocate``; parameters are counts, ``keep`` is a share of the dense ones.

    Attributes:
        linear_parameters_dense, linear_parameters, linear_keep: of the factorised layers.
        model_parameters_dense, model_parameters, model_keep: of the whole model.
        dense_layers: factorised layers that stay dense.
        kinds: by kind of layer, such as ``mlp.up_proj``.
        guard: ``None`` if the guard did not run.
        size: ``None`` unless the budget is one of bytes.
        latency: ``None`` unless the budget is one of time.
    """

    Settings = RanksSettings
    linear_parameters_dense: Count
    linear_parameters: Count
    linear_keep: Number
    model_parameters_dense: Count
    model_parameters: Count
    model_keep: Number
    dense_layers: Count
    kinds: Mapping[str, KindRanks]
    guard: GuardResults | None = None
    size: SizeResults | None = field(default=None, metadata=LEFT_OUT)
    latency: LatencyResults | None = field(default=None, metadata=LEFT_OUT)


def layout_of(ranks: StageView) -> LayoutName:
    """Return the layout of an allocation, which determines its parameter counts."""
    return RanksSettings.read(ranks).layout


def read_allocation(ranks: StageView, specs: Sequence[LinearSpec]) -> Allocation:
    """Return the ranks of a finished allocation for its layers."""
    from ara.artifacts.ranks_file import RANKS_FILE, read_ranks

    return read_ranks(ranks.path / RANKS_FILE, specs)


def _finite(losses: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: loss if loss is not None and math.isfinite(loss) else None for name, loss in losses.items()}
