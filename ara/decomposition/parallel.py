"""Many small factorisations at once: one LAPACK call per thread instead of many threads per LAPACK call.

Threads inside one small eigenproblem spend much of their time waiting for each other, and when anything else runs on
the machine they wait for the scheduler as well. Layers are independent, so they are factored side by side. On a GPU
they are factored one after the other. ``benchmarks/decompose.py`` measures what it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from ara.models.memory import available_bytes
from ara.models.weights import LinearSpec

R = TypeVar("R")
S = TypeVar("S")


def map_layers(
    work: Callable[[LinearSpec, S], R], layers: Sequence[tuple[LinearSpec, S]], device: torch.device | str
) -> Iterator[R]:
    """Yield ``work(layer, its statistics)`` for every layer, in order; side by side on a CPU.

    Args:
        work: must not depend on other calls; an exception is raised when its turn comes, and what has not begun
            by then is left out.
        layers: the layers to factor, each with what ``work`` needs to know of it.
        device: where the factorisation runs.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(layers), _fitting([spec for spec, _ in layers]))
    if torch.device(device).type != "cpu" or workers < 2:
        yield from (work(spec, stats) for spec, stats in layers)
        return
    each = max(1, threads // workers)
    pool = ThreadPoolExecutor(workers, "ara-factor", lambda: torch.set_num_threads(each))
    try:
        # The dearest first, so that none of them is left for the end, when the other workers have nothing to do.
        order = sorted(range(len(layers)), key=lambda i: _cost(layers[i][0]), reverse=True)
        futures = {i: pool.submit(work, *layers[i]) for i in order}
        for i in range(len(layers)):
            yield futures[i].result()
    finally:
        # After an error or Ctrl+C only the calls that are running are waited for: LAPACK cannot be interrupted.
        pool.shutdown(wait=True, cancel_futures=True)
        # The number of threads is in part global to the process.
        torch.set_num_threads(threads)


def _cost(spec: LinearSpec) -> int:
    """Rank layers by the work of their factorisation: products with G and an eigenproblem of the smaller side."""
    return spec.dense_cost * (spec.n + 4 * spec.full_rank)


def _fitting(layers: Sequence[LinearSpec]) -> int:
    """How many of the largest factorisations fit into half of the free memory; float64 copies of G, W and factors."""
    largest = max(8 * (3 * spec.n * spec.n + 3 * spec.m * spec.m + 4 * spec.dense_cost) for spec in layers)
    return max(1, available_bytes("cpu") // 2 // largest)
