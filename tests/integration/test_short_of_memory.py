"""Stages with hardly any free memory: weights, outputs and activations go elsewhere; results have the same bytes."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from ara.artifacts.checkpoint import CheckpointResults
from ara.config import (
    AllocateConfig,
    BenchConfig,
    DecomposeConfig,
    EvalConfig,
    RecoverConfig,
    TrainMasksConfig,
    TruncateConfig,
)
from ara.errors import DiskFullError, UsageError
from ara.models import kept, memory, recompute
from ara.models.offload import Offload
from ara.models.placement import Placement
from ara.recovery.base import LevelOutcome, Recovery
from ara.recovery.block import Block
from ara.stages import recovery_place
from ara.stages.allocate import allocate
from ara.stages.bench import bench
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.evaluate import evaluate
from ara.stages.recover import recover
from ara.stages.run import run_pipeline
from ara.stages.train_masks import train_masks
from ara.workspace.view import StageView
from tests.commands import ara
from tests.killed import killed_at
from tests.recorder import Recorder
from tests.tiny import save_tiny


@contextmanager
def _hardly_any_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        for module in (memory, kept, recompute, recovery_place):
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


REPAIR = RecoverConfig(device="cpu", dtype="float32", samples=12, held_out=4, block_epochs=1, batch_size=5)


@pytest.mark.parametrize("look_ahead", [False, True])
def test_a_repair_has_the_same_bytes(look_ahead: bool, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = REPAIR.model_copy(update={"level": "block", "look_ahead": look_ahead})
    expected, report = recover(config, Run(copied), name="much"), Recorder()
    with _hardly_any_memory(monkeypatch):
        found = recover(config, Run(copied, report=report), name="hardly")
    assert _weights(found) == _weights(expected)
    folder = copied / "cache" / "outputs"
    assert sum(f"compressed weights are changed in files of {folder}" in fact for fact in report.facts) == 1
    # Outputs of both levels, and inputs of blocks for the Fisher information.
    assert sum(f"they are kept in {folder}" in fact for fact in report.facts) == 2
    assert sum(f"of block inputs in {folder}" in fact for fact in report.facts) == 1
    assert not list(folder.iterdir())


def _weights(view: StageView) -> Any:
    return _files(view)["checkpoint/model.safetensors"]


@pytest.mark.parametrize("at", [2, 5, 8])
def test_a_killed_repair_goes_on_in_files(at: int, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the first level, in the second one, and before the checkpoint."""
    config = REPAIR.model_copy(update={"level": "block"})
    expected = recover(config, Run(copied), name="whole")
    with _hardly_any_memory(monkeypatch):
        with killed_at(at, monkeypatch):
            recover(config, Run(copied), name="again")
        found = recover(config, Run(copied), name="again")
    assert _weights(found) == _weights(expected)
    assert not list((copied / "cache" / "outputs").iterdir())


@pytest.mark.parametrize("scarce", [False, True])
def test_a_level_that_is_taken_back_leaves_the_weights(
    scarce: bool, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, views = REPAIR.model_copy(update={"level": "block"}), []
    for factor in (1, -3):

        def repair(level: Block, recovery: Recovery, factor: int = factor) -> LevelOutcome:
            for parameter in recovery.model.parameters():
                parameter.mul_(factor)
            return LevelOutcome(tokens=1)

        monkeypatch.setattr(Block, "repair", repair)
        with _hardly_any_memory(monkeypatch) if scarce else nullcontext():
            views.append(recover(config, Run(copied), name=f"times{factor}"))
    (same, worse) = (CheckpointResults.read(view).recovery for view in views)
    assert same is not None and worse is not None
    assert not worse.levels[1].kept and worse.after == same.after < same.before
    assert _weights(views[0]) == _weights(views[1])


def test_training_the_whole_model_is_refused_if_it_does_not_fit(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = REPAIR.model_copy(update={"level": "distill"})
    with _hardly_any_memory(monkeypatch), pytest.raises(UsageError, match="distill changes all weights") as refused:
        recover(config, Run(copied))
    assert refused.value.hint == "use --level block or --level closed; --offload none tries it all the same"
    assert not (copied / "recover").exists()


def test_a_full_disk_is_found_before_a_repair(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("ara.stages.disk_room.shutil.disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(DiskFullError, match=r"compressed weights .* MiB, unfinished work"):
        recover(REPAIR, Run(copied, offload="disk"))
    assert not (copied / "recover").exists()


@pytest.mark.parametrize(("offload", "fits"), [("auto", True), ("disk", True), ("none", False)])
def test_weights_go_into_files_if_they_do_not_fit_or_if_asked(
    offload: Offload, fits: bool, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Recorder()
    with nullcontext() if fits else _hardly_any_memory(monkeypatch):
        recover(REPAIR, Run(copied, report=report, offload=offload))
    assert any("are changed in files" in fact for fact in report.facts) == (offload == "disk")


def test_experts_are_repaired_in_files(tiny_text: str, tmp_path: Path) -> None:
    """One by one and all at once: the results differ by rounding at most."""
    words = {"text": tiny_text, "samples": 24, "seq_len": 48, "device": "cpu", "dtype": "float32"}
    run_pipeline(
        DecomposeConfig(model=str(save_tiny(tmp_path / "model", "mixtral")), **words),
        [AllocateConfig(keep=0.5, method="energy")],
        {"truncate": TruncateConfig()},
        Run(tmp_path / "ws"),
    )
    found = []
    for offload in ("none", "disk"):
        view = recover(REPAIR, Run(tmp_path / "ws", offload=offload), name=offload)
        results = CheckpointResults.read(view).recovery
        assert results is not None and results.levels[0].kept and results.after < results.before
        found.append(results.after)
    assert found[1] == pytest.approx(found[0], rel=1e-2)


def test_another_dtype_than_the_stored_one_is_said(copied: Path) -> None:
    report = Recorder()
    recover(REPAIR.model_copy(update={"dtype": "bfloat16"}), Run(copied, report=report, offload="disk"))
    assert sum("they are stored in float32 and must fit into memory once" in fact for fact in report.facts) == 1


@pytest.mark.parametrize("stage", ["decompose", "tuning", "recover", "evaluate", "bench"])
def test_weights_stay_in_files_on_a_cpu_only(
    stage: str, copied: Path, tiny_settings: dict[str, Any], tiny_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"ara.stages.{stage}.choose_placement", lambda *_: Placement("cuda", "bfloat16", "a GPU"))
    run = Run(copied, offload="disk")
    calls: dict[str, Callable[[], StageView]] = {
        "decompose": lambda: decompose(DecomposeConfig(**tiny_settings), run),
        "tuning": lambda: allocate(AllocateConfig(keep=0.7, method="sensitivity"), run),
        "recover": lambda: recover(REPAIR, run),
        "evaluate": lambda: evaluate(EvalConfig(tasks=(tiny_text,)), run),
        "bench": lambda: bench(BenchConfig(), run),
    }
    with pytest.raises(UsageError, match="--offload disk is given, and the model runs on cuda") as refused:
        calls[stage]()
    assert refused.value.hint is not None and refused.value.hint.startswith("use --device cpu")


def test_weights_in_ram_for_a_gpu_are_no_choice(tiny_llama: Path) -> None:
    result = ara("decompose", tiny_llama, "--offload", "ram")
    assert result.exit_code == 2
    assert "'--offload': Value error, 'ram' is not one of 'auto', 'none', 'disk'" in result.stderr
