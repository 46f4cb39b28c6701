"""A group of several processes, on torch.distributed.

Objects, factors and sums on the CPU go through gloo, sums on CUDA devices through NCCL. A process may wait long for a
slower one. If a process dies, the system closes its connections, which ends the waiting of the others at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch.distributed.rendezvous import rendezvous

from ara.distributed.group import Group, Item
from ara.distributed.launch import Launch
from ara.environment import versions
from ara.errors import ProcessLostError, UnavailableError, UnequalError, UsageError, first_line, is_out_of_memory

# How long all processes may take to start.
_ARRIVAL = timedelta(minutes=5)
# How long a process waits for one that is slower: factoring a large layer may take hours on a CPU.
_PATIENCE = timedelta(days=7)
# A sum over CUDA devices begins when all processes have met, so it takes seconds.
_SUM = timedelta(seconds=30)
# How long the process with the store waits for the others to read the versions.
_LAST_READ = timedelta(seconds=20)
# How many tensors may wait to be sent, two for each :meth:`Group.gather`: those of about two blocks of a model.
_AHEAD = 8
# Bytes of tensors that are copied into one message.
_TOGETHER = 32 * 2**20
# What must have the same version in all processes.
_SAME = ("ara", "torch", "transformers")
# In the error of a store that cannot listen.
_PORT_IN_USE = "EADDRINUSE"
_KEEPS = "finished work is kept: the same command continues from there"


class TorchGroup(Group):
    """Several processes that torchrun has started."""

    def __init__(self, launch: Launch, store: dist.Store) -> None:
        """Use the process group that :func:`joined` has made.

        Args:
            launch: the place of this process.
            store: shared by all processes.
        """
        self.launch = launch
        self._store = store
        self._nccl: Any = None
        # Tensors must stay alive until they are sent.
        self._sending: list[tuple[Any, torch.Tensor]] = []

    def sum(self, tensor: torch.Tensor, ranks: Collection[int]) -> None:
        """Add up a tensor over all processes; see :meth:`Group.sum`."""
        with _peers():
            self._finish_sending()
            group = self._nccl_group() if tensor.is_cuda else None
            if len(ranks) == 1:
                dist.reduce(tensor, next(iter(ranks)), group=group)
            else:
                dist.all_reduce(tensor, group=group)

    def total(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add up many small tensors over all processes."""
        for message in _messages(tensors):
            whole = torch.cat([tensor.flatten() for tensor in message])
            self.sum(whole, range(self.size))
            for tensor, part in zip(message, whole.split([tensor.numel() for tensor in message]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def broadcast(self, value: Any = None) -> Any:
        """Return the value of process 0."""
        box = [value]
        with _peers():
            self._finish_sending()
            dist.broadcast_object_list(box, 0)
        return box[0]

    def gather(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of all processes in process 0."""
        with _peers():
            if not self.writes:
                self._send(tensors)
                return {}
            found = dict(tensors)
            for rank in range(1, self.size):
                found |= self._receive(rank)
            return found

    def collect(self, value: Item) -> list[Item]:
        """Return the values of all processes in process 0."""
        found: list[Any] | None = [None] * self.size if self.writes else None
        with _peers():
            self._finish_sending()
            dist.gather_object(value, found, 0)
        return found or []

    def exchange(self, value: Item) -> list[Item]:
        """Return the values of all processes in every process."""
        found: list[Item] = []
        with _peers():
            self._finish_sending()
            # One after the other: gathered together, each would take the memory of the largest.
            for rank in range(self.size):
                box: list[Any] = [value if rank == self.rank else None]
                dist.broadcast_object_list(box, rank)
                found.append(value if rank == self.rank else box[0])
        return found

    def agree(self, value: Any, what: str) -> None:
        """Check that a value is the same in all processes."""
        found: list[Any] = [None] * self.size
        with _peers():
            dist.all_gather_object(found, value)
        _refuse_unequal(found, what)

    def check_device(self, device: str, dtype: str) -> None:
        """Check that every process has a device for itself, and computes in the same dtype."""
        self.agree(f"{device}, {dtype}", "device and dtype")
        if device == "cpu":
            return
        if device != "cuda":
            raise UsageError(
                f"--device {device} is given, and there are {self.size} processes", "use --device cuda or --device cpu"
            )
        here, devices = self.launch.local_size, torch.cuda.device_count()
        if here > devices:
            raise UsageError(
                f"there are {here} processes on this machine, and {devices} CUDA device{'s' * (devices != 1)}",
                f"use torchrun --nproc-per-node {devices}, or --device cpu",
            )

    @contextmanager
    def first_of_machine(self) -> Iterator[None]:
        """Let the first process of every machine run the block first."""
        if self.launch.local_rank > 0:
            self._meet()
        yield
        if self.launch.local_rank == 0:
            self._meet()

    def reports_error(self) -> bool:
        """Tell whether this process is the first one to report an error; call it once, before the process ends."""
        try:
            return self._store.compare_set("ara/error", "", str(self.rank)) == str(self.rank).encode()
        # The store of torchrun outlives the processes. Elsewhere it ends with process 0: nobody can tell who was first.
        except Exception:
            return True

    def _meet(self) -> None:
        with _peers():
            dist.barrier()

    def _nccl_group(self) -> Any:
        """Return the group for sums on CUDA devices, when all processes are here."""
        if self._nccl is None:
            self._nccl = dist.new_group(backend="nccl", timeout=_SUM)
        self._meet()
        return self._nccl

    def _send(self, tensors: Mapping[str, torch.Tensor]) -> None:
        body = bytearray(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
        for tensor in (torch.tensor([len(body)]), torch.frombuffer(body, dtype=torch.uint8)):
            self._sending.append((dist.isend(tensor, 0), tensor))
        while len(self._sending) > _AHEAD:
            self._sending.pop(0)[0].wait()

    def _receive(self, rank: int) -> dict[str, torch.Tensor]:
        size = torch.empty(1, dtype=torch.int64)
        dist.recv(size, rank)
        body = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(body, rank)
        found: dict[str, torch.Tensor] = load(body.numpy().tobytes())
        return found

    def _finish_sending(self) -> None:
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()


@contextmanager
def joined(launch: Launch) -> Iterator[TorchGroup]:
    """Join the other processes of the run; after an error the connections stay open until this process ends.

    Raises:
        UnavailableError: this torch has no torch.distributed.
        ProcessLostError: the others cannot be reached.
        UnequalError: the processes have different versions of ARA or its libraries.
    """
    if not (dist.is_available() and dist.is_gloo_available()):
        raise UnavailableError("this build of torch has no torch.distributed with gloo", "run one process")
    if launch.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(launch.local_rank)
    try:
        store, _, _ = next(rendezvous("env://", timeout=_ARRIVAL))
        _compare_versions(launch, store)
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("ara", store), rank=launch.rank, world_size=launch.size, timeout=_PATIENCE
        )
    except (RuntimeError, ValueError) as error:
        raise _unreachable(error, launch) from error
    yield TorchGroup(launch, store)
    with suppress(RuntimeError):  # another process may have ended already
        dist.destroy_process_group()


def _unreachable(error: Exception, launch: Launch) -> ProcessLostError:
    """Return the error for a process that cannot reach the others, or cannot listen to them."""
    who = f"process {launch.rank} of {launch.size} cannot reach the others"
    if _PORT_IN_USE in str(error):
        port = os.environ.get("MASTER_PORT", "")
        return ProcessLostError(
            f"{who}: port {port} of this machine is in use, perhaps by another run",
            "give this run a port of its own: torchrun --master-port N",
        )
    return ProcessLostError(
        f"{who}: {first_line(error)}",
        "start all processes with torchrun; between machines, GLOO_SOCKET_IFNAME names the network interface",
    )


def _messages(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield tensors that are sent together: as many as :data:`_TOGETHER` holds, in their order."""
    message: list[torch.Tensor] = []
    for tensor in tensors:
        if message and sum(one.nbytes for one in message) + tensor.nbytes > _TOGETHER:
            yield message
            message = []
        message.append(tensor)
    if message:
        yield message


def _compare_versions(launch: Launch, store: dist.Store) -> None:
    """Compare through the store: libraries of different versions may be unable to form a group."""
    mine = {name: version for name, version in versions().items() if name in _SAME}
    store.set(f"ara/versions/{launch.rank}", json.dumps(mine))
    found = [json.loads(store.get(f"ara/versions/{rank}")) for rank in range(launch.size)]
    store.set(f"ara/compared/{launch.rank}", "")
    if launch.rank == 0:
        # The store ends with this process, which may fail now: the others read it first.
        with suppress(RuntimeError):
            store.wait([f"ara/compared/{rank}" for rank in range(launch.size)], _LAST_READ)
    for name in _SAME:
        _refuse_unequal([one[name] for one in found], f"the version of {name}")


def _refuse_unequal(values: list[Any], what: str) -> None:
    other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
    if other is not None:
        raise UnequalError(
            f"{what} is not the same in all processes: {values[0]} in process 0, {values[other]} in process {other}",
            "use the same installation, model and command line on all machines",
        )


@contextmanager
def _peers() -> Iterator[None]:
    """Turn the errors of torch.distributed about a process that has ended into :class:`ProcessLostError`."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not lost or is_out_of_memory(error):
            raise
        raise ProcessLostError("another process of this run has ended", _KEEPS) from error
