"""The amount of free memory, for trading speed against memory, and where the weights of a model can be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch

from ara.distributed.launch import local_processes

# Assumed if the system does not report it.
_UNKNOWN = 4 << 30

# Where weights are; see :func:`place_of_weights`.
Place = Literal["memory", "mapped", "nowhere"]

# Linux reports memory, and the limits of containers and batch jobs, here.
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")

# Per version of control groups: files with limit and usage in bytes, and the names of cached file pages in memory.stat.
_VERSION_2 = ("memory.max", "memory.current", ("active_file", "inactive_file"))
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))


def available_bytes(device: torch.device | str) -> int:
    """Return the free memory of ``device`` in bytes: GPU memory for CUDA, else what this process can still get.

    On Linux it is the minimum over the system and the control groups (containers, batch jobs), on macOS half of all
    memory, and 4 GiB if the system does not report it. Several processes of one run on this machine get equal parts.
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _available_in_all() // local_processes()


def _available_in_all() -> int:
    if sys.platform == "darwin":
        return _half_of_macos()
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
    except OSError:
        lines = []
    system = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*system, *_left_in_groups()], default=_UNKNOWN)


def place_of_weights(weights: int, free: int, others: int | None = None) -> Place:
    """Decide where weights are that can be pages of files (:mod:`ara.models.offload`).

    The system drops such pages when memory is short, and reads them again.

    Args:
        weights: bytes of these weights.
        free: bytes of memory, see :func:`available_bytes`.
        others: bytes of everything else that must be in memory at the same time. ``None`` if it is not known, as when a
            model is loaded: then half of the free memory is left for it.

    Returns:
        ``memory``: everything fits. ``mapped``: all but the weights fits, and their pages come and go. ``nowhere``: a
        larger machine is needed.
    """
    others = free - free // 2 if others is None else others
    if weights + others <= free:
        return "memory"
    return "mapped" if others <= free else "nowhere"


def _left_in_groups() -> Iterator[int]:
    """Yield the bytes left in each control group of this process and in their parents, whose limits hold as well."""
    try:
        entries = [line.split(":", 2) for line in (_PROC / "self" / "cgroup").read_text().splitlines()]
    except OSError:
        entries = []
    # "0::/path" names the group of version 2, "4:memory:/path" one of version 1. In a container the path may be that of
    # the host; the mounted root is then the container's own group, and the loops below end there.
    paths = {entry[1]: entry[2].lstrip("/") for entry in entries if len(entry) == 3}
    for root, name, files in ((_CGROUPS, "", _VERSION_2), (_CGROUPS / "memory", "memory", _VERSION_1)):
        group = root / paths.get(name, "")
        for folder in (group, *group.parents):
            left = _left(folder, *files)
            if left is not None:
                yield left
            if folder == root:
                break


def _left(group: Path, limit_name: str, usage_name: str, cached: tuple[str, ...]) -> int | None:
    """Return limit - usage in bytes, or ``None`` without a limit; cached file pages count as free."""
    try:
        limit = int((group / limit_name).read_text())  # version 2 writes "max" for none
        used = int((group / usage_name).read_text())
    except (OSError, ValueError):
        return None
    with suppress(OSError, ValueError):
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= sum(int(stat.get(name, 0)) for name in cached)
    return max(0, limit - max(0, used))


def _half_of_macos() -> int:
    try:
        size = subprocess.run(["sysctl", "-n", "hw.memsize"], capture_output=True, text=True, check=True)
        return int(size.stdout) // 2
    except (OSError, ValueError, subprocess.CalledProcessError):
        return _UNKNOWN
