"""The level closed on tiny models: which layers write to the residual stream, order, resuming, interruptions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ara.models.blocks import Stream
from ara.recovery import closed
from ara.recovery.closed import Closed, _Correction
from tests.recovery import MemorySaved, tiny_recovery


@pytest.mark.parametrize(
    ("family", "writer", "other"),
    [
        ("llama", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"),
        ("gpt2", "transformer.h.0.mlp.c_proj", "transformer.h.0.attn.c_proj"),
        ("phi", "model.layers.0.mlp.fc2", "model.layers.0.mlp.fc1"),
    ],
)
def test_the_layer_that_adds_last_writes_to_the_residual_stream(
    family: str, writer: str, other: str, tmp_path: Path
) -> None:
    run = _Correction(tiny_recovery(tmp_path, family))
    specs = {spec.name: spec for spec in run.recovery.specs}
    assert run._leader([specs[writer]]).writes
    assert not run._leader([specs[other]]).writes


def test_groups_follow_the_forward_pass(tmp_path: Path) -> None:
    run = _Correction(tiny_recovery(tmp_path, "llama"))
    kinds = [[spec.kind.rpartition(".")[2] for spec in group] for group in run.groups[0]]
    assert kinds == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_the_divergence_falls_and_every_layer_is_accounted_for(tmp_path: Path) -> None:
    recovery = tiny_recovery(tmp_path, "llama", windows=24, held_out=8)
    before = recovery.unseen_distance().kl
    outcome = Closed().repair(recovery)
    assert recovery.unseen_distance().kl < before
    layers = outcome.details["layers"]
    assert set(layers) == {spec.name for spec in recovery.specs}
    assert all(row["after"] <= row["before"] for row in layers.values())
    assert any(row["gamma"] for row in layers.values())
    assert outcome.tokens == recovery.train.tokens and outcome.interrupted is None


def test_without_room_for_the_dense_inputs_the_result_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, passes = Stream.input_of, {"roomy": 0, "tight": 0}
    made = {}
    for name in passes:

        def counting(stream: Stream, index: int, module: nn.Module, name: str = name) -> torch.Tensor:
            passes[name] += 1
            return real(stream, index, module)

        monkeypatch.setattr(Stream, "input_of", counting)
        if name == "tight":
            monkeypatch.setattr("ara.recovery.dense_side.available_bytes", lambda device: 0)
        made[name] = tiny_recovery(tmp_path / name, "llama")
        Closed().repair(made[name])
    assert passes["tight"] == 2 * passes["roomy"]
    both = zip(*(one.model.parameters() for one in made.values()), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in both)


def test_a_repair_that_was_cut_off_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_recovery(tmp_path / "whole", "gpt2")
    Closed().repair(whole)
    saved = MemorySaved(tmp_path / "saved")
    cut = tiny_recovery(tmp_path / "cut", "gpt2", saved=saved)
    real, calls = closed._corrected, [0]

    def interrupting(*args: object) -> object:
        calls[0] += 1
        if calls[0] == 7:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(closed, "_corrected", interrupting)
        start = {name: value.clone() for name, value in cut.model.state_dict().items()}
        cut.keep_on_interrupt = True
        outcome = Closed().repair(cut)
    assert outcome.interrupted == "interrupted after block 1 of 3" and saved.finished == ["block-000"]
    # The block that was not finished is as it was.
    now = cut.model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in start.items() if ".h.1." in name)
    again = tiny_recovery(tmp_path / "again", "gpt2", saved=saved)
    Closed().repair(again)
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())
