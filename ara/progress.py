"""How the library tells what it does: through a callback object, never by printing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """A running progress bar."""

    def advance(self, amount: float = 1) -> None:
        """Say that ``amount`` more units are done."""


class Reporter(Protocol):
    """What a caller may want to know while a stage runs; ``ara_cli.console`` implements it."""

    def step(self, text: str) -> None:
        """Start a new piece of work: a verb line such as ``Decomposing 210 linear layers``."""

    def fact(self, text: str) -> None:
        """Tell a fact about the running step (what was picked and why, what was found)."""

    def warn(self, text: str) -> None:
        """Tell something that deserves a look but does not stop the work."""

    def bar(self, label: str, total: float) -> AbstractContextManager[Bar]:
        """Open a bar of ``total`` units."""


class _SilentBar:
    def advance(self, amount: float = 1) -> None:
        """Do nothing."""


class SilentReporter:
    """Says nothing; the default of every library function."""

    def step(self, text: str) -> None:
        """Do nothing."""

    def fact(self, text: str) -> None:
        """Do nothing."""

    def warn(self, text: str) -> None:
        """Do nothing."""

    @contextmanager
    def bar(self, label: str, total: float) -> Iterator[Bar]:
        """Yield a bar that shows nothing."""
        yield _SilentBar()


SILENT = SilentReporter()
