"""Peak memory of loading and running a model, measured in a separate process for each model.

In one process the peaks of two models could not be distinguished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from ara.environment import peak_memory_bytes
from ara.errors import UnavailableError, first_line
from ara.evaluation.processes import another_process

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
    with another_process() as pool:
        try:
            return pool.submit(_measure, load, cases).result()
        except BrokenProcessPool:
            reason = "its process was killed, perhaps because the system ran out of memory"
        except Exception as error:
            reason = first_line(error)
    raise UnavailableError(f"the peak memory cannot be measured: {reason}")


def _measure(load: Callable[[], Runner], cases: Sequence[Case]) -> int:
    runner = load()
    for case in cases:
        runner.prepare(case).run()
    return peak_memory_bytes()
