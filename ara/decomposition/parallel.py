"""Runs many small factorisations in parallel on a CPU: one LAPACK call per thread.

Several threads inside one small eigenproblem mostly wait for each other. Layers are independent, so each thread factors
another layer. A GPU factors one layer after the other. ``benchmarks/decompose.py`` measures the gain.
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
    """Yield ``work(layer, its statistics)`` for every layer, in order; in parallel on a CPU.

    Args:
        work: independent of other calls. An exception is raised at its place in the order, and calls that have not
            started by then are dropped.
        layers: the layers to factor, each with its statistics.
        device: where the factorisation runs.
    """
    if not layers:
        return
    threads = torch.get_num_threads()
    workers = workers_for([spec for spec, _ in layers], available_bytes("cpu"))
    if torch.device(device).type != "cpu" or workers < 2:
        yield from (work(spec, stats) for spec, stats in layers)
        return
    each = max(1, threads // workers)
    pool = ThreadPoolExecutor(workers, "ara-factor", lambda: torch.set_num_threads(each))
    try:
        # The most expensive layers first, so that none of them runs alone at the end.
        order = sorted(range(len(layers)), key=lambda i: cost(layers[i][0]), reverse=True)
        futures = {i: pool.submit(work, *layers[i]) for i in order}
        for i in range(len(layers)):
            yield futures[i].result()
    finally:
        # After an error or Ctrl+C, wait only for the running calls: LAPACK cannot be interrupted.
        pool.shutdown(wait=True, cancel_futures=True)
        # The number of threads is partly global to the process.
        torch.set_num_threads(threads)


def cost(spec: LinearSpec) -> int:
    """Return the relative work of a factorisation: products with G and an eigenproblem of the smaller side."""
    return spec.dense_cost * (spec.n + 4 * spec.full_rank)


def factorisation_bytes(spec: LinearSpec) -> int:
    """Return the memory of one factorisation: G, H, W and factors in float64."""
    outputs = spec.m if spec.experts > 1 else spec.m * spec.m
    return 8 * (3 * spec.n * spec.n + 3 * outputs + 4 * spec.dense_cost)


def workers_for(layers: Sequence[LinearSpec], free: int) -> int:
    """Return how many of the layers are factorised at once on a CPU.

    Args:
        layers: those that :func:`map_layers` gets.
        free: bytes of memory; half of them may be used.
    """
    largest = max(factorisation_bytes(spec) for spec in layers)
    return min(torch.get_num_threads(), len(layers), max(1, free // 2 // largest))
