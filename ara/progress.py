"""Progress reports: the library calls a reporter object and never prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """A running progress bar."""

    def advance(self, amount: float = 1) -> None:
        """Add ``amount`` finished units."""


class Reporter(Protocol):
    """Receives the progress of a stage; implemented by ``ara_cli.console``."""

    def step(self, text: str) -> None:
        """Announce a new step, such as ``Decomposing 210 linear layers``."""

    def fact(self, text: str) -> None:
        """Report a fact about the running step."""

    def warn(self, text: str) -> None:
        """Report a problem that does not stop the work."""

    def bar(self, label: str, total: float) -> AbstractContextManager[Bar]:
        """Open a progress bar of ``total`` units."""


class _SilentBar:
    def advance(self, amount: float = 1) -> None:
        """Do nothing."""


class SilentReporter:
    """Reports nothing; the default of every library function."""

    def step(self, text: str) -> None:
        """Do nothing."""

    fact = warn = step

    @contextmanager
    def bar(self, label: str, total: float) -> Iterator[Bar]:
        """Yield a bar that shows nothing."""
        yield _SilentBar()


SILENT = SilentReporter()
