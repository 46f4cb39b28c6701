"""A cache of its own for every test, and a reporter that remembers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recorder import Recorder


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point ``cache_dir()`` into the test's own folder, and return that."""
    folder = tmp_path / "ara-cache"
    monkeypatch.setenv("ARA_CACHE_DIR", str(folder))
    return folder
