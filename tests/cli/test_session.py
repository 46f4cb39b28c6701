"""What surrounds every command: failures of the machine in one line, libraries that keep quiet, readers that go."""

import errno
import io
import json
import os
import shlex
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

from ara.errors import CorruptedError, ModelError
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


@pytest.mark.parametrize(
    ("variable", "folder"), [("ARA_CACHE_DIR", "cache/tokens"), ("HF_HOME", "hub/models"), ("HF_HOME", "hub")]
)
@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC], ids=["read-only", "permission", "full"])
def test_a_cache_that_cannot_be_written_names_its_own_variable(stderr, tmp_path, monkeypatch, variable, folder, error):
    """A home that is mounted read-only, for one: no other workspace would help."""
    monkeypatch.setenv("ARA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    assert failing(OSError(error, os.strerror(error), str(tmp_path / folder)), tmp_path / "ws") == 1
    said = stderr()
    assert f"hint: set {variable} to a writable folder" in said and " -w" not in said


def test_a_home_that_cannot_be_written_is_on_the_way_to_the_cache(stderr, tmp_path, monkeypatch):
    monkeypatch.delenv("ARA_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert failing(OSError(errno.EROFS, "Read-only file system", str(tmp_path / "home" / ".cache"))) == 1
    assert "hint: set ARA_CACHE_DIR" in stderr()


def test_too_many_open_files_are_not_taken_for_damage(stderr):
    assert failing(CorruptedError("x.safetensors cannot be read (Too many open files (24))", "make it again")) == 1
    assert stderr().endswith("hint: raise the limit, such as with ulimit -n 4096\n")
    assert failing(OSError(errno.EMFILE, "Too many open files", "/x")) == 1
    assert "error: too many open files" in stderr()


@pytest.fixture
def hears_ctrl_c():
    """A shell starts what runs in its background deaf to Ctrl+C, and so would the tests be."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_ctrl_c_whatever_a_library_makes_of_it(stderr, hears_ctrl_c):
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
    assert text.startswith("ara") and "Traceback (most recent call last)" in text and "in two lines" in text


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


# -- closed and full streams ------------------------------------------------------------------------------------


def shell(words):
    """Return exit code, stdout and stderr of a command line with redirections."""
    words = words.replace("ara ", f"{shlex.quote(sys.executable)} -m ara_cli ", 1)
    done = subprocess.run(["sh", "-c", words], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        ("ara models <&- 2>&-", 0, "Aliases", ""),
        ("ara models >&-", 141, "", ""),
        ("ara models <&- >&- 2>&-", 141, "", ""),
        ("ara --help >&-", 141, "", ""),
        ("ara generate - <&-", 2, "", "error: the prompt is empty"),
        ("ara status -w none --json 2>&-", 1, "there is no workspace", ""),
        ("ara models >/dev/full", 1, "", "error: the results cannot be written to stdout (No space left on device)"),
        ("ara --version >/dev/full", 1, "", "error: the results cannot be written to stdout"),
        ("ara status -w none --json >/dev/full", 1, "", "error: there is no workspace at none"),
        ("ara status -w none 2>/dev/full", 1, "", ""),
        ("ara nosuch 2>/dev/full", 2, "", ""),
    ],
)
def test_streams_that_are_closed_or_full(words, code, out, err):
    found = shell(words)
    assert found[0] == code, found
    assert (out in found[1]) if out else not found[1]
    assert found[2].startswith(err) if err else not found[2]
    assert found[2].count("error:") == bool(err)


def test_work_goes_on_when_nobody_can_hear_of_it(monkeypatch):
    """A full stderr costs the words of progress, a full stdout the results: only the latter is an error."""

    class Full(Stream):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    with session(Path("ws")) as s:
        s.console.step("Working")
        s.console.warn("careful")
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(typer.Exit) as caught, session(Path("ws")) as s:
        s.console.text("found")
    assert caught.value.exit_code == 1


# -- outside a command ------------------------------------------------------------------------------------------


def started(*words):
    """Return the exit code of the whole program."""
    with pytest.raises(SystemExit) as caught, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ara", *words])
        main()
    return caught.value.code


class Panic(BaseException):
    """As extensions written in Rust raise it."""


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no words")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("a bug"), 70, "error: this is a bug in ara, not in your data: RuntimeError: a bug"),
        (RecursionError("too deep"), 70, "error: this is a bug in ara, not in your data: RecursionError: too deep"),
        (Unspeakable(), 70, "error: this is a bug in ara, not in your data: Unspeakable: Unspeakable ("),
        (Panic("index out of bounds"), 70, "error: this is a bug in ara, not in your data: Panic: index out"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, "error: a package that ara needs cannot be"),
        (ModuleNotFoundError("No module named 'ara.x'", name="ara.x"), 70, "error: this is a bug in ara"),
        (MemoryError(), 1, "error: out of memory"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y.py"), 1, "error: /x/y.py: Permission denied"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
@pytest.mark.parametrize("inside", [True, False], ids=["command", "import"])
def test_whatever_ends_it_is_one_line(error, code, said, inside, stderr, tmp_path, monkeypatch, environ):
    environ.pop("ARA_DEBUG", None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def broken(*args, **kwargs):
        raise error

    if inside:
        monkeypatch.setattr("ara.workspace.store.Workspace.open", broken)
    else:
        monkeypatch.setattr("ara_cli.app.importlib.import_module", broken)
    assert started("status") == code
    found = stderr()
    if inside and code == 130:
        said = "warning: interrupted"
    assert found.startswith(said) if said else not found
    assert found.count("error:") == (code != 130)
    assert "Traceback" not in found
    assert len(list(tmp_path.iterdir())) == (code == 70)


def test_what_is_not_utf8_is_refused_in_front(stderr, capsys):
    assert started("models", "--json", "\udcff") == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: the argument '\\udcff' is not valid UTF-8\nhint: ")
    assert json.loads(shown.out)["error"] == "the argument '\\udcff' is not valid UTF-8"


@pytest.mark.parametrize("value", ["~nouser/x", "\udcff"])
def test_a_workspace_from_the_environment_that_cannot_be_a_path(value, stderr, environ):
    environ["ARA_WORKSPACE"] = value
    assert started("status") == 2
    found = stderr()
    assert "ARA_WORKSPACE" in found and found.count("rror: ") == 1


def test_home_is_written_out_in_the_workspace(stderr, environ, tmp_path):
    environ["HOME"] = str(tmp_path)
    environ["ARA_WORKSPACE"] = "~/ws"
    assert started("status") == 1
    assert f"there is no workspace at {tmp_path / 'ws'}" in stderr()


def test_a_name_with_a_line_break_stays_on_one_line(stderr):
    assert failing(ModelError("no model 'a\nb'")) == 1
    assert stderr() == "error: no model 'a\\nb'\n"


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
