"""Weights that stay in their files: when, with which numbers, and what is said."""

from __future__ import annotations

import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from ara.errors import AraError, DiskFullError, ModelError
from ara.models import memory, offload
from ara.models.cache import cache_dir
from ara.models.offload import Offload
from ara.models.sources import resolve
from ara.models.stored_model import StoredModel
from tests.mapped import bytes_in_files
from tests.recorder import Recorder
from tests.tiny import FAMILIES, MIXTURES, save_tiny

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARA_CACHE_DIR", str(tmp_path / "cache"))


def _mapped_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of the parameters whose memory is that of a safetensors file."""
    return bytes_in_files(model.parameters(), ending=".safetensors")


def _all_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@linux
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_the_same_dtype_stay_in_their_files(tmp_path: Path, family: str) -> None:
    folder = save_tiny(tmp_path / "tiny", family, seed=2)
    model = resolve(str(folder), offload="disk").load_model(torch.float32)
    assert _mapped_bytes(model) == _all_bytes(model)
    assert not cache_dir().exists()


@linux
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_another_dtype_are_converted_once(tmp_path: Path, family: str) -> None:
    folder, report = save_tiny(tmp_path / "tiny", family, seed=2), Recorder()
    expected = resolve(str(folder), offload="none").load_model(torch.bfloat16)
    assert _mapped_bytes(expected) == 0
    source = resolve(str(folder), offload="disk", report=report)
    model = source.load_model(torch.bfloat16)
    assert _mapped_bytes(model) == _all_bytes(model)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    assert report.texts("step") == ["Writing a copy of the weights in bfloat16 (once)"]
    assert f"kept in {cache_dir() / 'weights'}" in report.facts[-1]
    source.load_model(torch.bfloat16)
    assert len(report.texts("step")) == 1


@linux
@pytest.mark.parametrize("family", [*MIXTURES, "llama4_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_stay_in_files(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """transformers merges the experts of some families, so that a copy is needed in any dtype."""
    folder, report = save_tiny(tmp_path / "tiny", family, seed=2), Recorder()
    expected = resolve(str(folder), offload="none").load_model(dtype).state_dict()
    model = resolve(str(folder), offload="disk", report=report).load_model(dtype)
    assert _mapped_bytes(model) == _all_bytes(model)
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    merged = family in ("mixtral", "qwen2_moe", "deepseek_v3")
    assert len(report.texts("step")) == (merged or dtype == torch.bfloat16)


def _free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: free)


def test_auto_decides_by_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "tiny", "llama")
    size = _all_bytes(resolve(str(folder)).load_model(torch.bfloat16))
    said: dict[int, list[str]] = {}
    for free in (2 * size, 2 * size - 1):
        _free(monkeypatch, free)
        report = Recorder()
        resolve(str(folder), report=report).load_model(torch.bfloat16)
        said[free] = report.facts
    assert said[2 * size] == []
    assert "of weights stay in their files and are read when they are needed" in said[2 * size - 1][0]
    assert len(list((cache_dir() / "weights").iterdir())) == 1


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_no_copy_is_made_where_none_is_needed(tmp_path: Path, choice: Offload) -> None:
    folder = save_tiny(tmp_path / "tiny", "llama")
    resolve(str(folder), offload=choice).load_model(torch.bfloat16)
    assert not cache_dir().exists()


def test_another_model_has_a_copy_of_its_own(tmp_path: Path) -> None:
    for seed in (1, 2):
        folder = save_tiny(tmp_path / f"tiny{seed}", "llama", seed=seed)
        expected = resolve(str(folder), offload="none").load_model(torch.bfloat16).state_dict()
        found = resolve(str(folder), offload="disk").load_model(torch.bfloat16).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_converted_weights_cannot_stay_in_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "tiny", "llama")
    monkeypatch.setattr(StoredModel, "converted", lambda self: "transformers converts weights")
    with pytest.raises(ModelError, match="cannot stay in their files: transformers converts weights"):
        resolve(str(folder), offload="disk").load_model(torch.float32)
    _free(monkeypatch, 1)
    report = Recorder()
    resolve(str(folder), report=report).load_model(torch.bfloat16)
    assert report.facts[0].startswith("transformers converts weights: all ")
    assert not cache_dir().exists()


def test_a_full_disk_is_found_before_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "tiny", "llama")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(DiskFullError, match="a copy of the weights in bfloat16 needs"):
        resolve(str(folder), offload="disk").load_model(torch.bfloat16)
    assert not list((cache_dir() / "weights").iterdir())


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "tiny", "llama")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARA_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(AraError, match="cannot be written"):
        resolve(str(folder), offload="disk").load_model(torch.bfloat16)


def test_a_damaged_copy_is_made_again(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", "llama")
    expected = resolve(str(folder), offload="disk").load_model(torch.bfloat16).state_dict()
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    (copy,) = (cache_dir() / "weights").iterdir()
    (copy / "model.safetensors").unlink()
    found = resolve(str(folder), offload="disk").load_model(torch.bfloat16).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_size_in_memory(tmp_path: Path) -> None:
    source = resolve(str(save_tiny(tmp_path / "tiny", "llama")))
    model = source.load_model(torch.float32)
    from ara.models.completeness import stored_tensors, weight_files

    stored = stored_tensors(weight_files(tmp_path / "tiny"))
    assert offload.weights_in_memory(stored, torch.float32) == _all_bytes(model)
    assert offload.weights_in_memory(stored, torch.bfloat16) == _all_bytes(model) // 2
