"""Parts of the report about ``ara bench``: times, speeds, and the machine that they were measured on."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ConfigDict
from typing_extensions import TypedDict

from ara.artifacts.benchmark import ModelCost
from ara.artifacts.evaluation import SpreadFigures
from ara.reporting.part import Part
from ara.workspace.tensors import Size


class BenchRow(Part):
    """One model in one case.

    Attributes:
        ratio: how many times as fast as dense, where the models took turns.
        predicted: the ratio that arithmetic predicts.
        macs: multiply-accumulates of a pass; a FLOP count is twice that.
        bytes_read: weights and past keys and values that a pass reads.
    """

    seconds: SpreadFigures
    tokens_per_second: SpreadFigures
    ratio: SpreadFigures | None
    predicted: float
    macs: int
    bytes_read: float


class BenchCase(Part):
    """One case of a benchmark: ``new`` tokens after ``past`` tokens in the KV cache."""

    kind: str
    batch: int
    past: int
    new: int
    models: Mapping[str, BenchRow]


class ServingRow(Part):
    """One model that answers requests; fields as in :class:`ara.artifacts.benchmark.ServingFigures`."""

    output_tokens_per_second: SpreadFigures
    first_token_seconds: SpreadFigures
    ratio: SpreadFigures | None


class ServingRequests(Part):
    """All models with ``requests`` at once, each with a prompt and ``new`` tokens of answer."""

    requests: int
    prompt: int
    new: int
    models: Mapping[str, ServingRow]


class Machine(TypedDict, total=False):
    """The machine of a benchmark, as far as it was recorded; a later version may add keys."""

    __pydantic_config__ = ConfigDict(extra="allow", allow_inf_nan=False)  # type: ignore[misc]
    system: str | None
    processor: str | None
    cores: int | None
    memory_bytes: Size | None
    gpus: tuple[str, ...]


class Benched(Part):
    """One result of ``ara bench``.

    Attributes:
        precision: of the weights in use.
        machine: see :func:`ara.environment.machine`.
    """

    name: str
    chosen: str
    backend: str
    device: str
    precision: str
    threads: int
    machine: Machine
    interleaved: bool
    models: Mapping[str, ModelCost]
    cases: tuple[BenchCase, ...]
    serving: tuple[ServingRequests, ...] = ()
