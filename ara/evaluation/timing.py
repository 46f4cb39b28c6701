"""Timing: wait for the device, set its threads, and summarise repeated measurements."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Median of repeated measurements, with a lower and an upper percentile or bound."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return median, 10th and 90th percentile (linear between neighbours) of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(statistics.median(values), deciles[0], deciles[-1])


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished: its kernels run asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def turns(names: Iterable[K], rounds: int) -> Iterator[tuple[int, list[K]]]:
    """Yield round 0, the warm-up, and then 1 to ``rounds``, each with the names in their order of that round.

    The order rotates. So a temporary slowdown of the machine, or a place in the order, favours nobody.
    """
    order = list(names)
    for number in range(rounds + 1):
        yield number, order
        order = [*order[1:], *order[:1]]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set torch's number of CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
