"""The kind ``benchmark``: speed, memory and size of the dense and the compressed model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import StrictBool

from ara.artifacts.base import LEFT_OUT, Count, Least1, Number, Part, Results, Settings
from ara.artifacts.evaluation import SpreadFigures


@dataclass(frozen=True)
class BenchmarkSettings(Settings):
    """The settings that tables read."""

    rounds: Least1


@dataclass(frozen=True)
class ModelCost(Part):
    """Sizes of one model: weights in memory, files on disk, and peak memory of the process that ran it."""

    parameters: Count
    weight_bytes: Count
    disk_bytes: Count
    peak_memory_bytes: Count | None


@dataclass(frozen=True)
class Percentiles(Part):
    """Median, 10th and 90th percentile over rounds."""

    median: Number
    p10: Number
    p90: Number


@dataclass(frozen=True)
class RatioFigures(SpreadFigures):
    """How many times as fast as dense, with a confidence interval; see :func:`ara.evaluation.speed.ratio`."""


@dataclass(frozen=True)
class CaseFigures(Part):
    """One model in one case.

    Attributes:
        seconds, tokens_per_second: of a pass.
        ratio: how many times as fast as dense; ``None`` if the models did not take turns.
        predicted: the ratio that arithmetic predicts.
        macs: multiply-accumulates of a pass.
        bytes_read: weights and KV cache that a pass reads.
    """

    seconds: Percentiles
    tokens_per_second: Percentiles
    ratio: RatioFigures | None
    predicted: Number
    macs: Count
    bytes_read: Number


@dataclass(frozen=True)
class CaseResults(Part):
    """All models in one case: ``batch`` rows of ``new`` tokens after ``past`` tokens in the KV cache."""

    kind: Literal["prefill", "decode"]
    batch: Least1
    past: Count
    new: Least1
    models: Mapping[str, CaseFigures]


@dataclass(frozen=True)
class ServingFigures(Part):
    """One model that answers requests.

    Attributes:
        output_tokens_per_second: of all requests together, prompts included in the time.
        first_token_seconds: from the arrival of a request to its first token; of a round the median over its requests.
        ratio: how many times as fast as dense; ``None`` if the models did not take turns.
    """

    output_tokens_per_second: Percentiles
    first_token_seconds: Percentiles
    ratio: RatioFigures | None


@dataclass(frozen=True)
class ServingCase(Part):
    """All models with ``requests`` at once: each has ``prompt`` tokens and gets ``new`` ones."""

    requests: Least1
    prompt: Least1
    new: Least1
    models: Mapping[str, ServingFigures]


@dataclass(frozen=True)
class BenchmarkResults(Results):
    """Results of ``ara bench``.

    Attributes:
        chosen: name of the compressed model.
        backend, device, precision, threads: runtime of the models.
        machine: see :func:`ara.environment.machine`.
        interleaved: whether the models took turns.
        models: name → sizes, the dense one first.
        last_logits: whether a pass computes the logits of the last position only.
        cases: one per batch size and length.
        serving: one per number of requests; ``None`` if no requests were served.
    """

    Settings = BenchmarkSettings
    vital = False
    chosen: str
    backend: str
    device: str
    machine: Mapping[str, Any]
    precision: str
    threads: Least1
    interleaved: StrictBool
    models: Mapping[str, ModelCost]
    last_logits: StrictBool
    cases: tuple[CaseResults, ...]
    serving: tuple[ServingCase, ...] | None = field(default=None, metadata=LEFT_OUT)
