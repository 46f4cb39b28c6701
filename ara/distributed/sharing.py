"""Which process reads which windows, and which one factors which layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch


def share_of_windows(windows: int, batch_size: int, rank: int, size: int) -> torch.Tensor:
    """Return the windows that a process reads.

    Processes take batches in turn, so that each also gets its share of the first windows. The batches are those of one
    process. Only if there are fewer batches than processes, they are smaller.

    Args:
        windows: number of windows.
        batch_size: windows per pass.
        rank: of the process.
        size: number of processes.

    Returns:
        Their indices, int64, rising; none for some processes if there are more processes than windows.
    """
    enough = windows > batch_size * (size - 1)
    each = batch_size if enough else max(1, -(-windows // size))
    batches = torch.arange(windows).split(each)[rank::size]
    return torch.cat(batches) if batches else torch.arange(0)


def share_out(blocks: Iterable[Mapping[str, float]], size: int) -> dict[str, int]:
    """Return which process does which work: the most expensive work of a block first, to the least loaded process.

    Blocks are shared out in their order, so that all processes finish the first blocks at about the same time.

    Args:
        blocks: name → cost, in any unit, per block.
        size: number of processes.

    Returns:
        Name → rank.
    """
    loads = [0.0] * size
    found: dict[str, int] = {}
    for costs in blocks:
        for name in sorted(costs, key=costs.__getitem__, reverse=True):
            found[name] = loads.index(min(loads))
            loads[found[name]] += costs[name]
    return found
