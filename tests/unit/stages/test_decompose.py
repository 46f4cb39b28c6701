"""What a decomposition says before it starts, and how often it runs the blocks of a model where memory is short."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from ara.config import DecomposeConfig, PlanConfig
from ara.decomposition import DECOMPOSITIONS
from ara.errors import UnsupportedModelError
from ara.models.placement import choose_placement
from ara.models.sources import ModelSource, resolve
from ara.models.weights import find_blocks
from ara.planning.decomposition import plan_decomposition
from ara.planning.plan import make_plan
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.factoring import factor_layers
from tests.commands import decompose_arguments, done
from tests.recorder import Recorder

# Looks at a few tokens, for layers that are not called, and at one window, for layers with the same input.
_LOOKS = 2
# One window with and one without reading all blocks in one pass, for chunks alone; see independent_starts.
_LOOKS_AT_CHUNKS = 2
_BATCHES = 8  # of the 16 windows of tiny_settings
_BACKWARD = 4  # half of them


@pytest.mark.parametrize(("method", "backward"), [("whitened", 0), ("two-sided", _BACKWARD)])
def test_text_is_read_once_however_many_chunks_there_are(
    method: str, backward: int, tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: Counter[int] = Counter()
    load = ModelSource.load_model

    def load_counted(self: ModelSource, *args: Any) -> Any:
        model = load(self, *args)
        for index, block in enumerate(find_blocks(model)[1]):
            block.mlp.down_proj.register_forward_pre_hook(lambda *_, index=index: runs.update([index]))
        return model

    monkeypatch.setattr(ModelSource, "load_model", load_counted)
    settings = {**tiny_settings, "method": method, "batch_size": 2}
    whole = decompose(DecomposeConfig(**settings), Run(tmp_path / "whole"))
    # The first block also shows how much memory the activations of a backward pass take.
    measured = {0: 1 if backward else 0}
    assert runs == Counter(dict.fromkeys(range(3), _LOOKS + _BATCHES + backward)) + Counter(measured)
    runs.clear()
    chunks = decompose(DecomposeConfig(**settings, moment_memory=1e-6), Run(tmp_path / "chunks"))
    once = _LOOKS + _LOOKS_AT_CHUNKS + _BATCHES + backward
    assert runs[0] == once + measured[0]
    # A later block also runs when a start at its own chunk is tried out, and when its backward pass is recomputed.
    assert runs[1] == runs[2] == once + 1 + backward
    assert whole.manifest is not None and chunks.manifest is not None
    assert whole.manifest.files == chunks.manifest.files


@pytest.mark.parametrize(
    ("method", "memory", "said"),
    [
        ("two-sided", None, "all at once"),
        ("two-sided", 1e-6, "in 3 parts, one after the other"),
        ("plain", None, None),
    ],
)
def test_memory_and_disk_are_told_before_the_model_is_loaded(
    method: str, memory: float | None, said: str | None, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    config = DecomposeConfig(**tiny_settings, method=method, moment_memory=memory)
    decompose(config, Run(tmp_path, report=(report := Recorder())))
    before = report.facts[: report.facts.index("loading the model")]
    assert [fact for fact in before if " blocks: " in fact] == (
        [] if said is None else [f"3 blocks: their second moments {said}, their factors block by block"]
    )
    (memory_fact,) = (fact for fact in before if fact.startswith("memory: about"))
    assert memory_fact.endswith("everything fits")
    (disk,) = (fact for fact in before if fact.startswith("needed on the disk: factors 1 MiB"))
    assert ("second moments" in disk) == (method != "plain")


def test_what_is_told_is_what_the_plan_says(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    same = {name: tiny_settings[name] for name in ("model", "samples", "seq_len", "device", "dtype")}
    planned = make_plan(PlanConfig(**same, probe=False), tmp_path).stages[0]
    config = DecomposeConfig(**tiny_settings, factors_dtype="float32")
    source, placement = resolve(tiny_settings["model"]), choose_placement("cpu", "float32")
    found = plan_decomposition(config, DECOMPOSITIONS.load("two-sided")(), source, placement)
    assert found.stage == planned
    assert found.stage.disk_bytes == found.factor_bytes + found.moment_bytes


def test_gradients_of_later_chunks_are_counted(
    tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def factor_counted(*args: Any) -> None:
        with FlopCounterMode(display=False) as counter:
            factor_layers(*args)
        counted.append(counter.get_total_flops())

    monkeypatch.setattr("ara.stages.decompose.factor_layers", factor_counted)
    planned = []
    source, placement = resolve(tiny_settings["model"]), choose_placement("cpu", "float32")
    for name, memory in (("whole", None), ("chunks", 1e-6)):
        settings = {**tiny_settings, "samples": 32, "moment_memory": memory, "factors_dtype": "float32"}
        config = DecomposeConfig(**settings)
        decompose(config, Run(tmp_path / name))
        planned.append(plan_decomposition(config, DECOMPOSITIONS.load("two-sided")(), source, placement).stage.flops)
    # Products of the factorisations are the same, and a few windows show at which blocks passes may start.
    assert planned[1] - planned[0] == pytest.approx(counted[1] - counted[0], rel=0.25)


def test_a_quiet_command_tells_nothing(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    words = decompose_arguments(tiny_settings, tmp_path)
    assert "memory: about" in done(*words).stderr
    again = done(*words, "--force", "-q").stderr
    assert "memory: about" not in again and "needed on the disk" not in again


def test_a_model_that_cannot_be_counted_is_decomposed(
    tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise UnsupportedModelError("its forward pass needs numbers")

    monkeypatch.setattr("ara.stages.decompose_ahead.plan_decomposition", refuse)
    view = decompose(DecomposeConfig(**tiny_settings), Run(tmp_path, report=(report := Recorder())))
    assert view.state == "done"
    assert not any(fact.startswith("memory: about") for fact in report.facts)
    assert any(fact.startswith("needed on the disk: factors 1 MiB, a later") for fact in report.facts)
