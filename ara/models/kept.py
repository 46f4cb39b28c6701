"""Keeps tensors for later: in memory, or in files without names when memory is short.

Outputs and inputs of blocks are kept for later passes, and changed weights until they are stored.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ara.errors import disk_errors
from ara.models.memory import available_bytes
from ara.progress import SILENT, Reporter

# 1 / share of the free memory, or disk, that kept tensors may take.
_SHARE = 4
# Makes a copy of a tensor that no later code changes, without a graph.
Keep = Callable[[torch.Tensor], torch.Tensor]


class Keeper:
    """Decides where tensors between blocks are kept, and copies them there.

    Args:
        folder: for files, made if it is needed; ``None``: only memory.
        report: told once where outputs go, or that they do not fit.
    """

    def __init__(self, folder: Path | None = None, report: Reporter = SILENT) -> None:
        self._folder, self._report, self._reported = folder, report, False
        self._in_files = False

    def number_that_fits(self, wanted: int, size: int) -> int:
        """Return how many of ``wanted`` items of ``size`` bytes can be kept, and choose memory or files for them."""
        fitting = available_bytes("cpu") // _SHARE // size
        self._in_files = False
        if fitting >= wanted:
            return wanted
        amount = f"{wanted} × {size / 2**20:,.0f} MiB of block outputs do not fit into memory beside the model: "
        on_disk = self._room() // size
        if on_disk > fitting:
            self._in_files = True
            kept = min(wanted, on_disk)
            self._say(f"{amount}{'they' if kept == wanted else f'{kept} of them'} are kept in {self._folder}")
            return kept
        self._say(f"{amount}{fitting} {'is' if fitting == 1 else 'are'} kept, and blocks run more often")
        return fitting

    def place(self, size: int) -> None:
        """Keep tensors of ``size`` bytes in all from now on: in memory if they fit, else in files if these have room.

        Without a folder they stay in memory.
        """
        self._in_files = False
        if self._folder is None or size <= available_bytes("cpu") // _SHARE:
            return
        amount = f"{size / 2**20:,.0f} MiB of block outputs do not fit into memory beside the model: "
        if self.use_files(size):
            self._say(f"{amount}they are kept in {self._folder}")
        else:
            self._say(f"{amount}they stay there, because {self._folder} has too little room")

    def use_files(self, size: int) -> bool:
        """Keep tensors in files from now on if these have room for ``size`` bytes, and tell whether they have."""
        self._in_files = size <= self._room()
        return self._in_files

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy on the CPU that no later code changes, without a graph.

        Raises:
            DiskFullError: no room for a file.
        """
        if not self._in_files:
            return in_memory(tensor)
        assert self._folder is not None
        return in_a_file(tensor, self._folder)

    def _room(self) -> int:
        """Return the bytes that files may take: none without a folder."""
        if self._folder is None:
            return 0
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            return shutil.disk_usage(self._folder).free // _SHARE

    def _say(self, fact: str) -> None:
        if not self._reported:
            self._reported = True
            self._report.fact(fact)


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy on the CPU that no later code changes, without a graph."""
    return tensor.detach().to("cpu", copy=True)


def in_a_file(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    """Return a copy without a graph whose pages are those of a file, which lives as long as the copy.

    What is written into the copy goes into these pages as well, so it takes no other memory.

    Args:
        tensor: of any device; without numbers, the copy is in memory.
        folder: made if it is missing.

    Raises:
        DiskFullError: no room.
    """
    if tensor.numel() == 0:
        return in_memory(tensor)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder)
        try:
            # Room is reserved first: a full disk would kill the process when a page is written.
            _reserve(handle, tensor.nbytes)
            copy = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
            return copy.view(tensor.shape).copy_(tensor.detach())
        finally:
            os.close(handle)
            # Windows does not remove a file in use; the folder is a cache.
            with suppress(PermissionError):
                os.unlink(name)


def _reserve(handle: int, size: int) -> None:
    reserve: Any = getattr(os, "posix_fallocate", None)
    if reserve is not None:
        reserve(handle, 0, size)
        return
    # macOS and Windows: written zeros take room as well.
    block = bytes(1 << 20)
    for start in range(0, size, len(block)):
        os.write(handle, block[: size - start])
