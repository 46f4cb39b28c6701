"""Checkpoints that vLLM must not serve are refused in one line, before anything is built."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config

from ara.errors import ModelError, UnsupportedModelError
from ara.layouts.grid import Grid
from ara.layouts.modeling_ara import CHECKPOINT_FORMAT, AraConfig
from tests.vllm.greedy import by_vllm

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
pytestmark = pytest.mark.timeout(900)
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def copied(folder: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a checkpoint that a test may change."""
    return Path(shutil.copytree(folder("llama", "pivoted"), tmp_path / "checkpoint"))


def settings(source: Path) -> Iterator[dict[str, Any]]:
    """Yield ``quantization_config``, and write it back."""
    path = source / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    yield config["quantization_config"]
    path.write_text(json.dumps(config), encoding="utf-8")


def refusal(source: Path) -> str:
    """Return the error of vLLM, which is one line."""
    with pytest.raises(ModelError) as caught:
        by_vllm(source)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_a_model_that_also_reads_pictures() -> None:
    from export.vllm.config import AraQuantizationConfig

    config = AraQuantizationConfig(AraConfig({"model.language_model.layers.0.self_attn.q_proj": 3}))
    with pytest.raises(UnsupportedModelError, match="gemma3 model reads more than text"):
        config.maybe_update_config("owner/name", Gemma3Config())


def test_a_newer_format(copied: Path) -> None:
    for found in settings(copied):
        found["format_version"] = CHECKPOINT_FORMAT + 1
    assert f"has ARA format {CHECKPOINT_FORMAT + 1}" in refusal(copied)


def test_another_rank(copied: Path) -> None:
    for found in settings(copied):
        found["ranks"][Q] += 1
    assert Q in refusal(copied)


def test_a_layer_that_is_not_low_rank_any_more(copied: Path) -> None:
    for found in settings(copied):
        del found["ranks"][Q]
    assert Q in refusal(copied)


@pytest.mark.parametrize("name", [f"{Q}.A.weight", "model.norm.weight"])
def test_a_missing_tensor(copied: Path, name: str) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    assert name in refusal(copied)


def test_an_order_that_is_no_permutation(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{Q}.order"][0] = tensors[f"{Q}.order"][1]
    save_file(tensors, file, {"format": "pt"})
    assert "is not a permutation" in refusal(copied)


def test_a_file_that_was_cut_short(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "cannot be loaded" in refusal(copied)


def test_without_its_settings_it_is_no_dense_model(copied: Path) -> None:
    path = copied / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["quantization_config"]
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(Exception, match=r"\S"):
        by_vllm(copied)


def test_an_embedding_of_few_bits_that_vllm_loads_itself(folder: Callable[..., Path]) -> None:
    source = folder("gemma", None, grid=Grid(8, 16, True), embedding=Grid(8, 16, True))
    assert "--model-impl transformers" in refusal(source)


def test_a_family_whose_weights_vllm_turns_over(folder: Callable[..., Path]) -> None:
    source = folder("gpt2", "factors")
    assert "asks for" in refusal(source)
