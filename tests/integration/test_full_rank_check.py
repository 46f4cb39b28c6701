"""``ara truncate --check`` tells a family whose low-rank layers compute something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ara.config import AllocateConfig, DecomposeConfig, TruncateConfig
from ara.errors import ModelError, UsageError
from ara.layouts.modeling_ara import LowRankLinear
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.truncate import truncate
from tests.recorder import Recorder
from tests.tiny import save_tiny

CPU = {"device": "cpu", "dtype": "float32"}


def prepared(root: Path, family: str, **changes: Any) -> Run:
    run = Run(root / "ws", report=Recorder())
    decompose(DecomposeConfig(model=str(save_tiny(root / "model", family)), method="plain", **CPU, **changes), run)
    allocate(AllocateConfig(method="uniform", keep=0.7, **CPU), run)
    return run


@pytest.mark.parametrize(
    ("family", "blocks"), [("llama", "1"), ("gpt2", "1"), ("deepseek_v3", "1, 2")], ids=["llama", "gpt2", "deepseek_v3"]
)
def test_one_block_of_each_kind_is_compared(family: str, blocks: str, tmp_path: Path) -> None:
    run = prepared(tmp_path, family)
    view = truncate(TruncateConfig(check=True), run)
    (said,) = (text for text in run.report.facts if text.startswith("full rank in block"))
    assert said.startswith(f"full rank in block {blocks}: ")
    assert view.manifest is not None
    assert "check" not in view.manifest.config
    # The result is the same one, and the check runs again where it is asked for.
    assert truncate(TruncateConfig(), run).manifest.id == view.manifest.id
    truncate(TruncateConfig(check=True), run)
    assert len([text for text in run.report.facts if text.startswith("full rank in block")]) == 2


def test_layers_that_compute_something_else_are_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(tmp_path, "llama")
    right = LowRankLinear.forward

    def wrong(layer: LowRankLinear, x: torch.Tensor) -> torch.Tensor:
        return right(layer, x) * 1.1

    monkeypatch.setattr(LowRankLinear, "forward", wrong)
    with pytest.raises(ModelError, match=r"^factors of full rank in block 1 change the model: .* 1e-05 are") as caught:
        truncate(TruncateConfig(check=True), run)
    assert "--exclude" in (caught.value.hint or "")
    assert not (tmp_path / "ws" / "truncate").exists() or not any((tmp_path / "ws" / "truncate").iterdir())


def test_factors_of_lower_ranks_alone_cannot_be_compared(tmp_path: Path) -> None:
    run = prepared(tmp_path, "llama", max_keep=0.9)
    with pytest.raises(UsageError, match=r"needs factors of full rank, and none are stored \(--max-keep\)"):
        truncate(TruncateConfig(check=True), run)
