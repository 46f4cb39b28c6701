"""What every registered level of recovery must do, through the stage; a new file is tested by being registered."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ara.artifacts.checkpoint import CHECKPOINT, CheckpointResults
from ara.config import AllocateConfig, DecomposeConfig, RecoverConfig, TruncateConfig
from ara.errors import UsageError
from ara.models.checkpoint import load
from ara.models.low_rank import low_rank_layers
from ara.recovery import LEVELS, levels_to_run
from ara.recovery.base import Level
from ara.stages.common import Run
from ara.stages.recover import recover
from ara.stages.run import run_pipeline
from ara.workspace.view import StageView
from tests.damage import contents
from tests.killed import killed_at
from tests.tiny import save_tiny

NAMES = LEVELS.names()
CPU = {"device": "cpu", "dtype": "float32"}
# Little work, and large steps: a tiny random model learns nothing otherwise.
SETTINGS: dict[str, Any] = {
    **CPU,
    "samples": 24,
    "held_out": 8,
    "block_rate": 3e-3,
    "block_epochs": 2,
    "steps": 8,
    "batch": 4,
    "check_every": 2,
    "save_every": 1,
    "rate": 3e-4,
}


@pytest.fixture(scope="module", params=[("llama", "pivoted"), ("gpt2", "factors")], ids=lambda case: "-".join(case))
def truncated(request: pytest.FixtureRequest, tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with a truncated checkpoint; only to be read."""
    family, layout = request.param
    folder = tmp_path_factory.mktemp(family)
    run_pipeline(
        DecomposeConfig(model=str(save_tiny(folder / "model", family)), text=tiny_text, samples=16, seq_len=32, **CPU),
        [AllocateConfig(keep=0.4, method="energy", layout=layout)],
        {"truncate": TruncateConfig()},
        Run(folder / "ws"),
    )
    return folder / "ws"


@pytest.fixture
def root(truncated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(truncated, tmp_path / "ws"))


@pytest.fixture(params=NAMES)
def config(request: pytest.FixtureRequest) -> RecoverConfig:
    return RecoverConfig(level=request.param, only=True, **SETTINGS)


def weights(view: StageView) -> dict[str, torch.Tensor]:
    return load_file(view.path / CHECKPOINT / "model.safetensors")


def before_of(root: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    (folder,) = (root / "truncate").iterdir()
    return folder / CHECKPOINT, load_file(folder / CHECKPOINT / "model.safetensors")


# -- the registry ---------------------------------------------------------------------------------------------------


def test_a_level_runs_the_ones_before_it_unless_it_is_alone() -> None:
    assert NAMES[0] == "closed"
    assert [levels_to_run(name, only=False) for name in NAMES] == [NAMES[: i + 1] for i in range(len(NAMES))]
    assert [levels_to_run(name, only=True) for name in NAMES] == [[name] for name in NAMES]
    with pytest.raises(UsageError, match="did you mean closed"):
        levels_to_run("close", only=False)


@pytest.mark.parametrize("name", NAMES)
def test_every_level_is_a_level(name: str) -> None:
    assert issubclass(LEVELS.load(name), Level)


def test_names_are_listed_without_torch() -> None:
    code = "import sys; from ara.recovery import LEVELS; LEVELS.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_setting_belongs_to_one_level_or_to_all() -> None:
    own = [name for entry in LEVELS for name in entry.load().settings]
    assert len(own) == len(set(own)) and set(own) < set(RecoverConfig.model_fields)
    assert {"text", "samples", "held_out", "seq_len", "seed", "level", "only"} <= set(RecoverConfig.model_fields) - set(
        own
    )


# -- what a level does ----------------------------------------------------------------------------------------------


def test_it_comes_nearer_to_the_dense_model_at_the_same_ranks(root: Path, config: RecoverConfig) -> None:
    folder, before = before_of(root)
    view = recover(config, Run(root))
    results = CheckpointResults.read(view)
    assert results.recovery is not None
    (row,) = results.recovery.levels
    assert row.level == config.level and row.kept and row.after < row.before and row.tokens > 0
    assert results.recovery.after == row.after and results.recovery.before == row.before
    after = weights(view)
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    ranks = low_rank_layers(load(view.path / CHECKPOINT, **CPU))
    assert ranks and ranks == low_rank_layers(load(folder, **CPU))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # Embeddings and head stay; a level may train the final norm.
    outside = {name for name in changed if ".layers." not in name and ".h." not in name}
    assert all("norm" in name or "ln_f" in name for name in outside) and changed - outside
    provenance = json.loads((view.path / CHECKPOINT / "config.json").read_text())["quantization_config"]["provenance"]
    assert provenance["recovery"] == [{"level": config.level, "tokens": row.tokens}]


def test_a_repeated_repair_gives_the_same_bytes(root: Path, config: RecoverConfig, tmp_path: Path) -> None:
    other = Path(shutil.copytree(root, tmp_path / "other"))
    views = [recover(config, Run(folder)) for folder in (root, other)]
    assert contents(views[0].path, "**/*.safetensors") == contents(views[1].path, "**/*.safetensors")


@pytest.mark.parametrize("at", [2, 4])
def test_a_killed_repair_resumes_to_the_same_bytes(
    root: Path, config: RecoverConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    other = Path(shutil.copytree(root, tmp_path / "other"))
    whole = recover(config, Run(other))
    with killed_at(at, monkeypatch):
        recover(config, Run(root))
    (partial,) = (path for path in (root / "recover").iterdir() if path.name.endswith(".partial"))
    assert any(path.name.startswith((".work-", ".checkpoint")) for path in partial.iterdir())
    view = recover(config, Run(root))
    assert contents(view.path, "**/*.safetensors") == contents(whole.path, "**/*.safetensors")
    first, second = (CheckpointResults.read(one).recovery for one in (view, whole))
    assert first is not None and second is not None
    assert first.after == second.after and first.levels[0].tokens == second.levels[0].tokens
    left = {path.name for path in view.path.iterdir()}
    assert not any(name.startswith(".") for name in left) and not partial.exists()
