"""The file of a benchmark's finished rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.row_file import RowFile


def test_rows_are_written_one_by_one_and_name_their_run(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    first = RowFile(path, {"settings": {"windows": 2}})
    first.keep("a", {"loss": 1.5})
    first.keep("b", {"loss": 2.5})
    second = RowFile(path, {"settings": {"windows": 2}})
    assert first.measured_now("a") and not second.measured_now("a")
    second.keep("c", {"loss": 3.5})
    document = json.loads(path.read_text())
    assert document["rows"] == {
        key: {"loss": loss, "run": run} for key, loss, run in zip("abc", (1.5, 2.5, 3.5), (0, 0, 1), strict=True)
    }
    assert [set(run) for run in document["runs"]] == [{"started", "commit", "machine", "versions"}] * 2
    assert [one.name for one in path.parent.iterdir()] == ["rows.json"]


def test_rows_with_other_settings_are_refused_and_stay(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    RowFile(path, {"settings": {"windows": 2}, "model": "x"}).keep("a", {})
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r'other settings: {"settings": {"windows": 2}}') as error:
        RowFile(path, {"settings": {"windows": 3}, "model": "x"})
    assert "--results" in str(error.value) and path.read_bytes() == before
