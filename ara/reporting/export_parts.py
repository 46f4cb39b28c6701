"""The part of the report about ``ara export``: a graph and its comparison with torch."""

from __future__ import annotations

from ara.artifacts.graph import ParityCase
from ara.reporting.part import Part


class Exported(Part):
    """One result of ``ara export``; ``parity`` is empty when the graph was not compared.

    Of ``candidates`` matrices, an int8 graph multiplies ``exact`` exactly.
    """

    name: str
    precision: str
    provider: str | None
    graph_bytes: int | None
    exact: int
    candidates: int
    parity: tuple[ParityCase, ...]
