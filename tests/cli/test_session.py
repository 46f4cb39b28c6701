"""What surrounds every command: failures of the machine in one line, libraries that keep quiet, readers that go."""

import errno
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import typer

from ara.errors import ModelError
from ara_cli.app import main
from ara_cli.session import session

REPOSITORY = Path(__file__).resolve().parents[2]
HUB_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"


class Stream(io.StringIO):
    """A text stream in memory that may claim to be a terminal."""

    def __init__(self, terminal=False):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture(autouse=True)
def environ(monkeypatch):
    """Return an environment of the test's own, in which no library has been told anything."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    own |= {"TERM": "xterm"}
    monkeypatch.setattr(os, "environ", own)
    return own


@pytest.fixture
def stderr(capsys):
    """Return a function that reads what came on stderr since it was last asked."""
    return lambda: capsys.readouterr().err


def failing(error, root=Path("ws"), **options):
    """Return the exit code of a command whose body raises ``error``."""
    with pytest.raises(typer.Exit) as caught, session(root, **options):
        raise error
    return caught.value.exit_code


# -- failures of the machine ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7"),
            "error: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB\n",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "error: out of memory:"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "error: out of memory: CUDA error"),
        (MemoryError(), "error: out of memory\n"),
    ],
    ids=["cuda", "cpu-allocator", "cublas", "python"],
)
def test_out_of_memory(stderr, error, words):
    assert failing(error) == 1
    said = stderr()
    assert words in said
    assert said.count("\n") == 2
    assert all(option in said for option in ("hint: try --device cpu", "--batch-size", "--moment-memory"))


def test_a_refused_file_is_named(stderr, tmp_path):
    assert failing(PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x")), tmp_path) == 1
    said = stderr()
    assert said.startswith(f"error: {tmp_path / 'x'}: Permission denied\nhint: check that you may")
    assert "-w" in said


def test_ctrl_c_is_ctrl_c_whatever_a_library_makes_of_it(stderr):
    """pybind11 makes an ImportError of it, torch a ValueError, and neither says that it was an interrupt."""

    def after_ctrl_c(error):
        with pytest.raises(typer.Exit) as caught, session(Path("ws")):
            with suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            raise error
        return caught.value.exit_code, stderr()

    code, told = after_ctrl_c(ValueError("could not determine the shape"))
    assert code == 130 and "interrupted" in told and "bug" not in told
    code, told = after_ctrl_c(OSError(errno.ENOSPC, "No space left on device"))
    assert code == 1 and "the disk is full" in told
    assert after_ctrl_c(ModelError("no such model")) == (1, "error: no such model\n")
    assert after_ctrl_c(typer.Exit(3)) == (3, "")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_real_failure_of_the_system(stderr, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(typer.Exit), session(tmp_path):
        (tmp_path / "file" / "below").mkdir()
    assert f"error: {tmp_path / 'file' / 'below'}: Not a directory" in stderr()


def test_a_full_disk_keeps_its_own_words(stderr):
    assert failing(OSError(errno.ENOSPC, "No space left on device")) == 1
    assert "error: the disk is full: writing ws failed" in stderr()


def test_an_error_without_a_file(stderr):
    assert failing(ConnectionResetError("the other side hung up\nmore")) == 1
    assert stderr().startswith("error: ConnectionResetError: the other side hung up\nhint: ")


def test_a_pipe_that_is_not_ours_is_an_error_like_others(stderr):
    assert failing(BrokenPipeError(errno.EPIPE, "Broken pipe")) == 1
    assert "BrokenPipeError" in stderr()


def test_it_is_in_the_json_document_too(stderr, monkeypatch):
    stdout = Stream()
    monkeypatch.setattr(sys, "stdout", stdout)
    assert failing(MemoryError(), as_json=True) == 1
    assert '"error": "out of memory"' in stdout.getvalue()


def test_a_bug_of_ours_is_one_line_and_a_kept_traceback(stderr, tmp_path, monkeypatch, environ):
    environ.pop("ARA_DEBUG", None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert failing(RuntimeError("a bug\nin two lines")) == 70
    told, hint = stderr().splitlines()
    assert told.startswith("error: this is a bug in ara, not in your data: RuntimeError: a bug (its traceback is in ")
    assert hint.startswith("hint: please report it with that file; ARA_DEBUG=1")
    (kept,) = tmp_path.iterdir()
    assert str(kept) in told
    text = kept.read_text(encoding="utf-8")
    assert text.startswith("ara ") and "Traceback (most recent call last)" in text and "in two lines" in text


def test_the_traceback_of_a_bug_is_shown_on_request(stderr, environ):
    environ["ARA_DEBUG"] = "1"
    with pytest.raises(RuntimeError, match="a bug"), session(Path("ws")):
        raise RuntimeError("a bug")
    assert stderr() == ""


def test_a_bug_before_a_command_begins_is_told_alike(stderr, tmp_path, monkeypatch, environ):
    environ.pop("ARA_DEBUG", None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("ara_cli.app.app", broken)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 70
    assert stderr().startswith("error: this is a bug in ara")


def test_our_own_errors_and_ways_to_end_stay_what_they_are(stderr):
    with pytest.raises(typer.Exit) as caught, session(Path("ws")):
        raise typer.Exit(7)
    assert caught.value.exit_code == 7
    assert stderr() == ""
    assert failing(ModelError("no such model")) == 1


# -- readers that go --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["models", "methods"])
@pytest.mark.parametrize("merged", [False, True], ids=["stdout", "both"])
def test_a_reader_that_goes_is_no_error(command, merged):
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ara_cli", command],
            cwd=REPOSITORY,
            stdout=write,
            stderr=write if merged else subprocess.PIPE,
            timeout=120,
            check=False,
        )
    finally:
        os.close(write)
    assert done.returncode == 141
    assert not done.stderr


# -- quiet libraries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terminal", "options", "hidden"),
    [(True, {}, False), (True, {"quiet": True}, True), (False, {}, True), (True, {"as_json": True}, False)],
    ids=["terminal", "quiet", "log", "json"],
)
def test_download_bars_appear_on_a_terminal_only(monkeypatch, environ, terminal, options, hidden):
    monkeypatch.setattr(sys, "stderr", Stream(terminal))
    with session(Path("ws"), **options):
        assert environ.get(HUB_BARS) == ("1" if hidden else None)
        assert environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1"


def test_the_users_own_settings_win(stderr, environ):
    environ[HUB_BARS] = "0"
    with session(Path("ws")):
        assert environ[HUB_BARS] == "0"
