"""Which tensors have their memory in files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch


def bytes_in_files(tensors: Iterable[torch.Tensor], folder: Path | None = None, ending: str = "") -> int:
    """Return the bytes of the tensors whose pages are those of files, by the map of this process on Linux.

    Args:
        tensors: on the CPU.
        folder: of the files, which may have no name any more; ``None`` for any folder.
        ending: of their names.
    """
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        name = line.split(maxsplit=5)[-1].removesuffix(" (deleted)")
        if name.startswith(f"{folder or ''}/") and name.endswith(ending):
            first, last = line.split(maxsplit=1)[0].split("-")
            ranges.append((int(first, 16), int(last, 16)))
    return sum(tensor.nbytes for tensor in tensors if any(first <= tensor.data_ptr() < last for first, last in ranges))
