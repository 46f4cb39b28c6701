"""A reporter that remembers."""

from __future__ import annotations

from contextlib import AbstractContextManager

from ara.progress import Bar, SilentReporter


class Recorder(SilentReporter):
    """Records all messages, in order.

    Attributes:
        told: kind (step, fact, warn or bar) and text.
    """

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def step(self, text: str) -> None:
        self.told.append(("step", text))

    def fact(self, text: str) -> None:
        self.told.append(("fact", text))

    def warn(self, text: str) -> None:
        self.told.append(("warn", text))

    def bar(self, label: str, total: float) -> AbstractContextManager[Bar]:
        self.told.append(("bar", label))
        return super().bar(label, total)

    def texts(self, *kinds: str) -> list[str]:
        """Return the texts of these kinds."""
        return [text for kind, text in self.told if kind in kinds]

    @property
    def facts(self) -> list[str]:
        """All facts."""
        return self.texts("fact")

    @property
    def warnings(self) -> list[str]:
        """All warnings."""
        return self.texts("warn")

    @property
    def bars(self) -> list[str]:
        """The labels of all bars."""
        return self.texts("bar")

    def kinds(self) -> list[str]:
        """Return the kinds of what was told, without bars."""
        return [kind for kind, _ in self.told if kind != "bar"]
