"""Tensors that are kept in memory or in files without names."""

from __future__ import annotations

import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from ara.models import kept
from ara.models.kept import Keeper, in_a_file
from tests.mapped import bytes_in_files
from tests.recorder import Recorder

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")


@linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_a_copy_in_a_file_equals_the_tensor_and_changes_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(15).view(3, 5).to(dtype).T
    folder = tmp_path / "made" / "by it"
    copy = in_a_file(tensor, folder)
    assert torch.equal(copy, tensor) and copy.dtype == dtype
    assert bytes_in_files([copy], folder) == copy.nbytes and bytes_in_files([tensor], folder) == 0
    copy += 1
    assert torch.equal(copy, tensor + 1)
    assert bytes_in_files([copy], folder) == copy.nbytes
    # Its file has no name, so nothing is left after a kill.
    assert not list(folder.iterdir())


def test_a_copy_of_no_numbers_is_none_as_well(tmp_path: Path) -> None:
    copy = in_a_file(torch.empty(0, 4), tmp_path)
    assert copy.shape == (0, 4)


@pytest.mark.parametrize(
    ("free", "room", "folder", "said"),
    [
        (400, 0, True, None),
        (399, 400, True, "they are kept in"),
        (399, 399, True, "they stay there, because"),
        (399, 400, False, None),
    ],
)
def test_where_tensors_are_placed(
    free: int, room: int, folder: bool, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of the free memory, or of the disk, is for 100 bytes."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(kept, "available_bytes", lambda device: free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 0, room))
    report = Recorder()
    keeper = Keeper(tmp_path if folder else None, report)
    keeper.place(100)
    assert [said in fact for fact in report.facts if said] == ([True] if said else []) and len(report.facts) == bool(
        said
    )
    if sys.platform == "linux":
        assert bool(bytes_in_files([keeper.keep(torch.ones(25))], tmp_path)) == (said == "they are kept in")
