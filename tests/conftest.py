"""Fixtures that every test may ask for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def data_dir(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder with the project's data sets, with ``ARA_DATA_DIR`` set to it; skip where there is none."""
    folder = Path(os.environ.get("ARA_DATA_DIR") or _REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"needs the project's data sets: no folder {folder} (set ARA_DATA_DIR)")
    monkeypatch.setenv("ARA_DATA_DIR", str(folder))
    return folder
