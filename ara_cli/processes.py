"""A command in several processes: only process 0 prints, and only the first one that fails reports an error."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from ara.distributed.launch import Launch, launched
from ara.errors import ProcessLostError, UsageError

if TYPE_CHECKING:
    from ara.distributed.torch_group import TorchGroup


def silence_helpers() -> None:
    """Discard what Python prints in other processes than the first one, such as usage errors, which all of them have.

    Raises:
        UsageError: torchrun's variables are not valid.
    """
    if launched().rank > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 – until the process ends


class Processes:
    """The processes of one command.

    Attributes:
        launch: the place of this one; the only one until :meth:`join`.
    """

    def __init__(self) -> None:
        self.launch = Launch()
        self._joined: TorchGroup | None = None

    @contextmanager
    def join(self, several: bool) -> Iterator[TorchGroup | None]:
        """Find the other processes of the command; yields ``None`` if there are none.

        Args:
            several: whether the command can be run in several processes.

        Raises:
            UsageError: there are several, and it cannot; or torchrun's variables are not valid.
            ProcessLostError: the others cannot be reached; or, inside the block, SIGTERM.
            UnequalError: the processes have different versions of a library.
        """
        self.launch = launched()
        if self.launch.size == 1:
            yield None
            return
        if not several:
            raise UsageError(
                f"this command runs in one process, and there are {self.launch.size}",
                "run it without torchrun (or unset WORLD_SIZE)",
            )
        from ara.distributed.torch_group import joined

        with joined(self.launch) as group, _ending_on_sigterm():
            self._joined = group
            yield group

    def reports(self, error: BaseException) -> bool:
        """Tell whether this process reports an error that ended it."""
        if self._joined is not None:
            return self._joined.reports_error()
        # Before that, all processes fail in the same way, unless they cannot reach each other.
        return self.launch.rank == 0 or isinstance(error, ProcessLostError)


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Raise an error on SIGTERM, by which torchrun ends the other processes when one has failed.

    After an error SIGTERM is ignored, so that the error can be reported; torchrun kills after 30 seconds.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise ProcessLostError(
            "another process of this run has failed, or the job was cancelled (SIGTERM)",
            "finished work is kept: the same command continues from there",
        )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    signal.signal(signal.SIGTERM, before)
