"""Peak memory of a model that is loaded and run, measured in a process of its own.

In one process the memory of two models cannot be told apart, and the high-water mark is that of whatever was largest.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING

from ara.environment import peak_memory_bytes
from ara.errors import UnavailableError, first_line

if TYPE_CHECKING:
    from ara.evaluation.cost import Case
    from ara.evaluation.speed import Runner


def peak_memory(load: Callable[[], Runner], cases: Sequence[Case]) -> int:
    """Return the most memory that a fresh process holds which loads a model and does one pass of every case, in bytes.

    What is counted is told in :func:`ara.environment.peak_memory_bytes`: with CUDA tensors on the GPU, else resident
    RAM, with Python and its libraries.

    Args:
        load: brings the model into memory; can be pickled.
        cases: what is run, one after the other.

    Raises:
        UnavailableError: the process failed or was ended, for want of memory as a rule.
    """
    # Not forked: a copy of this process would begin with the memory of this one.
    with ProcessPoolExecutor(1, get_context("spawn"), _begin) as pool:
        try:
            return pool.submit(_measure, load, cases).result()
        except BrokenProcessPool:
            reason = "its process was ended by the system, which may have run out of memory"
        except Exception as error:
            reason = first_line(error)
    raise UnavailableError(f"the peak memory cannot be measured: {reason}")


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot end this process, which would hold a whole model until somebody finds it."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _measure(load: Callable[[], Runner], cases: Sequence[Case]) -> int:
    # Results alone go to stdout, and this process has none.
    os.dup2(2, 1)
    runner = load()
    for case in cases:
        runner.prepare(case).run()
    return peak_memory_bytes()
