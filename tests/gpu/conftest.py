"""The device of these tests: a GPU, or the CPU as its stand-in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from benchmarks.gpu_check.marked import DEVICE_VARIABLE
from benchmarks.gpu_check.setting import REHEARSAL, Device, Setting


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def device() -> Device:
    """Return where to compute; skip without a GPU."""
    if os.environ.get(DEVICE_VARIABLE) == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"


@pytest.fixture
def gpu(device: Device) -> Literal["cuda"]:
    """Return the GPU, for what the CPU cannot stand in for."""
    if device != "cuda":
        pytest.skip("the CPU cannot stand in for a GPU here")
    return device


@pytest.fixture(scope="session")
def setting(
    device: Device, tmp_path_factory: pytest.TempPathFactory, tiny_text: str, checkpoint: Callable[..., Any]
) -> Setting:
    """Return the checks' setting for a tiny llama."""
    model = str(checkpoint("llama", None).folder)
    workspace = tmp_path_factory.mktemp("gpu")
    return Setting(device=device, model=model, text=tiny_text, workspace=workspace, sizes=REHEARSAL)
