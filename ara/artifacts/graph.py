"""The kind ``graph``: a checkpoint written for another runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import StrictBool

from ara.artifacts.base import Count, Number, Part, Results, Settings
from ara.workspace.writer import StageWriter


@dataclass(frozen=True)
class GraphSettings(Settings):
    """The settings that later stages read."""

    target: str | None = None


@dataclass(frozen=True)
class FileSize(Part):
    """One file that the runtime reads."""

    bytes: Count


@dataclass(frozen=True)
class ParityCase(Part):
    """The export compared with torch in one case; see :class:`export.onnx.tolerance.Parity`."""

    case: str
    tokens: Count
    difference: Number
    agreement: Number
    kl: Number
    nll_torch: Number
    nll_onnx: Number


@dataclass(frozen=True)
class ParityResults(Part):
    """The comparison of an export with torch."""

    cases: tuple[ParityCase, ...]


@dataclass(frozen=True)
class FallbackResults(Part):
    """The matrices that an int8 export multiplies exactly; see :class:`export.onnx.export_report.Fallback`."""

    matrices: Mapping[str, Number]
    candidates: Count
    extra_bytes: int
    kl: Number


@dataclass(frozen=True)
class GraphResults(Results):
    """The part of an export target's ``ara_export.json`` that later stages read.

    Attributes:
        precision: of the weights.
        last_logits: whether the export computes the logits of the last position only.
        execution_provider: of ONNX Runtime.
        files: name → size of the files that the runtime reads.
        rewritten: whether another exporter's graph was rewritten; it has matrices of few bits as float weights.
        rounded: number of matrices that the checkpoint stores in few bits.
        expanded: number of products for which ONNX Runtime expands one of them to float when it loads the graph.
        fallback: ``None`` if no product had to be exact.
        parity: ``None`` if the export was not compared with torch.
    """

    Settings = GraphSettings
    precision: str
    last_logits: StrictBool
    execution_provider: str | None = None
    files: Mapping[str, FileSize] | None = None
    rewritten: StrictBool = False
    rounded: Count = 0
    expanded: Count = 0
    fallback: FallbackResults | None = None
    parity: ParityResults | None = None


class ExportReport(Protocol):
    """The report of an export target on an export: a pydantic model."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Return the report as data; as JSON data with ``mode="json"``."""


def write_report(report: ExportReport, stage: StageWriter) -> None:
    """Put the whole report of an export target into the manifest of a stage."""
    stage.results.update(report.model_dump(mode="json"))
