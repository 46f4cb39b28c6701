"""Models that the graph builder does not know, through transformers' own exporter."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from transformers import AutoConfig

from ara.errors import UnsupportedModelError, WorkspaceError
from ara.layouts.grid import Grid
from ara.progress import SILENT
from ara.workspace.view import StageView
from export.config import ExportConfig
from export.onnx import traced
from export.onnx.settings import resolve
from export.onnx.stored_weights import Checkpoint
from export.onnx.target import OnnxTarget
from export.onnx.traced import trace
from export.onnx.writing import write_onnx
from tests.checkpoints import Made
from tests.exportable import exported
from tests.recorder import Recorder

REFUSAL = UnsupportedModelError("the ONNX graph builder does not know the family 'gptj'")


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the exporter seem to be installed; these tests do not come to it."""
    monkeypatch.setattr(traced, "_missing", lambda: None)


def test_the_graph_is_the_checkpoint(
    checkpoint: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript", reason="transformers' exporter needs it")
    report, folder = Recorder(), tmp_path / "out"
    folder.mkdir()
    config = resolve(ExportConfig(execution_provider="cpu"))
    about = write_onnx(Checkpoint(checkpoint("gptj", "pivoted").folder), folder, config, "0" * 64, report)
    assert about.traced and about.ranks and about.parity is not None and not about.decoder.shared_caches
    assert [case.case for case in about.parity.cases] == ["prefill", "decode", "chunks", "padded"]
    assert all(case.difference < 1e-4 and case.agreement == 1 for case in about.parity.cases)
    (warning,) = report.texts("warn")
    assert "does not know the family 'gptj'" in warning and "transformers' own exporter writes the graph" in warning
    assert capsys.readouterr() == ("", "")
    assert not (folder / "genai_config.json").exists()
    graph = ir.load(folder / "model.onnx").graph
    caches = {f"past_key_values.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")}
    assert {value.name for value in graph.inputs} == {"input_ids", "attention_mask", "position_ids", *caches}
    view = StageView("export/traced", folder, "done")
    with pytest.raises(WorkspaceError, match="cannot count its multiplications"):
        OnnxTarget().for_bench(view)


@pytest.mark.usefixtures("exporter")
@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"precision": "int8"}, "only for --precision fp32 --execution-provider cpu"),
        ({"parity": False}, "leave --no-parity out"),
        ({"last_logits": True}, "without --merge-shared-inputs and --last-logits"),
    ],
)
def test_what_it_cannot_write_is_refused_at_once(
    settings: dict[str, Any], hint: str, checkpoint: Callable[..., Made], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match="does not know the family 'gptj'; known are arcee") as caught:
        exported(checkpoint("gptj").folder, tmp_path / "out", **settings)
    assert hint in (caught.value.hint or "") and not any((tmp_path / "out").iterdir())


@pytest.mark.usefixtures("exporter")
def test_few_bits_are_refused(checkpoint: Callable[..., Made], tmp_path: Path) -> None:
    made = checkpoint("gptj", grid=Grid(4, 32, True))
    with pytest.raises(UnsupportedModelError) as caught:
        exported(made.folder, tmp_path / "out", precision="fp32")
    assert "no matrices of few bits" in (caught.value.hint or "")


@pytest.mark.usefixtures("exporter")
@pytest.mark.parametrize(
    ("family", "changes", "hint"),
    [
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "of type longrope depend on"),
        ("gemma3n_text", {}, "it cannot follow windows (sliding_attention, sliding_window)"),
        ("llama4_text", {}, "it cannot follow windows (chunked_attention, attention_chunk_size)"),
        ("bloom", {}, "names no number of positions"),
        ("gemma", {"use_bidirectional_attention": True}, "reads text in both directions"),
    ],
)
def test_what_differs_on_long_texts_is_refused(
    family: str, changes: dict[str, Any], hint: str, checkpoint: Callable[..., Made]
) -> None:
    """The comparison with torch reads a short text, and would not find it."""
    loaded = AutoConfig.for_model(family)
    loaded.__dict__.update(changes)
    config = resolve(ExportConfig(execution_provider="cpu"))
    with pytest.raises(UnsupportedModelError) as caught:
        trace(Checkpoint(checkpoint("gptj").folder), loaded, config, REFUSAL, SILENT)
    assert hint in (caught.value.hint or "")


def test_a_missing_package_is_named(
    checkpoint: Callable[..., Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UnsupportedModelError, match="does not know the family 'gptj'") as caught:
        exported(checkpoint("gptj").folder, tmp_path / "out")
    assert "pip install onnxscript" in (caught.value.hint or "")


@pytest.mark.usefixtures("exporter")
def test_an_exporter_that_fails_is_told(
    checkpoint: Callable[..., Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(model: Any) -> Any:
        raise RuntimeError("no such operator\nsecond line")

    monkeypatch.setattr(traced, "_traced", fails)
    with pytest.raises(UnsupportedModelError, match=r"exporter fails as well: RuntimeError: no such operator$"):
        exported(checkpoint("gptj").folder, tmp_path / "out")
