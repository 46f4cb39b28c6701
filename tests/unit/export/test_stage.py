"""``ara export --source --output``: one folder, two exports at once, and what a killed run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ara.errors import LockedError, OutputError
from ara.stages.common import Run
from export.base import REPORT_FILE
from export.config import ExportConfig
from export.onnx.target import OnnxTarget
from export.stage import export_folder
from tests.damage import contents, listing

CONFIG = ExportConfig(execution_provider="cpu", parity=False)


@pytest.fixture(autouse=True)
def graph(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write two small files in the place of a graph; ``during`` of what is returned runs in between."""

    class Fake:
        text = "first"

        def during(self) -> None:
            pass

        def write(self, target: Any, source: Path, folder: Path, *rest: Any) -> None:
            (folder / "model.onnx").write_text(self.text)
            self.during()
            (folder / REPORT_FILE).write_text("{}")

    fake = Fake()
    monkeypatch.setattr(OnnxTarget, "write", lambda *arguments: fake.write(*arguments))
    return fake


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    return tmp_path / "out"


def export(output: Path, overwrite: bool = False) -> None:
    export_folder(CONFIG, Run(output.parent), output.with_name("source"), output, overwrite=overwrite)


def test_a_second_export_is_refused_while_the_first_is_at_work(output: Path, graph: Any) -> None:
    """Before, the second one deleted what the first had written."""
    refused = []

    def second() -> None:
        graph.during = lambda: None
        with pytest.raises(LockedError, match="is being written by process") as caught:
            export(output, overwrite=True)
        refused.append(caught.value)

    graph.during = second
    export(output)
    assert len(refused) == 1
    assert listing(output.parent) == {"source/config.json", "out/model.onnx", f"out/{REPORT_FILE}"}


@pytest.mark.parametrize("left", [".out.before", ".out.partial", ".out.ara-export/new", ".out.ara-export/before"])
def test_what_a_killed_run_left_is_in_nobodys_way(output: Path, graph: Any, left: str) -> None:
    export(output)
    folder = output.parent / left
    folder.mkdir(parents=True)
    (folder / "x").write_text("x")
    graph.text = "second"
    export(output, overwrite=True)
    assert (output / "model.onnx").read_text() == "second"
    assert not (output.parent / ".out.ara-export").exists()


def test_the_old_folder_of_a_run_killed_between_its_renames_comes_back(output: Path, graph: Any) -> None:
    export(output)
    before = contents(output)
    work = output.with_name(".out.ara-export")
    work.mkdir()
    output.rename(work / "before")
    with pytest.raises(OutputError, match="is not empty"):
        export(output)
    assert contents(output) == before and not work.exists()


def test_what_others_put_there_meanwhile_is_not_replaced(output: Path, graph: Any) -> None:
    def meanwhile() -> None:
        output.mkdir()
        (output / "mine").write_text("mine")

    graph.during = meanwhile
    with pytest.raises(OutputError, match="is not an export"):
        export(output, overwrite=True)
    assert listing(output.parent) == {"source/config.json", "out/mine"}


def test_a_link_is_not_written_through(output: Path) -> None:
    elsewhere = output.with_name("elsewhere")
    elsewhere.mkdir()
    output.symlink_to(elsewhere)
    with pytest.raises(OutputError, match="is a link"):
        export(output, overwrite=True)
    output.unlink()
    (elsewhere / "mine").write_text("mine")
    output.with_name(".out.ara-export").symlink_to(elsewhere)
    export(output)
    assert listing(elsewhere) == {"mine"} and json.loads((output / REPORT_FILE).read_text()) == {}
