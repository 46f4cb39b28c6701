"""How much memory is free, for choices between speed and memory."""

from __future__ import annotations

from pathlib import Path

import torch

# Assumed where the system does not tell.
_UNKNOWN = 4 << 30


def available_bytes(device: torch.device | str) -> int:
    """Return the free memory of ``device`` in bytes: of the GPU for CUDA, else what the system can still give."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _UNKNOWN
