"""The kind ``comparison``: all allocators on the same factors, budget and text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ara.artifacts.base import LEFT_OUT, Count, Number, Part, Rank, Results, Settings, Share
from ara.layout_names import DEFAULT_LAYOUT, LayoutName

PICTURE_FILE = "ranks.svg"


@dataclass(frozen=True)
class ComparisonSettings(Settings):
    """The settings that the report reads."""

    keep: Share
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
        dense_layers: factorised layers that stay dense.
        seconds, backward_passes: spent on allocating.
        held_out: loss on held-out calibration text, nats per token.
        tasks: text → figures.
        error: why the allocator failed.
    """

    ranks: Mapping[str, Rank] | None = field(default=None, metadata=LEFT_OUT)
    linear_keep: Number | None = field(default=None, metadata=LEFT_OUT)
    dense_layers: Count | None = field(default=None, metadata=LEFT_OUT)
    seconds: Number | None = field(default=None, metadata=LEFT_OUT)
    backward_passes: Count | None = field(default=None, metadata=LEFT_OUT)
    held_out: Number | None = field(default=None, metadata=LEFT_OUT)
    tasks: Mapping[str, ComparedText] | None = field(default=None, metadata=LEFT_OUT)
    model_keep: Number | None = field(default=None, metadata=LEFT_OUT)
    error: str | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class ComparisonResults(Results):
    """Results of ``ara compare``.

    Attributes:
        methods: the dense model, then every allocator, by name.
        training: name of the training that ``ara`` used.
    """

    Settings = ComparisonSettings
    methods: Mapping[str, ComparedMethod] = field(default_factory=dict)
    training: str | None = None
