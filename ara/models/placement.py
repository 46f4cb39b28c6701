"""Chooses device and dtype of a model, and gives the reason in words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ara.errors import UsageError, near_matches

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "cuda:N", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")

# Processor features (names of torch.cpu.get_capabilities) with bf16 multiplication in hardware. With AVX-512 alone
# oneDNN converts to fp32 and back, which is slower than fp32.
_BF16_FEATURES = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


@dataclass(frozen=True)
class Placement:
    """A device and a dtype.

    Attributes:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        why: one line, such as ``cpu, bfloat16: no CUDA device; the processor multiplies bf16 natively``.
    """

    device: str
    dtype: str
    why: str


def choose_placement(device: str = "auto", dtype: str = "auto") -> Placement:
    """Choose where to run and in which dtype.

    Args:
        device: one of ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps``.
        dtype: one of ``auto``, ``float32``, ``bfloat16``, ``float16``.

    Raises:
        UsageError: an unknown name, or a device that this machine does not have.
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}: {near_matches(dtype, DTYPES)}known are {', '.join(DTYPES)}")
    chosen, device_reason = _choose_device(device)
    if dtype == "auto":
        number, dtype_reason = _choose_dtype(chosen)
    else:
        number, dtype_reason = dtype, f"{dtype} as asked"
    return Placement(chosen, number, f"{chosen}, {number}: {device_reason}; {dtype_reason}")


def dtype_to_store(placement: Placement, asked: str, own: str | None) -> str:
    """Return the dtype in which factors and checkpoints are stored: a model does not grow for want of bf16 arithmetic.

    Args:
        placement: where the model runs.
        asked: dtype of the run as it was asked for.
        own: dtype in which the model was published, if it is known.
    """
    falls_short = asked == "auto" and placement.dtype == "float32"
    return own if falls_short and own == "bfloat16" else placement.dtype


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype called ``name`` (``float32``, ``bfloat16`` or ``float16``).

    Raises:
        UsageError: any other name.
    """
    import torch

    if name == "auto" or name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}: {near_matches(name, DTYPES[1:])}known are {', '.join(DTYPES[1:])}")
    found: torch.dtype = getattr(torch, name)
    return found


def _choose_device(device: str) -> tuple[str, str]:
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda", "a CUDA device is there"
        return "cpu", "no CUDA device"
    if device == "cpu":
        return "cpu", "cpu as asked"
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise UsageError("device mps was asked for, but this machine has none", "use --device auto or cpu")
        return "mps", "mps as asked"
    if device == "cuda" or re.fullmatch(r"cuda:\d+", device):
        return _check_cuda(device), f"{device} as asked"
    raise UsageError(f"unknown device {device!r}: {near_matches(device, DEVICES)}known are {', '.join(DEVICES)}")


def _check_cuda(device: str) -> str:
    import torch

    if not torch.cuda.is_available():
        reason = "torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        raise UsageError(
            f"device {device} was asked for, but {reason}",
            "use --device auto or cpu, or install a CUDA build of torch and check `nvidia-smi`",
        )
    count = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= count:
        raise UsageError(
            f"device {device} was asked for, but there are {count} CUDA devices: cuda:0 to cuda:{count - 1}"
        )
    return device


def _choose_dtype(device: str) -> tuple[str, str]:
    if device == "cpu":
        if _cpu_multiplies_bf16():
            return "bfloat16", "the processor multiplies bf16 natively"
        return "float32", "the processor has no bf16 arithmetic"
    if device == "mps":
        return "float32", "the safe choice on mps"
    if _cuda_multiplies_bf16(device):
        return "bfloat16", "the GPU multiplies bf16 natively"
    return "float16", "the GPU has no bf16 arithmetic"


def _cpu_multiplies_bf16() -> bool:
    import torch

    if not torch.backends.mkldnn.is_available():  # the only bf16 matrix kernels that torch has on a CPU
        return False
    # Newer torch builds list all features; older ones have single functions, some of them missing.
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(bool(capabilities.get(feature, False)) for feature in _BF16_FEATURES)
    questions = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(question() for question in questions if question is not None)


def _cuda_multiplies_bf16(device: str) -> bool:
    import torch

    # By default torch also answers True for older GPUs, which only emulate bf16.
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
