"""Settings of vLLM for the tests, and checkpoints with heads that its CPU kernels know."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# The engine in this process: starting another one for every test would take most of the time.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

# Heads of 32: 6 for queries and 2 for keys, so one of two processes has 3 and 1.
_SIZES: dict[str, Any] = {"num_hidden_layers": 2, "head_dim": 32}
# These families derive the width of a head from that of the model.
_WIDTHS = {"qwen2": {"hidden_size": 192}, "phi3": {"hidden_size": 192}, "gpt2": {"hidden_size": 192, "n_embd": 192}}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("vllm")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that saves a checkpoint of a family, once, and returns its folder; only to be read."""
    from tests.checkpoints import make_checkpoint

    made: dict[str, Path] = {}

    def make(family: str, layout: str | None, **options: Any) -> Path:
        key = repr((family, layout, options))
        if key not in made:
            sizes = {**_SIZES, **_WIDTHS.get(family, {}), **options}
            made[key] = make_checkpoint(tmp_path_factory.mktemp(family), family, layout, **sizes).folder
        return made[key]

    return make


@pytest.fixture
def root(folder: Callable[..., Path], tiny_text: str, tmp_path: Path) -> Path:
    """Return a workspace with a checkpoint of a model that vLLM's CPU kernels know."""
    from ara.config import AllocateConfig, DecomposeConfig, TruncateConfig
    from ara.stages.allocate import allocate
    from ara.stages.common import Run
    from ara.stages.decompose import decompose
    from ara.stages.truncate import truncate

    run, cpu = Run(tmp_path / "ws"), {"device": "cpu", "dtype": "float32"}
    model = str(folder("llama", None))
    decompose(DecomposeConfig(model=model, text=tiny_text, samples=16, seq_len=48, **cpu), run)
    allocate(AllocateConfig(keep=0.7, method="energy", **cpu), run)
    truncate(TruncateConfig(), run)
    return run.root
