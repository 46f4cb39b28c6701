"""Shares of windows and of layers."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

from ara.distributed.group import ALONE
from ara.distributed.sharing import share_of_windows, share_out

CASES = list(product(range(24), (1, 2, 3, 5), (1, 2, 3, 6)))


def test_every_window_is_read_once() -> None:
    for windows, batch, size in CASES:
        shares = [share_of_windows(windows, batch, rank, size) for rank in range(size)]
        assert torch.equal(torch.cat(shares).sort().values, torch.arange(windows))
        assert all(torch.equal(share, share.sort().values) for share in shares)
        counts = [len(share) for share in shares]
        assert max(counts) - min(counts) <= batch


def test_batches_are_those_of_one_process_where_there_are_enough() -> None:
    for windows, batch, size in CASES:
        whole = [part.tolist() for part in torch.arange(windows).split(batch) if len(part)]
        shares = [share_of_windows(windows, batch, rank, size) for rank in range(size)]
        parts = [part.tolist() for share in shares for part in share.split(batch) if len(part)]
        if len(whole) >= size:
            assert sorted(parts) == whole
        else:
            # One smaller batch for each.
            assert len(parts) <= size
            assert all(part == list(range(part[0], part[-1] + 1)) for part in parts)


def test_one_process_reads_all_in_order() -> None:
    assert torch.equal(ALONE.share(11, 4), torch.arange(11))


def test_processes_without_windows() -> None:
    assert [share_of_windows(2, 4, rank, 4).tolist() for rank in range(4)] == [[0], [1], [], []]


def test_the_most_expensive_work_goes_first_to_the_least_loaded() -> None:
    assert share_out([{"a": 1, "b": 5, "c": 3, "d": 3}], 2) == {"b": 0, "c": 1, "d": 1, "a": 0}


def test_blocks_are_shared_out_in_their_order() -> None:
    """The second block begins with the loads that the first one leaves."""
    assert share_out([{"a": 5, "b": 1}, {"c": 2, "d": 2}], 2) == {"a": 0, "b": 1, "c": 1, "d": 1}


def test_no_process_is_ahead_by_more_than_one_layer() -> None:
    numbers = random.Random(0)
    for size in range(1, 6):
        blocks = [[numbers.randint(1, 50) for _ in range(numbers.randint(1, 7))] for _ in range(6)]
        named = [{f"{at}.{i}": cost for i, cost in enumerate(costs)} for at, costs in enumerate(blocks)]
        found = share_out(named, size)
        assert len(found) == sum(map(len, blocks))
        loads = [0.0] * size
        for costs in named:
            for name, cost in costs.items():
                loads[found[name]] += cost
            assert max(loads) - min(loads) <= max(map(max, blocks))


@pytest.mark.parametrize("size", [1, 3])
def test_no_work_is_no_share(size: int) -> None:
    assert share_out([], size) == {}
