"""Peak memory of loading and running a model, measured in a separate process for each model.

In one process the peaks of two models could not be distinguished.
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
    """Return the peak memory, in bytes, of a new process that loads a model and runs one pass of every case.

    :func:`ara.environment.peak_memory_bytes` says what counts: with CUDA tensors on the GPU, else resident RAM,
    including Python and its libraries.

    Args:
        load: loads the model; can be pickled.
        cases: cases to run, one after the other.

    Raises:
        UnavailableError: the process failed or was killed, usually because memory was short.
    """
    # Spawned: a forked process would start with the memory of this one.
    with ProcessPoolExecutor(1, get_context("spawn"), _begin) as pool:
        try:
            return pool.submit(_measure, load, cases).result()
        except BrokenProcessPool:
            reason = "its process was killed, perhaps because the system ran out of memory"
        except Exception as error:
            reason = first_line(error)
    raise UnavailableError(f"the peak memory cannot be measured: {reason}")


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent has been killed, to release the model's memory."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _measure(load: Callable[[], Runner], cases: Sequence[Case]) -> int:
    # stdout is for results only.
    os.dup2(2, 1)
    runner = load()
    for case in cases:
        runner.prepare(case).run()
    return peak_memory_bytes()
