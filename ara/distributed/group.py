"""The processes of one run, and what they do together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from ara.distributed.launch import Launch
from ara.distributed.sharing import share_of_windows

Item = TypeVar("Item")


class Group:
    """One process, which does all the work; :class:`ara.distributed.torch_group.TorchGroup` has several.

    All processes of a group run the same code and call the same methods in the same order. Process 0 alone writes
    into the workspace, prints, and decides what depends on the machine.

    Attributes:
        launch: the place of this process in the run.
    """

    launch = Launch()

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.launch.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.launch.size

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, windows: int, batch_size: int) -> torch.Tensor:
        """Return the indices of the windows that this process reads; see :func:`share_of_windows`."""
        return share_of_windows(windows, batch_size, self.rank, self.size)

    def in_turn(self, count: int) -> range:
        """Return which of ``count`` pieces of work this process does: pieces go to the processes in turn."""
        return range(self.rank, count, self.size)

    def in_order(self, mine: Sequence[Item], count: int) -> list[Item]:
        """Return the results of all pieces in process 0, in their order; an empty list in the others.

        Args:
            mine: results of the pieces that :meth:`in_turn` has given this process.
            count: of all pieces.
        """
        found = self.collect(list(mine))
        return [found[number % self.size][number // self.size] for number in range(count)] if found else []

    def sum(self, tensor: torch.Tensor, ranks: Collection[int]) -> None:
        """Add up a tensor over all processes, in place.

        Args:
            tensor: of one shape and dtype in all processes. In other processes than ``ranks`` its values are lost.
            ranks: the processes that get the sum.
        """

    def total(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add up many small tensors over all processes, in place; every process gets the sums.

        Args:
            tensors: of one dtype, on one device.
        """

    def broadcast(self, value: Any = None) -> Any:
        """Return the ``value`` of process 0; the other processes need not give one. It must be picklable."""
        return value

    def gather(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of all processes in process 0, on the CPU; nothing in the others.

        The others do not wait for process 0, unless they are several calls ahead.

        Args:
            tensors: of this process; no name may occur twice.
        """
        return tensors

    def collect(self, value: Item) -> list[Item]:
        """Return the values of all processes in process 0, by rank; an empty list in the others.

        Args:
            value: of this process; must be picklable.
        """
        return [value]

    def exchange(self, value: Item) -> list[Item]:
        """Return the values of all processes, by rank, in every process.

        Args:
            value: of this process; must be picklable, with tensors on the CPU.
        """
        return [value]

    def agree(self, value: Any, what: str) -> None:
        """Check that a value is the same in all processes.

        Args:
            value: of this process; must be picklable.
            what: it is, for the error.

        Raises:
            UnequalError: it differs; every process raises it.
        """

    def check_device(self, device: str, dtype: str) -> None:
        """Check that every process has a device of this kind for itself, and computes in the same dtype.

        Raises:
            UsageError: it has none.
            UnequalError: another process has another kind of device, or another dtype.
        """

    @contextmanager
    def first_of_machine(self) -> Iterator[None]:
        """Let one process per machine run the block first, so that files are downloaded or unpacked once."""
        yield


ALONE = Group()
