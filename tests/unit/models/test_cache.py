"""Files and folders enter the cache whole or not at all."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from ara.errors import AraError, DiskFullError, UsageError, disk_errors
from ara.models.cache import aside, cache_dir, hub_dir, publish_folder


def test_own_variable_wins_then_xdg_then_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("ARA_CACHE_DIR", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("ARA_CACHE_DIR")
    assert cache_dir() == tmp_path / "xdg" / "ara"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == tmp_path / "home" / ".cache" / "ara"


@pytest.mark.parametrize("variable", ["ARA_CACHE_DIR", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("value", ["~nouser/x", "\udcff"])
def test_a_folder_that_cannot_be_is_named_with_its_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.delenv("ARA_CACHE_DIR", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=variable):
        cache_dir()


def test_no_home_at_all_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("ARA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UsageError, match=r"cache folder \(set ARA_CACHE_DIR"):
        cache_dir()
    monkeypatch.delenv("HF_HOME", raising=False)
    assert hub_dir() is None


def test_aside_vanishes_also_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), aside(tmp_path / "new") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list((tmp_path / "new").iterdir()) == []


def test_aside_sweeps_what_a_killed_process_left_but_not_a_running_one(tmp_path: Path) -> None:
    old, young = tmp_path / ".aside-old", tmp_path / ".aside-young"
    old.mkdir()
    young.mkdir()
    two_days_ago = time.time() - 48 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    with aside(tmp_path):
        assert not old.exists()
        assert young.exists()


def test_disk_full_and_unwritable_cache_are_named(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="disk is full") as full, aside(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "ARA_CACHE_DIR" in str(full.value.hint) and "-w" not in str(full.value.hint)
    # What was told with the workspace's hint inside, as by the writer of a safetensors file, gets the cache's as well.
    with pytest.raises(DiskFullError) as full, aside(tmp_path), disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "ARA_CACHE_DIR" in str(full.value.hint)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AraError, match="cannot be written") as caught, aside(tmp_path / "file" / "below"):
        pass
    assert "ARA_CACHE_DIR" in str(caught.value.hint)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_home_that_is_read_only_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: Path, **options: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(AraError, match=os.strerror(number)) as caught, aside(tmp_path / "new"):
        pass
    assert "ARA_CACHE_DIR" in str(caught.value.hint)


def _make(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "whole").write_text(text)
    return folder


def _is_whole(folder: Path) -> bool:
    return (folder / "whole").is_file()


def test_the_first_of_two_writers_stays(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with aside(tmp_path) as folder:
        publish_folder(_make(folder / "made", "first"), target, _is_whole)
    with aside(tmp_path) as folder:
        publish_folder(_make(folder / "made", "second"), target, _is_whole)
    assert (target / "whole").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_damaged_folder_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "rest").write_text("somebody removed the other file")
    with aside(tmp_path) as folder:
        publish_folder(_make(folder / "made", "new"), target, _is_whole)
    assert sorted(path.name for path in target.iterdir()) == ["whole"]
    assert list(tmp_path.iterdir()) == [target]
