"""Work in another process: its memory is its own, and the system takes all of it back when the process ends."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process


def another_process() -> ProcessPoolExecutor:
    """Return an executor with one new process, which ends with the executor, or when this process is killed.

    Its stdout is our stderr: stdout is for results only.
    """
    # Spawned: a forked process would start with the memory of this one.
    return ProcessPoolExecutor(1, get_context("spawn"), _begin)


def _begin() -> None:
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent has been killed, to release the model's memory."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
