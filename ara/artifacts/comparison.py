"""The kind ``comparison``: all allocators at one budget, or all forms of a model at some sizes, on the same factors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ara.artifacts.base import LEFT_OUT, Count, Number, Part, Rank, Results, Settings, Share
from ara.config.latency import Objective
from ara.layout_names import DEFAULT_LAYOUT, LayoutName

PICTURE_FILE = "ranks.svg"
SIZES_PICTURE_FILE = "sizes.svg"
# Two losses count as different from this many paired standard errors on.
SURE = 2.0


@dataclass(frozen=True)
class ComparisonSettings(Settings):
    """The settings that the report reads: a budget of parameters or time, or sizes of the weight files."""

    keep: Share | None = None
    objective: Objective = "parameters"
    size: tuple[str, ...] = ()
    layout: LayoutName = DEFAULT_LAYOUT


@dataclass(frozen=True)
class ComparedText(Part):
    """One allocation on one text.

    Attributes:
        nll: mean negative log-likelihood, nats per token.
        perplexity: exp(nll).
        window_nlls: of every window.
        gap_closed: (uniform − nll) / (uniform − dense); ``None`` without a gap or a uniform allocation.
    """

    nll: Number
    perplexity: Number
    window_nlls: tuple[Number, ...]
    gap_closed: Number | None = None


@dataclass(frozen=True)
class ComparedMethod(Part):
    """One allocator or the dense model. The dense model has only losses; an allocator that failed has only its error.

    Attributes:
        ranks: module path → rank or ``"dense"``.
        linear_keep, model_keep: share of the dense parameters kept.
        time_keep: share of the dense layers' predicted time, if the budget is one of time.
        dense_layers: factorised layers that stay dense.
        seconds, backward_passes: spent on allocating.
        held_out: loss on held-out calibration text, nats per token.
        tasks: text → figures.
        error: why the allocator failed.
    """

    ranks: Mapping[str, Rank] | None = field(default=None, metadata=LEFT_OUT)
    linear_keep: Number | None = field(default=None, metadata=LEFT_OUT)
    time_keep: Number | None = field(default=None, metadata=LEFT_OUT)
    dense_layers: Count | None = field(default=None, metadata=LEFT_OUT)
    seconds: Number | None = field(default=None, metadata=LEFT_OUT)
    backward_passes: Count | None = field(default=None, metadata=LEFT_OUT)
    held_out: Number | None = field(default=None, metadata=LEFT_OUT)
    tasks: Mapping[str, ComparedText] | None = field(default=None, metadata=LEFT_OUT)
    model_keep: Number | None = field(default=None, metadata=LEFT_OUT)
    error: str | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class SizedModel(Part):
    """One form of the model. One that does not fit its size has only the error.

    Attributes:
        title: of the form.
        size: that it was made for, as it was given; ``None`` for a dense model of one width.
        limit: bytes of that size.
        bytes: of the weight files.
        layers: bits per weight → number of layers.
        dense_layers: layers that are not factorised.
        held_out: loss on held-out calibration text, nats per token.
        window_nlls: of every window.
        recovered: levels that have repaired it, in order; empty if none helped, ``None`` if none was tried.
        error: why it was not measured.
    """

    title: str
    size: str | None = None
    limit: Count | None = None
    bytes: Count | None = field(default=None, metadata=LEFT_OUT)
    layers: Mapping[str, Count] | None = field(default=None, metadata=LEFT_OUT)
    dense_layers: Count | None = field(default=None, metadata=LEFT_OUT)
    held_out: Number | None = field(default=None, metadata=LEFT_OUT)
    window_nlls: tuple[Number, ...] = ()
    recovered: tuple[str, ...] | None = field(default=None, metadata=LEFT_OUT)
    error: str | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class ComparisonResults(Results):
    """Results of ``ara compare``: allocators at one budget, or models at some sizes.

    Attributes:
        methods: the dense model, then every allocator, by name.
        training: name of the training that ``ara`` used.
        models: form, or form and size → model.
    """

    Settings = ComparisonSettings
    methods: Mapping[str, ComparedMethod] = field(default_factory=dict)
    training: str | None = None
    models: Mapping[str, SizedModel] | None = field(default=None, metadata=LEFT_OUT)


def fitting(models: Iterable[SizedModel], size: str, limit: int) -> list[SizedModel]:
    """Return the measured models for a size, best first: those made for it, and dense ones that fit.

    Args:
        models: to choose from.
        size: as it was given.
        limit: its bytes.
    """
    measured = (model for model in models if model.held_out is not None and model.bytes is not None)
    found = [model for model in measured if model.size in (None, size) and (model.bytes or 0) <= limit]
    return sorted(found, key=lambda model: model.held_out or 0.0)


def best_in_words(models: Collection[SizedModel]) -> str:
    """Return a sentence: which model is best for which size, and which ones are as good within the noise."""
    limits = {model.size: model.limit for model in models if model.size is not None and model.limit is not None}
    found = [_best_for(size, fitting(models, size, limit)) for size, limit in limits.items()]
    return f"Best on held-out calibration text: {'; '.join(found)}."


def _best_for(size: str, models: Sequence[SizedModel]) -> str:
    if not models:
        return f"for {size} nothing fits"
    best, *others = models
    assert best.held_out is not None and best.bytes is not None
    level = [other.title for other in others if _within_noise(best, other)]
    equal = f"; no worse within {SURE:g} standard errors: {', '.join(level)}" if level else ""
    figures = f"perplexity {math.exp(best.held_out):,.4g}, {best.bytes / 1e6:,.4g} MB"
    return f"for {size} {best.title} ({figures}{equal})"


def _within_noise(best: SizedModel, other: SizedModel) -> bool:
    """Tell whether the losses of two models on the same windows differ by less than the noise."""
    if len(best.window_nlls) != len(other.window_nlls) or len(best.window_nlls) < 2:
        return False
    differences = [b - a for a, b in zip(best.window_nlls, other.window_nlls, strict=True)]
    stderr = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences) <= SURE * stderr
