"""Sensitivity tables kept between commands."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ara.allocation.sensitivity import SensitivityOptions, sensitivity_table
from ara.masks.context import TuningContext
from ara.masks.table_cache import LayerTable, TableCache, _write
from tests.recorder import Recorder
from tests.toy import toy_problem


@pytest.fixture
def context(tmp_path: Path) -> TuningContext:
    return toy_problem(tmp_path, [(20, 14), (9, 20)])[1]


def _passes(context: TuningContext, **options: str) -> tuple[dict[str, torch.Tensor], int]:
    before = context.model.backward_passes
    return sensitivity_table(context, SensitivityOptions(**options)).values, context.model.backward_passes - before


def test_a_table_is_made_once_and_read_back_as_it_was(context: TuningContext, tmp_path: Path) -> None:
    fresh, passes = _passes(context)
    assert passes == len(context.train)
    context = replace(context, table_cache=TableCache(tmp_path / "tables", "f" * 64))
    first, passes = _passes(context)
    assert passes == len(context.train)
    again, passes = _passes(context)
    assert passes == 0
    for name, losses in fresh.items():
        assert torch.equal(first[name], losses) and torch.equal(again[name], losses)
    assert [path.suffix for path in (tmp_path / "tables").iterdir()] == [".safetensors"]
    made = sensitivity_table(replace(context, table_cache=None), SensitivityOptions()).seconds
    assert sensitivity_table(context, SensitivityOptions()).seconds > 0 and made > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda c: replace(c, seed=1),
        lambda c: replace(c, batch_size=3),
        lambda c: replace(c, train=c.train[:-1]),
        lambda c: replace(c, train=c.train.flip(0)),
        lambda c: replace(c, table_cache=replace(c.table_cache, factors="0" * 64)),
    ],
)
def test_anything_else_makes_another_table(context: TuningContext, tmp_path: Path, change) -> None:
    context = replace(context, table_cache=TableCache(tmp_path / "tables", "f" * 64))
    _passes(context)
    assert _passes(change(context))[1] > 0
    assert _passes(context, targets="text")[1] > 0
    assert _passes(context, sums="window")[1] > 0
    assert _passes(context)[1] == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-5],
        lambda b: b[:-1] + bytes([b[-1] ^ 1]),
        lambda b: re.sub(rb'(?<="seconds":")(\d)', lambda digit: b"%d" % (int(digit[1]) ^ 1), b),
        lambda b: b"",
        lambda b: b"x" * 99,
    ],
)
def test_a_damaged_table_is_reported_and_made_anew(context: TuningContext, tmp_path: Path, damage) -> None:
    recorder = Recorder()
    context = replace(context, table_cache=TableCache(tmp_path / "tables", "f" * 64, recorder))
    first, _ = _passes(context)
    (path,) = (tmp_path / "tables").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    again, passes = _passes(context)
    assert passes > 0 and all(torch.equal(first[name], again[name]) for name in first)
    assert any("discarding the damaged sensitivity table" in text for text in recorder.warnings)
    assert _passes(context)[1] == 0


@pytest.mark.parametrize("change", [lambda table: {"other": table}, lambda table: {"m0": table[:-1]}])
def test_a_table_of_other_layers_is_thrown_away(context: TuningContext, tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Its checksum says only that it is what somebody wrote."""
    listener = Recorder()
    context = replace(context, table_cache=TableCache(tmp_path / "tables", "f" * 64, listener))
    first, _ = _passes(context)
    (path,) = (tmp_path / "tables").iterdir()
    _write(path, LayerTable(change(next(iter(first.values()))), 1.0))
    again, passes = _passes(context)
    assert passes == len(context.train) and set(again) == set(first)
    assert "discarding the damaged sensitivity table" in listener.warnings[0]


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/nowhere"), lambda path: path.symlink_to("/")]
)
def test_no_table_is_read_through_a_link_or_a_pipe(context: TuningContext, tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    listener = Recorder()
    context = replace(context, table_cache=TableCache(tmp_path / "tables", "f" * 64, listener))
    _passes(context)
    (path,) = (tmp_path / "tables").iterdir()
    path.unlink()
    make(path)
    _passes(context)
    assert "not a regular file" in listener.warnings[0]
    assert path.is_file() and not path.is_symlink()
