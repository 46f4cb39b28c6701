"""A cache of its own for every test, and a reporter that remembers."""

from __future__ import annotations

from pathlib import Path

import pytest

from ara.progress import SilentReporter


class Recorder(SilentReporter):
    """Keeps what it is told as ``"kind: text"`` lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def step(self, text: str) -> None:
        self.lines.append(f"step: {text}")

    def fact(self, text: str) -> None:
        self.lines.append(f"fact: {text}")

    def warn(self, text: str) -> None:
        self.lines.append(f"warn: {text}")

    def kinds(self) -> list[str]:
        """Return the first word of every line."""
        return [line.partition(":")[0] for line in self.lines]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point ``cache_dir()`` into the test's own folder, and return that."""
    folder = tmp_path / "ara-cache"
    monkeypatch.setenv("ARA_CACHE_DIR", str(folder))
    return folder
