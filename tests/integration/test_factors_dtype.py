"""``ara decompose --factors-dtype``: in which precision factors and checkpoints are stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ara.artifacts.checkpoint import CheckpointResults
from ara.config import DecomposeConfig, PlanConfig
from ara.models import placement
from ara.planning.plan import make_plan
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.workspace.store import Workspace
from tests.commands import done
from tests.integration.test_stored_ranks import FACTORS, factors
from tests.recorder import Recorder
from tests.tiny import save_with_tokenizer, tiny_model

SAID = "factors and checkpoints are stored in bfloat16 (--factors-dtype)"


@pytest.fixture
def narrow(tmp_path: Path, tiny_settings: dict[str, Any]) -> Path:
    """Return a workspace of the tiny model whose factors are stored in bfloat16, though it runs in float32."""
    decompose(DecomposeConfig(**tiny_settings, factors_dtype="bfloat16"), Run(tmp_path / "narrow"))
    return tmp_path / "narrow"


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a model whose own precision is bfloat16, on a machine without its arithmetic."""
    folder = save_with_tokenizer(tmp_path / "published", tiny_model("llama", 0).bfloat16())
    monkeypatch.setattr(placement, "_choose_dtype", lambda device: ("float32", "no bf16 arithmetic"))
    return folder


def checkpoint_dtypes(root: Path, key: str) -> set[torch.dtype]:
    """Return the dtypes of the floating-point tensors in a checkpoint."""
    files = (root / key / "checkpoint").glob("*.safetensors")
    return {tensor.dtype for file in files for tensor in load_file(file).values() if tensor.is_floating_point()}


def test_factors_are_those_of_the_run_rounded_once(narrow: Path, finished: Path) -> None:
    ours, full = factors(narrow), factors(finished)
    assert ours.keys() == full.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, full[name] if name.endswith(".spectrum") else full[name].bfloat16()), name


def test_checkpoints_budgets_of_bytes_and_repairs_follow_the_factors(narrow: Path) -> None:
    done("allocate", "--keep", 0.7, "-m", "uniform", "--name", "half", "-w", narrow)
    done("truncate", "-w", narrow)
    done("recover", "--level", "closed", "--samples", 4, "--held-out", 2, "-w", narrow)
    for key in ("truncate/half", "recover/half-closed"):
        assert checkpoint_dtypes(narrow, key) == {torch.bfloat16}, key
    made = CheckpointResults.read(Workspace.open(narrow).view("truncate/half"))
    budget = ("--budget-bytes", made.disk_bytes, "--bits", 16, "--samples", 2, "--held-out", 2)
    done("allocate", *budget, "--no-guard", "--name", "sized", "-w", narrow)
    done("truncate", "--allocation", "sized", "-w", narrow)
    sized = CheckpointResults.read(Workspace.open(narrow).view("truncate/sized"))
    # Room for the headers of all forms is set aside.
    assert 0.9 * made.disk_bytes < sized.disk_bytes <= made.disk_bytes
    done("truncate", "--allocation", "half", "--dtype", "float32", "--name", "wide", "-w", narrow)
    assert checkpoint_dtypes(narrow, "truncate/wide") == {torch.float32}


def test_a_model_does_not_grow_for_want_of_arithmetic(
    published: Path, tmp_path: Path, tiny_settings: dict[str, Any]
) -> None:
    heard = Recorder()
    settings = {**tiny_settings, "model": str(published), "dtype": "auto"}
    made = decompose(DecomposeConfig(**settings), Run(tmp_path / "ws", report=heard))
    assert made.manifest is not None
    assert SAID in heard.facts
    assert (made.manifest.config["dtype"], made.manifest.config["factors_dtype"]) == ("float32", "bfloat16")
    plan = make_plan(PlanConfig(model=str(published), seq_len=48, device="cpu", probe=False), tmp_path)
    stored = sum(tensor.nbytes for file in made.path.glob("*.safetensors") for tensor in load_file(file).values())
    assert next(stage for stage in plan.stages if stage.stage == "decompose").disk_bytes == stored


@pytest.mark.parametrize("asked", [{"dtype": "float32"}, {"dtype": "auto", "factors_dtype": "float32"}])
def test_what_is_asked_for_is_done(
    published: Path, tmp_path: Path, tiny_settings: dict[str, Any], asked: dict[str, str]
) -> None:
    heard = Recorder()
    settings = {**tiny_settings, "model": str(published), **asked}
    decompose(DecomposeConfig(**settings), Run(tmp_path / "ws", report=heard))
    assert SAID not in heard.facts
    assert {tensor.dtype for name, tensor in factors(tmp_path / "ws").items() if name.endswith(".A")} == {torch.float32}


def test_results_of_earlier_versions_are_the_same_results(finished: Path) -> None:
    config = json.loads((finished / FACTORS / "manifest.json").read_text())["config"]
    assert config["dtype"] == "float32" and "factors_dtype" not in config
