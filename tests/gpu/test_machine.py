"""Where models run, how much memory there is, and what is said if it does not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ara.environment import machine, peak_memory_bytes, reset_peak_memory
from ara.errors import UsageError
from ara.models.checkpoint import load
from ara.models.memory import available_bytes
from ara.models.placement import choose_placement
from ara.models.sources import ModelSource
from tests.commands import ara, refused


def test_the_gpu_is_chosen_in_the_precision_that_it_multiplies(gpu: str) -> None:
    placement = choose_placement()
    native = torch.cuda.get_device_capability() >= (8, 0)
    assert (placement.device, placement.dtype) == ("cuda", "bfloat16" if native else "float16")
    assert "a CUDA device is there" in placement.why


def test_every_gpu_has_a_number_and_further_ones_are_refused(gpu: str) -> None:
    count = torch.cuda.device_count()
    assert choose_placement(f"cuda:{count - 1}").device == f"cuda:{count - 1}"
    with pytest.raises(UsageError, match=rf"there are {count} CUDA devices"):
        choose_placement(f"cuda:{count}")
    assert len(machine()["gpus"]) == count


def test_a_model_is_loaded_where_it_is_asked_to_be(device: str, tiny_llama: Path) -> None:
    model = load(tiny_llama, device, "float16")
    assert {tensor.device.type for tensor in model.parameters()} == {device}
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float16}


def test_memory_is_that_of_the_gpu(gpu: str) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    assert 0 < available_bytes(gpu) <= total
    held = torch.empty(2**26, dtype=torch.uint8, device=gpu)
    reset_peak_memory()
    further = torch.empty(2**26, dtype=torch.uint8, device=gpu)
    assert held.nbytes + further.nbytes <= peak_memory_bytes() < total


@pytest.fixture
def full(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take nearly all memory of the GPU away. Its stand-in raises the error that torch has there."""
    if device == "cpu":

        def load_model(self: ModelSource, *arguments: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity")

        monkeypatch.setattr(ModelSource, "load_model", load_model)
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_too_little_memory_is_one_line(
    full: None, device: str, tiny_llama: Path, tiny_text: str, tmp_path: Path
) -> None:
    words = ["decompose", tiny_llama, "--text", tiny_text, "--samples", 4, "--seq-len", 48, "--device", device, "-q"]
    said = refused(ara(*words, "-w", tmp_path / "ws"), 1, "out of memory: CUDA out of memory. Tried to allocate")
    assert "try --device cpu" in said and "--batch-size" in said
