"""What every level of recovery must do with a rounded checkpoint: keep its whole numbers, or say why it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ara
from ara.artifacts.checkpoint import CHECKPOINT, CheckpointResults
from ara.config import AllocateConfig, DecomposeConfig, QuantiseConfig, RecoverConfig, TruncateConfig
from ara.errors import WorkspaceError
from ara.models.checkpoint import load
from ara.recovery import LEVELS
from ara.recovery.base import distance
from ara.recovery.rounded import ScaledLinear
from ara.stages.common import Run
from ara.stages.quantise import quantise
from ara.stages.recover import recover
from ara.stages.run import run_pipeline
from ara.workspace.view import StageView
from tests.contract.test_levels import CPU, SETTINGS, killed_at
from tests.damage import contents
from tests.recorder import Recorder
from tests.tiny import save_tiny

ABLE = [entry.name for entry in LEVELS if entry.load().not_rounded is None]
UNABLE = [entry.name for entry in LEVELS if entry.name not in ABLE]
FROM = "quantise/rounded"
# A scale moves all weights of its block in one direction, so steps are smaller.
SLOW = {**SETTINGS, "block_rate": 5e-4}
# Whole numbers, whatever the level does.
WHOLE = (".steps", ".zeros", ".order")
# A family with biases, transposed layers and a tied head; the other one has neither.
CASES = [("llama", "pivoted", 4), ("gpt2", "factors", 4)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def rounded(request: pytest.FixtureRequest, tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with a rounded checkpoint in bfloat16, embedding and head included; only to be read."""
    family, layout, bits = request.param
    folder = tmp_path_factory.mktemp(f"rounded-{family}")
    root = folder / "ws"
    run_pipeline(
        DecomposeConfig(model=str(save_tiny(folder / "model", family)), text=tiny_text, samples=16, seq_len=32, **CPU),
        [AllocateConfig(keep=0.6, method="energy", layout=layout)],
        {"truncate": TruncateConfig(dtype="bfloat16")},
        Run(root),
    )
    few = {"samples": 12, "held_out": 4, "tolerance": 9.0, "block": 16}
    quantise(QuantiseConfig(bits=bits, embedding_bits=8, **few, **CPU), Run(root), name="rounded")
    return root


@pytest.fixture
def root(rounded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rounded, tmp_path / "ws"))


@pytest.fixture(params=ABLE)
def config(request: pytest.FixtureRequest) -> RecoverConfig:
    return RecoverConfig(level=request.param, only=True, **SLOW)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / CHECKPOINT / "model.safetensors")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.arange(3, 23)[None]).logits
    return found


def test_it_comes_nearer_to_the_dense_model_with_the_same_whole_numbers(
    root: Path, config: RecoverConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    before, judged = root / "quantise" / "rounded", []

    def judge(*words: Any) -> Any:
        judged.append(words)
        return distance(*words)

    monkeypatch.setattr("ara.recovery.base.distance", judge)
    view = recover(config, Run(root), checkpoint=FROM)
    assert view.key == f"recover/rounded-{config.level}-only"
    results, old = CheckpointResults.read(view), CheckpointResults.read(_view(root))
    found = results.recovery_after_rounding
    assert found is not None and results.recovery is None and results.rounding == old.rounding
    (row,) = found.levels
    assert row.kept and row.after < row.before and (found.before, found.after) == (row.before, row.after)
    first, second = weights(before), weights(view.path)
    assert {name: (one.shape, one.dtype) for name, one in second.items()} == {
        name: (one.shape, one.dtype) for name, one in first.items()
    }
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert not any(name.endswith(WHOLE) for name in changed) and any(name.endswith(".scales") for name in changed)
    # Embedding and head stay, rounded or not.
    outside = {name for name in changed if ".layers." not in name and ".h." not in name}
    assert all("norm" in name or "ln_f" in name for name in outside)
    assert (results.disk_bytes, results.weight_bytes) == (old.disk_bytes, old.weight_bytes)
    # What was judged is what was written.
    dense, _, text, *_ = judged[-1]
    measured = distance(dense, load(view.path / CHECKPOINT, **CPU), text, config.batch_size)
    assert measured.kl == pytest.approx(found.after, rel=1e-5)
    # All ways to load it.
    expected = logits(ara.load(view.path / CHECKPOINT, **CPU))
    own = AutoModelForCausalLM.from_pretrained(view.path / CHECKPOINT, dtype=torch.float32)
    remote = AutoModelForCausalLM.from_pretrained(view.path / CHECKPOINT, dtype=torch.float32, trust_remote_code=True)
    for model in (own, remote):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    about = json.loads((view.path / CHECKPOINT / "config.json").read_text())["quantization_config"]
    made = json.loads((before / CHECKPOINT / "config.json").read_text())["quantization_config"]
    assert about["rounded"] == made["rounded"] and about["format_version"] == made["format_version"]
    assert about["provenance"]["recovery_after_rounding"] == [{"level": config.level, "tokens": row.tokens}]


def _view(root: Path) -> StageView:
    return Run(root).open().view(FROM)


@pytest.mark.parametrize("at", [3])
def test_a_killed_repair_resumes_to_the_same_bytes(
    root: Path, config: RecoverConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    other = Path(shutil.copytree(root, tmp_path / "other"))
    whole = recover(config, Run(other), checkpoint=FROM)
    with killed_at(at, monkeypatch):
        recover(config, Run(root), checkpoint=FROM)
    view = recover(config, Run(root), checkpoint=FROM)
    assert contents(view.path, "**/*.safetensors") == contents(whole.path, "**/*.safetensors")


def test_a_level_that_makes_it_worse_is_taken_back(
    root: Path, config: RecoverConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = LEVELS.load(config.level)
    real = level.repair

    def spoiling(self: Any, recovery: Any) -> Any:
        outcome = real(self, recovery)
        with torch.no_grad():
            for one in recovery.model.modules():
                if isinstance(one, ScaledLinear):
                    one.scales.mul_(-1)
        return outcome

    monkeypatch.setattr(level, "repair", spoiling)
    view = recover(config, Run(root), checkpoint=FROM)
    found = CheckpointResults.read(view).recovery_after_rounding
    assert found is not None and not found.levels[0].kept and found.after == found.before
    first, second = weights(root / "quantise" / "rounded"), weights(view.path)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("level", UNABLE)
def test_a_level_that_cannot_repair_it_says_why(root: Path, level: str) -> None:
    message = f"{FROM} is rounded to 4 and 8 bits, and the level {level} cannot"
    with pytest.raises(WorkspaceError, match=message) as error:
        recover(RecoverConfig(level=level, **SLOW), Run(root), checkpoint=FROM)
    assert "\n" not in str(error.value) and all(f"--level {name}" in (error.value.hint or "") for name in ABLE)
    assert not (root / "recover").exists() or not any((root / "recover").iterdir())


def test_levels_that_cannot_repair_it_are_left_out_before_one_that_can(root: Path) -> None:
    heard = Recorder()
    view = recover(RecoverConfig(level="block", **SLOW), Run(root, report=heard), checkpoint=FROM)
    found = CheckpointResults.read(view).recovery_after_rounding
    assert found is not None and [row.level for row in found.levels] == ["block"]
    assert sum(fact.startswith("closed is left out: ") for fact in heard.facts) == 1
