"""The probe of the machine, and what it makes of work."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from ara.errors import DiskFullError
from ara.planning import probe
from ara.planning.probe import Speed
from ara.planning.work import Work
from tests.shapes import shape_of


def test_every_speed_is_measured_and_no_file_stays(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_SECONDS", 0.0)
    monkeypatch.setattr(probe, "_EIGEN_WIDTH", 70)
    speed = probe.probe(shape_of(tiny_llama), "cpu", 48, tmp_path)
    assert all(getattr(speed, field.name) > 0 for field in fields(Speed))
    assert list(tmp_path.iterdir()) == []


def test_times_of_different_work_are_added() -> None:
    speed = Speed(1, 2, 4, 8, 16, 32, 64)
    assert speed.seconds(Work(1, 2, 4, 8, 16, 32, 64)) == 7
    assert speed.seconds(Work(written=64)) == 1


def test_the_typical_width_is_that_of_square_layers(tiny_llama: Path) -> None:
    shape = shape_of(tiny_llama)
    assert 28 < probe._typical_width(shape) < 92


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(probe.os, "fsync", full)
    with pytest.raises(DiskFullError, match=str(tmp_path)):
        probe._written(tmp_path)
    assert torch.is_grad_enabled()
