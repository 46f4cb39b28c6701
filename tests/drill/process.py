"""Runs ``ara`` in a forked process and strikes it: by a signal, in the middle of a file, or with a full disk.

The libraries are imported once; a fork takes milliseconds. Moments are a time after the start, or the n-th time that
the process is about to touch the disk (Python's audit events of opening for writing, renaming, removing, and fsync), so
that windows are hit which last microseconds. The process strikes itself there: no hook in the product is needed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.drill.disk import end_with_parent

# Seconds; the longest command takes a tenth of it.
_TOO_LONG = 150
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_TOUCHES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.symlink", "os.link"}
_READY = b"ready"
# Linux: how much a pipe holds before its writer waits.
_SET_PIPE_SIZE, _PIPE_BYTES = 1031, 2**20


@dataclass(frozen=True)
class Fault:
    """What befalls a process; by default nothing.

    Attributes:
        signal: sent to it, at ``after`` or ``at``.
        after: seconds after its start.
        at: the touch of the disk before which it comes, from 1 on.
        size: no file grows beyond so many bytes: what is written beyond ends the process there and then (SIGXFSZ).
        full: from the touch ``at`` on the disk is full.
    """

    signal: int | None = None
    after: float | None = None
    at: int | None = None
    size: int | None = None
    full: bool = False

    def __str__(self) -> str:
        what = "full disk" if self.full else signal.Signals(self.signal).name if self.signal else ""
        if self.size is not None:
            return f"death at byte {self.size} of a file"
        if self.after is not None:
            return f"{what} after {self.after:.3f} s"
        return f"{what} at touch {self.at}" if self.at else "nothing"


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: exit code, or minus the signal that ended it.
        out: its stdout.
        err: its stderr.
        seconds: that it ran.
        touches: of the disk; 0 where it did not live to tell.
        left: processes that it left behind.
    """

    code: int
    out: str
    err: str
    seconds: float
    touches: int = 0
    left: int = 0

    @property
    def errors(self) -> list[str]:
        """Lines that tell an error."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]


@dataclass
class _Striker:
    """Counts touches of the disk below ``root``, and strikes at the chosen one."""

    root: str
    fault: Fault
    touches: int = 0
    striking: bool = field(default=False, repr=False)

    def install(self) -> None:
        real = os.fsync

        def fsync(descriptor: Any) -> None:
            self.touch(allocates=True)
            real(descriptor)

        os.fsync = fsync
        sys.addaudithook(self._heard)

    def touch(self, allocates: bool) -> None:
        self.touches += 1
        fault = self.fault
        if fault.at is None or self.touches < fault.at:
            return
        if fault.full and allocates:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if fault.signal is not None and self.touches == fault.at:
            os.kill(os.getpid(), fault.signal)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITING and self._is_ours(path):
                self.touch(allocates=True)
        elif event in _TOUCHES and (self._is_ours(arguments[0]) or arguments[-1] not in (-1, None)):
            self.touch(allocates=event == "os.mkdir")

    def _is_ours(self, path: Any) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and os.path.abspath(os.fsdecode(path)).startswith(self.root)


def ara(arguments: Sequence[str], root: Path, fault: Fault = Fault()) -> Ended:
    """Run one command of ``ara`` in a forked process whose working folder is ``root``, and strike it."""
    pipes = [os.pipe() for _ in range(3)]
    sys.stdout.flush()
    sys.stderr.flush()
    for _, end in pipes:
        fcntl.fcntl(end, _SET_PIPE_SIZE, _PIPE_BYTES)
    child = os.fork()
    if child == 0:
        _child(arguments, root, fault, [end for _, end in pipes])
    for _, end in pipes:
        os.close(end)
    # What strikes it before it is ready strikes the drill, not the command.
    assert os.read(pipes[2][0], len(_READY)) == _READY, "the process begins"
    begun = time.monotonic()
    status = _wait(child, begun, fault)
    seconds = time.monotonic() - begun
    left = _left_behind(child)
    out, err, told = (_drained(begin) for begin, _ in pipes)
    touches = int(told or 0)
    return Ended(os.waitstatus_to_exitcode(status), out, err, seconds, touches, left)


def _child(arguments: Sequence[str], root: Path, fault: Fault, ends: list[int]) -> None:
    """Become the process; never returns."""
    code = 70
    try:
        os.setsid()
        end_with_parent()
        for stream, end in zip((1, 2), ends, strict=False):
            os.dup2(end, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(root)
        tempfile.tempdir = str(root)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if fault.size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, fault.size))
        striker = _Striker(f"{root}{os.sep}", fault)
        striker.install()
        os.write(ends[2], _READY)
        code = _main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(ends[2], str(striker.touches).encode())
    finally:
        os._exit(code)


def _main(arguments: Sequence[str]) -> int:
    from ara.evaluation import footprint
    from ara_cli.app import main

    # A fresh process would import the libraries anew, which takes longer than all of a drill's other work.
    footprint.get_context = lambda method: get_context("fork")

    sys.argv = ["ara", *arguments]
    try:
        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:  # as Python would: it is a fault of ours, and the drill sees the traceback
        traceback.print_exc()
        return 1
    return 0


def _wait(child: int, begun: float, fault: Fault) -> int:
    """Wait for the process to end; send the signal when its time has come, and kill what hangs."""
    due = None if fault.after is None or fault.signal is None else begun + fault.after
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        now = time.monotonic()
        if due is not None and now >= due:
            assert fault.signal is not None
            # From a terminal, Ctrl+C goes to the whole group.
            (os.killpg if fault.signal == signal.SIGINT else os.kill)(child, fault.signal)
            due = None
        if now - begun > _TOO_LONG:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.001)


def _left_behind(session: int) -> int:
    """Return how many processes of a session outlive their leader by more than a moment, and end them."""
    for _ in range(100):
        left = [int(name) for name in os.listdir("/proc") if name.isdigit() and _session_of(name) == session]
        if not left:
            return 0
        time.sleep(0.02)
    for process in left:
        os.kill(process, signal.SIGKILL)
    return len(left)


def _session_of(process: str) -> int | None:
    try:
        fields = Path("/proc", process, "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[3])


def _drained(end: int) -> str:
    with os.fdopen(end, "rb") as file:
        return file.read().decode(errors="replace")
