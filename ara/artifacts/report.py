"""The kind ``report``: all results of one checkpoint, as a page and as data."""

from __future__ import annotations

from dataclasses import dataclass

from ara.artifacts.base import Part, Results

HTML_FILE = "report.html"
JSON_FILE = "report.json"


@dataclass(frozen=True)
class MissingPart(Part):
    """Something that the report lacks, and the command that adds it."""

    what: str
    command: str


@dataclass(frozen=True)
class ReportResults(Results):
    """Results of ``ara report``; ``checkpoint`` is the name of the checkpoint, ``verdict`` one sentence."""

    vital = False
    title: str
    verdict: str
    checkpoint: str
    missing: tuple[MissingPart, ...]
