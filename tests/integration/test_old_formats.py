"""Checkpoints and a workspace that an earlier version has written: they load, and compute what they computed then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ara import load
from ara.workspace.manifest import digest
from tests.commands import done
from tests.old_formats.make import CHECKPOINTS, COMMANDS, DATA, PLACE, TOKENS

NAME = "energy-0.70"
# Processors differ in the last bits of float32; logits are up to about 3.
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the data as the current folder, whose workspace knows where its model is now."""
    folder = Path(shutil.copytree(DATA, tmp_path / "old"))
    for path in (folder / "workspace").rglob("*.json"):
        if path.name in ("manifest.json", "workspace.json"):
            _moved(path, folder)
    monkeypatch.chdir(folder)
    return folder


def _moved(path: Path, folder: Path) -> None:
    """Let a manifest, or the workspace itself, find its model below ``folder``; a manifest's checksum is made anew."""
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["model"]["location"] == f"{PLACE}/model"
    document["model"]["location"] = f"{folder}/model"
    if document.pop("checksum", None):
        document["checksum"] = digest(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def command(line: str) -> Any:
    return done(*line.split(), "-w", "workspace")


def expected(name: str) -> torch.Tensor:
    return load_file(DATA / "expected.safetensors")[name]


@pytest.mark.parametrize(("place", "name"), CHECKPOINTS.items(), ids=CHECKPOINTS.values())
def test_checkpoints_give_the_logits_that_they_gave(place: str, name: str) -> None:
    about = json.loads((DATA / place / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert about["format_version"] == (2 if "pivoted" in name else 1)
    ids = torch.tensor([TOKENS])
    plain = AutoModelForCausalLM.from_pretrained(DATA / place, dtype=torch.float32).eval()
    for model in (load(DATA / place, "cpu"), plain):
        with torch.inference_mode():
            torch.testing.assert_close(model(input_ids=ids).logits, expected(name), **CLOSE)


def test_everything_in_the_workspace_is_done(old: Path) -> None:
    stages = json.loads(command("status --json").stdout)["stages"]
    assert {stage["state"] for stage in stages} == {"done"}
    kept = {path.parent.relative_to(old / "workspace").as_posix() for path in old.rglob("manifest.json")}
    assert {f"{stage['stage']}/{stage['name']}" for stage in stages} == kept
    assert {stage["stage"] for stage in stages} == {"decompose", "train-masks", "allocate", "truncate", "eval", "bench"}


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line.partition(" -")[0] + line[-60:-30])
def test_the_same_commands_find_their_results(old: Path, line: str) -> None:
    result = command(line)
    assert "is there already" in result.stderr, result.stderr


def test_the_ranks_cut_the_factors_to_the_same_checkpoint(old: Path) -> None:
    for name, close in ((NAME, {"atol": 0, "rtol": 0}), (f"{NAME}-pivoted", CLOSE)):
        command(f"truncate --allocation {name} --name again-{name}")
        made, stored = (
            load_file(old / "workspace" / "truncate" / folder / "checkpoint" / "model.safetensors")
            for folder in (f"again-{name}", name)
        )
        assert made.keys() == stored.keys()
        for tensor, value in stored.items():
            torch.testing.assert_close(made[tensor], value, **close, msg=f"{name}: {tensor}")


@pytest.mark.parametrize("name", [NAME, f"{NAME}-pivoted", "ara-0.80"])
def test_a_ranks_file_is_read(old: Path, name: str) -> None:
    stored = DATA / "workspace" / "allocate" / name / "ranks.json"
    command(f"allocate --ranks {stored} --name edited")
    before, after = (
        json.loads(path.read_text(encoding="utf-8"))
        for path in (stored, old / "workspace" / "allocate" / "edited" / "ranks.json")
    )
    assert (after["ranks"], after["layout"]) == (before["ranks"], before["layout"])


def test_trained_masks_meet_another_budget(old: Path) -> None:
    made = json.loads(
        command("allocate --keep 0.75 --method ara --no-guard --json --device cpu --dtype float32").stdout
    )
    assert 0.7 < made["results"]["linear_keep"] <= 0.75
    assert [parent["key"] for parent in made["parents"]] == ["decompose/two-sided", "train-masks/priced-0.80"]
