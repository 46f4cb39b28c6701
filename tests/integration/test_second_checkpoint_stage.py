"""A second stage that writes checkpoints: one line in the table of stages, and its own function."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ara import pipeline
from ara.artifacts.checkpoint import CHECKPOINT, CheckpointResults, CheckpointSettings
from ara.config import AllocateConfig, DecomposeConfig, EvalConfig, StageConfig, TruncateConfig
from ara.errors import WorkspaceError
from ara.pipeline import Stage
from ara.stages.common import Run, begin, open_task
from ara.stages.run import run_pipeline
from ara.workspace.following import next_command
from ara.workspace.store import Workspace
from ara.workspace.view import StageView
from tests.commands import done

CPU = ("--device", "cpu", "--dtype", "float32")
POLISH = Stage(
    "polish",
    "Double the last norm",
    f"{__name__}:polish",
    consumes=("checkpoint",),
    produces="checkpoint",
    flow="checkpoint → checkpoint",
    optional=True,
)


class PolishConfig(StageConfig):
    """The toy stage has no settings but the one that every checkpoint names."""

    dtype: str = "float32"


def polish(config: StageConfig, run: Run, *, checkpoint: str | None = None, name: str | None = None) -> StageView:
    """Write a checkpoint whose last norm is doubled: the model differs, its size does not."""
    started = begin(name, checkpoint)
    with open_task("polish", run, started) as task:
        before = task.workspace.require("checkpoint", checkpoint)
        settings = {"dtype": CheckpointSettings.read(before).dtype}
        task.describe(name or before.name, settings, (before,))
        if (done := task.done()) is not None:
            return done
        with task.writer() as stage:
            shutil.copytree(before.path / CHECKPOINT, stage.folder / CHECKPOINT)
            weights = stage.folder / CHECKPOINT / "model.safetensors"
            tensors = load_file(weights)
            tensors["model.norm.weight"] = 2 * tensors["model.norm.weight"]
            save_file(tensors, weights, metadata={"format": "pt"})
            stage.loose(f"{CHECKPOINT}/README.md")
            CheckpointResults.read(before).write(stage)
        return task.view()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the toy stage into the table, after truncate."""
    place = [stage.name for stage in pipeline.STAGES].index("truncate") + 1
    monkeypatch.setattr(pipeline, "STAGES", (*pipeline.STAGES[:place], POLISH, *pipeline.STAGES[place:]))


@pytest.fixture(scope="module")
def truncated(checkpoint: Callable[..., Any], tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with a checkpoint that can be exported; only to be read."""
    root = tmp_path_factory.mktemp("truncated") / "ws"
    settings = {"text": tiny_text, "samples": 12, "seq_len": 48, "device": "cpu", "dtype": "float32"}
    run_pipeline(
        DecomposeConfig(model=str(checkpoint("llama", None).folder), **settings),
        [AllocateConfig(keep=0.7, method="energy")],
        {"truncate": TruncateConfig()},
        Run(root),
    )
    return root


@pytest.fixture
def polished(registered: None, truncated: Path, tmp_path: Path) -> Path:
    """Return a workspace with a polished checkpoint beside the truncated one."""
    root = tmp_path / "ws"
    shutil.copytree(truncated, root)
    polish(PolishConfig(), Run(root))
    return root


def checkpoint_name(root: Path) -> str:
    (view,) = [view for view in Workspace.open(root).views("checkpoint") if view.stage == "truncate"]
    return view.name


def document(root: Path, *words: Any) -> Any:
    """Run a command on the workspace and return its JSON document."""
    return json.loads(done(*words, "-w", root, "--json").stdout)


def test_every_command_takes_the_checkpoint_of_either_stage(polished: Path, tiny_text: str) -> None:
    name = checkpoint_name(polished)
    evaluate = ("eval", "--tasks", tiny_text, "--seq-len", 64, "--max-windows", 4, *CPU)
    first = document(polished, *evaluate, "--from", f"truncate/{name}", "--name", "first")
    second = document(polished, *evaluate, "--from", f"polish/{name}", "--name", "second")
    (text,) = first["results"]["tasks"]
    before, after = (found["results"]["tasks"][text]["models"] for found in (first, second))
    assert before["dense"]["nll"] == after["dense"]["nll"] and before["uniform"]["nll"] == after["uniform"]["nll"]
    assert before[name]["nll"] != after[name]["nll"]
    assert second["parents"][0]["key"] == f"polish/{name}"
    bench = ("bench", "--prefill", 8, "--decode", 8, "--rounds", 6, *CPU)
    assert document(polished, *bench, "--from", f"polish/{name}")["parents"][0]["key"] == f"polish/{name}"
    assert document(polished, "export", "--from", f"polish/{name}")["parents"][0]["key"] == f"polish/{name}"
    report = document(polished, "report", "--from", f"polish/{name}", "--name", "second")
    assert {parent["key"] for parent in report["parents"]} >= {f"polish/{name}", "eval/second", "decompose/two-sided"}
    words = ("generate", "hello", "--no-chat", "--max-new-tokens", 9, *CPU)
    answers = {
        stage: document(polished, *words, "--from", f"{stage}/{name}")["answer"] for stage in ("truncate", "polish")
    }
    assert answers["polish"] == answers["truncate"] != ""  # all logits are doubled


def test_without_a_name_the_latest_checkpoint_is_taken(polished: Path) -> None:
    name = checkpoint_name(polished)
    workspace = Workspace.open(polished)
    assert workspace.require("checkpoint").key == f"polish/{name}"
    assert workspace.ancestor(workspace.view(f"polish/{name}"), "factors").key == "decompose/two-sided"
    assert workspace.ancestor(workspace.view(f"polish/{name}"), "ranks").stage == "allocate"


def test_a_name_that_two_stages_have_must_say_which(polished: Path) -> None:
    name = checkpoint_name(polished)
    workspace = Workspace.open(polished)
    with pytest.raises(WorkspaceError, match=f"has truncate/{name} and polish/{name}") as caught:
        workspace.require("checkpoint", name)
    assert f"--from polish/{name}" in str(caught.value.hint)
    polish(PolishConfig(), Run(polished), checkpoint=f"truncate/{name}", name="other")
    assert workspace.require("checkpoint", "other").key == "polish/other"
    with pytest.raises(WorkspaceError, match="allocate/x is no checkpoint"):
        workspace.require("checkpoint", "allocate/x")


def test_status_and_the_next_command_know_the_stage(polished: Path) -> None:
    name = checkpoint_name(polished)
    workspace = Workspace.open(polished)
    found = document(polished, "status")
    assert {"stage": "polish", "name": name, "state": "done", "why": "", "remedy": ""} in found["stages"]
    polish(PolishConfig(), Run(polished), checkpoint=f"truncate/{name}", name="later")
    words = next_command(workspace, workspace.view(f"polish/{name}"))
    assert words.startswith(f"ara recover --from polish/{name} ")


def test_what_it_was_made_from_makes_it_stale(polished: Path) -> None:
    name = checkpoint_name(polished)
    shutil.rmtree(polished / "truncate" / name)
    view = Workspace.open(polished).view(f"polish/{name}")
    assert view.state == "stale" and f"truncate/{name} is gone" in view.why


def test_a_checkpoint_that_claims_to_be_its_own_parent_is_damaged(polished: Path) -> None:
    name = checkpoint_name(polished)
    workspace = Workspace.open(polished)
    view = workspace.view(f"polish/{name}")
    assert view.manifest is not None
    own = view.manifest.parents[0].model_copy(update={"key": view.key})
    forged = view.manifest.model_copy(update={"parents": (own,)}).sealed()
    (view.path / "manifest.json").write_text(forged.model_dump_json())
    found = workspace.view(view.key)
    assert found.state == "stale" and "damaged" in found.why


def test_the_pipeline_runs_it_in_its_place(
    registered: None, tmp_path: Path, tiny_settings: dict[str, Any], tiny_text: str
) -> None:
    later = {
        "eval": EvalConfig(tasks=(tiny_text,), seq_len=48, max_windows=2, device="cpu", dtype="float32"),
        "polish": PolishConfig(),
        "truncate": TruncateConfig(),
    }
    budgets = [AllocateConfig(keep=0.7, method="energy")]
    views = run_pipeline(DecomposeConfig(**tiny_settings), budgets, later, Run(tmp_path / "ws"))
    assert [view.stage for view in views] == ["decompose", "allocate", "truncate", "polish", "eval"]
    assert views[-1].manifest is not None and views[-1].manifest.parents[0].key == views[-2].key


def test_the_toy_changes_the_model(polished: Path) -> None:
    name = checkpoint_name(polished)
    first, second = (
        load_file(polished / stage / name / CHECKPOINT / "model.safetensors") for stage in ("truncate", "polish")
    )
    assert first.keys() == second.keys()
    changed = [key for key in first if not torch.equal(first[key], second[key])]
    assert changed == ["model.norm.weight"]
