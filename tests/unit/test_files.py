"""Reading within bounds, and never writing through a link."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ara.errors import UsageError
from ara.files import expand_user, open_regular, read_bytes, read_text, remove, write_text


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_bytes(tmp_path / "link") == b"content"


def test_the_limit_is_exact(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError) as found:
        read_bytes(tmp_path / "file", 4)
    assert found.value.strerror == "it has more than 4 bytes"
    assert found.value.filename == str(tmp_path / "file")


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a pipe, expected a regular file"):
        open_regular(tmp_path / "pipe")


def test_devices_sockets_and_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="a device"):
        read_bytes(Path("/dev/zero"))
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)
    monkeypatch.chdir(tmp_path)  # the path of a socket has a length limit
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(OSError):
            read_bytes(Path("socket"))


def test_what_is_not_utf8_is_a_value_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError):
        read_text(tmp_path / "file")


def test_writing_replaces_a_file_and_follows_no_link(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "a longer text")
    write_text(tmp_path / "file", "Ä", sync=True)
    assert (tmp_path / "file").read_bytes() == "Ä".encode()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    for link in ("link", "dangling"):
        with pytest.raises(OSError, match="does not write through links"):
            write_text(tmp_path / link, "new")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "Ä"
    assert not (tmp_path / "nowhere").exists()


def test_home_and_users_are_written_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_user("~/a", "--output") == tmp_path / "a"
    assert expand_user(Path("a/~b"), "--output") == Path("a/~b")
    assert expand_user("a/ü", "--output") == Path("a/ü")


@pytest.mark.parametrize("path", ["~nouser/x", "~\n/x", "a\udcff", "a\0b", "\ud800"])
def test_what_cannot_be_a_path_is_a_usage_error(path: str) -> None:
    with pytest.raises(UsageError, match=r"^--output '") as found:
        expand_user(path, "--output")
    assert str(found.value).isprintable() and found.value.hint


def test_a_home_that_is_no_text_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/\udcff")
    with pytest.raises(UsageError, match="UTF-8"):
        expand_user("~/a", "ARA_CACHE_DIR")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME, and a user that nobody knows
    with pytest.raises(UsageError, match="HOME is not set"):
        expand_user("~/a", "ARA_CACHE_DIR")


def test_a_link_is_deleted_and_not_what_it_points_to(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("mine")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "link").symlink_to(kept)
    (folder / "file").write_text("x")
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "link", "dangling", "nothing"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").read_text() == "mine"


def test_a_folder_goes_also_where_rmtree_may_not_open_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "file").write_text("x")
    (folder / "link").symlink_to(tmp_path)
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)
    remove(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_not_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe"):
        write_text(tmp_path / "pipe", "x")
