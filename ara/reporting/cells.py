"""Tables of the report and the model card: cells with their numbers, and how numbers are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ara.artifacts.evaluation import SpreadFigures
from ara.evaluation.paired import NOISE
from ara.reporting.evaluation_parts import Difference, HarnessRow
from ara.reporting.summary import share_text

# Seconds below which milliseconds have more digits.
_SHORT = 0.01


@dataclass(frozen=True)
class Cell:
    """Text of a cell, the number that it shows, and whether it is a name in a program."""

    text: str
    value: float | None = None
    code: bool = False


@dataclass(frozen=True)
class Table:
    """A table: caption, column titles with units, rows. Columns of words are aligned left, those of numbers right.

    Attributes:
        words: how many columns from the left hold words.
        marked: index of the row of the checkpoint or method that the report describes.
    """

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    words: int = 1
    marked: int | None = None


NONE = Cell("–")


def index(names: Sequence[str], name: str | None) -> int | None:
    """Return the row of a name, or ``None``."""
    return names.index(name) if name in names else None


def count(value: int | None) -> Cell:
    """Return a whole number."""
    return NONE if value is None else Cell(f"{value:,}", value)


def share(value: float | None, digits: int = 1) -> Cell:
    """Return a fraction of 1 in per cent."""
    return NONE if value is None else Cell(f"{value:.{digits}%}", value)


def mib(value: float | None) -> Cell:
    """Return bytes in MiB."""
    return NONE if value is None else Cell(f"{value / 2**20:,.1f}", value)


def number(value: float | None, digits: int, stderr: float | None = None) -> Cell:
    """Return a number with its standard error."""
    error = "" if stderr is None else f" ± {stderr:.{digits}f}"
    return NONE if value is None else Cell(f"{value:,.{digits}f}{error}", value)


def spread(value: SpreadFigures | None, digits: int, scale: float = 1.0) -> Cell:
    """Return a median with its range, both times ``scale``."""
    if value is None:
        return NONE
    median, low, high = (f"{scale * part:,.{digits}f}" for part in (value.median, value.low, value.high))
    return Cell(f"{median} ({low} – {high})", value.median)


def milliseconds(seconds: SpreadFigures) -> Cell:
    """Return seconds in milliseconds."""
    return spread(seconds, 1 if seconds.median >= _SHORT else 3, 1000)


def nanoseconds(value: int) -> Cell:
    """Return nanoseconds in milliseconds."""
    return Cell(f"{value / 1e6:,.2f}", value)


def perplexity(value: float, stderr: float | None) -> Cell:
    """Return a perplexity; its standard error is, to first order, that of its logarithm (``stderr``) times it."""
    return Cell(f"{value:,.2f}" + ("" if stderr is None else f" ± {stderr * value:,.2f}"), value)


def accuracy(row: HarnessRow | None) -> Cell:
    """Return the value of a metric with its standard error."""
    if row is None:
        return NONE
    text = share_text(row.value)
    if not text.endswith("%"):
        return number(row.value, 2, row.stderr)
    return Cell(text + ("" if row.stderr is None else f" ± {row.stderr:.1%}"), row.value)


def questions(examples: int, of: int) -> Cell:
    """Return how many questions of a task were asked."""
    return Cell(f"{examples:,}" if of == examples else f"{examples:,} of {of:,}", examples)


def difference(found: Difference | None) -> Cell:
    """Return a difference of two accuracies with its p-value; ``≈`` marks one that may be chance."""
    if found is None:
        return NONE
    p = "" if found.p is None else f" ({found.p:.2g})"
    noise = "≈ " if found.p is not None and found.p > NOISE else ""
    return Cell(f"{noise}{found.difference:+.1%}{p}", found.difference)
