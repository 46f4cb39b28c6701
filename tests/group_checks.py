"""What several processes do with their group; run by :class:`tests.forks.Forks`."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from ara.distributed import torch_group
from ara.distributed.group import Group
from ara.distributed.launch import launched
from ara.distributed.torch_group import joined
from ara.errors import ProcessLostError, UnequalError, UsageError


def check_exchange() -> None:
    with joined(launched()) as group:
        _sums(group)
        _everywhere(group)
        _gathering(group)
        _agreement(group)


def _sums(group: Group) -> None:
    parts = [torch.randn(257, 3, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]
    for ranks in ({1}, {0, 2}):
        own = parts[group.rank].clone()
        group.sum(own, ranks)
        if group.rank in ranks:
            torch.testing.assert_close(own, sum(parts))
    for together in (torch_group._TOGETHER, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_group, "_TOGETHER", together)
            numbers, own = torch.tensor([1, 2, group.rank]), parts[group.rank].long()
            group.total([numbers, own])
        assert numbers.tolist() == [3, 6, 3]
        assert torch.equal(own, sum(part.long() for part in parts))
    # All processes go on from these bits.
    own = parts[group.rank].clone()
    group.total([own])
    found: list[torch.Tensor] = [torch.empty_like(own) for _ in range(3)]
    dist.all_gather(found, own)
    assert all(torch.equal(one, own) for one in found)


def _everywhere(group: Group) -> None:
    value = {"of": group.rank, "x": torch.full((group.rank,), -0.0, dtype=torch.bfloat16)}
    for rank, found in enumerate(group.exchange(value)):
        assert found["of"] == rank
        assert found["x"].signbit().tolist() == [True] * rank


def _gathering(group: Group) -> None:
    """Messages keep their order, empty ones too; the others do not wait for process 0."""
    for number in range(3):
        tensors = {f"{group.rank}.{number}": torch.full((2, number), group.rank, dtype=torch.bfloat16).T}
        found = group.gather({} if group.rank == 1 else tensors)
        if group.writes:
            assert sorted(found) == [f"0.{number}", f"2.{number}"]
            assert found[f"2.{number}"].dtype == torch.bfloat16
            assert found[f"2.{number}"].tolist() == [[2.0, 2.0]] * number
        else:
            assert found == {}
    assert group.broadcast({"of": group.rank} if group.writes else None) == {"of": 0}


def _agreement(group: Group) -> None:
    order = []
    with group.first_of_machine():
        order.append(group.rank)
    assert order == [group.rank]
    group.agree("same", "what")
    with pytest.raises(UnequalError, match="what is not the same in all processes: 0 in process 0, 1 in process 1"):
        group.agree(min(group.rank, 1), "what")
    group.check_device("cpu", "float32")
    with pytest.raises(UsageError, match="--device cuda:1 is given, and there are 3 processes"):
        group.check_device("cuda:1", "float32")
    with pytest.raises(UsageError, match="there are 3 processes on this machine, and 0 CUDA devices"):
        group.check_device("cuda", "float32")
    with pytest.raises(UnequalError, match="device and dtype"):
        group.check_device("cpu", "float32" if group.writes else "bfloat16")


def check_late_process() -> None:
    """Process 1 asks who was first long after process 0 has reported its error and ended."""
    with joined(launched()) as group:
        if group.rank == 0:
            assert group.reports_error()
            os._exit(0)
        with pytest.raises(ProcessLostError):
            group.broadcast()
        time.sleep(1)
        assert not group.reports_error()
