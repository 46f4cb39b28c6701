"""``ara export`` of a checkpoint whose config.json may say anything: one line, whatever it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from ara.errors import AraError, ModelError, UnsupportedModelError
from ara.progress import SILENT
from export.config import ExportConfig
from export.onnx.config_fields import read_context
from export.onnx.rewrite import load_graph
from export.onnx.settings import resolve
from export.onnx.stored_weights import Checkpoint
from export.onnx.writing import write_onnx
from tests.checkpoints import Made
from tests.exportable import exported


@pytest.fixture
def folder(checkpoint: Callable[..., Made], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("llama").folder, tmp_path / "checkpoint"))


def export(folder: Path) -> None:
    target = folder.parent / "out"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    config = resolve(ExportConfig(execution_provider="cpu", parity=False))
    write_onnx(Checkpoint(folder), target, config, "0" * 64, SILENT)


def change(folder: Path, name: str, changes: dict[str, Any]) -> None:
    found = json.loads((folder / name).read_text())
    found = {**found, **changes}
    (folder / name).write_text(json.dumps({key: value for key, value in found.items() if value != "absent"}))


ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers: Input should be greater than or equal to 1"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: Input should be less than"),
        ({"num_attention_heads": 0}, "config.json cannot be used"),
        ({"num_key_value_heads": 4}, "6 query heads cannot share 4 key and value heads"),
        ({"head_dim": 10**9}, "head_dim: Input should be less than"),
        ({"head_dim": -16}, "head_dim: Input should be greater than"),
        ({"hidden_size": "x"}, "'hidden_size'"),
        ({"vocab_size": 0}, "vocab_size: Input should be greater than"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0, expected a number of positions"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings is 1000"),
        (
            {"rope_parameters": {**ROPE, "rope_theta": "x"}},
            "rope_parameters.rope_theta: Input should be a valid number",
        ),
        ({"rope_parameters": {**ROPE, "rope_type": 5}}, "rope_parameters.rope_type: Input should be a valid string"),
        ({"rope_parameters": {**ROPE, "factor": "x"}}, "rope_parameters of type linear: TypeError"),
        ({"rope_parameters": {**ROPE, "factor": 0}}, "rope_parameters of type linear give angles that are not finite"),
        ({"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": "x"}}, "rope_parameters"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"model_type": {}}, "config.json cannot be used"),
        ({"model_type": "bloom"}, "the ONNX graph builder does not know the family 'bloom'"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id"),
    ],
)
def test_a_field_that_cannot_be_is_one_line(folder: Path, changes: dict[str, Any], words: str) -> None:
    (folder / "generation_config.json").unlink()
    change(folder, "config.json", changes)
    with pytest.raises(AraError) as caught:
        export(folder)
    assert isinstance(caught.value, ModelError) and caught.value.hint
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("eos", [1.5, "x", {}, [1, None], True, -1])
def test_what_ends_a_text_is_tokens(folder: Path, eos: Any) -> None:
    change(folder, "generation_config.json", {"eos_token_id": eos})
    with pytest.raises(ModelError, match="eos_token_id of"):
        export(folder)


@pytest.mark.parametrize("family", ["bloom", "mpt", "mamba2"])
def test_a_config_without_positions_is_told(family: str) -> None:
    """Graphs of these families can be rewritten only with a limit."""
    with pytest.raises(UnsupportedModelError, match=f"this {family} model names no number of positions"):
        read_context(AutoConfig.for_model(family))


def test_rewriting_wants_positions_too(folder: Path, tmp_path: Path) -> None:
    change(folder, "config.json", {"model_type": "bloom", "max_position_embeddings": "absent"})
    with pytest.raises(UnsupportedModelError, match="names no number of positions"):
        exported(folder, tmp_path / "out", rewrite=str(tmp_path / "any.onnx"))
    with pytest.raises(ModelError, match="cannot be read"):
        load_graph(tmp_path / "any.onnx")


def test_without_a_tokenizer_there_is_nothing_to_compare(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=f"the tokenizer of {folder} cannot be loaded"):
        exported(folder, tmp_path / "out")
