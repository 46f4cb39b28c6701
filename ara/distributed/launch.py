"""What torchrun tells a process: which one it is, and of how many."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ara.errors import UsageError

_HINT = "start several processes with torchrun, or unset WORLD_SIZE to start one"


@dataclass(frozen=True)
class Launch:
    """The place of this process in a run; without torchrun it is the only one.

    Attributes:
        rank: its number.
        size: number of processes.
        local_rank: its number on this machine.
        local_size: number of processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def launched(environ: Mapping[str, str] | None = None) -> Launch:
    """Read torchrun's variables.

    Args:
        environ: the environment; ``os.environ`` by default.

    Raises:
        UsageError: WORLD_SIZE is more than 1, and another variable is missing; or one is not such a number.
    """
    environ = os.environ if environ is None else environ
    size = _number(environ, "WORLD_SIZE", 1, "1") if environ.get("WORLD_SIZE") else 1
    if size == 1:
        return Launch()
    local_size = _number(environ, "LOCAL_WORLD_SIZE", 1)
    rank, local_rank = _number(environ, "RANK", 0), _number(environ, "LOCAL_RANK", 0)
    if rank >= size or local_rank >= local_size or local_size > size:
        raise UsageError(
            f"process {rank} of {size}, {local_rank} of {local_size} on this machine: "
            "RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE contradict each other",
            _HINT,
        )
    return Launch(rank, size, local_rank, local_size)


def local_processes(environ: Mapping[str, str] | None = None) -> int:
    """Return the number of processes of this run that share the memory of this machine; 1 without torchrun."""
    found = (os.environ if environ is None else environ).get("LOCAL_WORLD_SIZE", "")
    return max(1, int(found)) if found.isdecimal() else 1


def _number(environ: Mapping[str, str], name: str, least: int, default: str | None = None) -> int:
    found = environ.get(name, default)
    if found is None:
        raise UsageError(f"WORLD_SIZE is {environ['WORLD_SIZE']}, and {name} is not set", _HINT)
    if not (found.isascii() and found.isdecimal()) or int(found) < least:
        raise UsageError(f"{name} is {found!r}, expected a number of at least {least}", _HINT)
    return int(found)
