"""Stages with hardly any free memory: weights, outputs and activations go elsewhere; results have the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ara.config import AllocateConfig, DecomposeConfig, TrainMasksConfig
from ara.models import kept, memory, recompute
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.train_masks import train_masks
from ara.workspace.view import StageView
from tests.recorder import Recorder


@contextmanager
def _hardly_any_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        for module in (memory, kept, recompute):
            patched.setattr(module, "available_bytes", lambda device: 1)
        yield


def _files(view: StageView) -> Any:
    assert view.manifest is not None
    # The logs of a training hold times.
    return {name: file for name, file in view.manifest.files.items() if not name.startswith("log")}


def test_results_have_the_same_bytes(
    tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DecomposeConfig(**{**tiny_settings, "dtype": "bfloat16"}, method="two-sided", moment_memory=1e-6)
    ranks = AllocateConfig(keep=0.7, method="sensitivity", samples=4, held_out=2)
    training = TrainMasksConfig(keep=(0.7,), steps=2, samples=4, held_out=2)
    monkeypatch.setenv("ARA_CACHE_DIR", str(tmp_path / "cache"))
    found = []
    for name in ("much", "hardly"):
        run = Run(tmp_path / name, report=(report := Recorder()))
        if name == "much":
            made = [decompose(config, run), train_masks(training, run), allocate(ranks, run)]
        else:
            with _hardly_any_memory(monkeypatch):
                made = [decompose(config, run), train_masks(training, run), allocate(ranks, run)]
        found.append(([_files(view) for view in made], report.facts))
    (expected, silent), (files, said) = found
    assert files == expected and all(files)
    assert not any("stay in their files" in fact or "computed again" in fact for fact in silent)
    assert sum("stay in their files" in fact for fact in said) == 3
    # The allocation finds the table of the training in the cache, and so runs no backward pass.
    assert sum("computed again in the backward pass" in fact for fact in said) == 2
    assert sum(f"block inputs in {tmp_path / 'hardly' / 'cache' / 'outputs'}" in fact for fact in said) == 2
    assert sum("are kept in" in fact for fact in said) == 2
    assert not list((tmp_path / "hardly" / "cache" / "outputs").iterdir())
