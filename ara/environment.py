"""Facts of the process and its surroundings that go into manifests."""

from __future__ import annotations

import sys
from datetime import UTC, datetime


def now() -> str:
    """Return the time as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def versions() -> dict[str, str]:
    """Return the versions that matter for reproducing a result."""
    from importlib.metadata import version

    from ara.version import __version__

    python = ".".join(str(part) for part in sys.version_info[:3])
    return {"ara": __version__, "python": python, "torch": version("torch"), "transformers": version("transformers")}


def peak_memory_bytes() -> int:
    """Return the most memory this process has held: of the GPU when one is in use, else resident in RAM.

    0 where the system does not tell (Windows).
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:
        return 0
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
