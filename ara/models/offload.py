"""Models larger than memory: weights that stay in their files, and are read when they are needed.

transformers maps the weights of a model on a CPU where a file holds them in the dtype and the form of the run. The
system then reads their pages when they are used, and drops them without writing when memory is short. So a model runs
whatever its size, with the same results, bit for bit. Weights of another dtype would be converted in memory, and
experts that have a tensor each would be merged there. If they do not fit, a converted copy of their files is written
once, in the cache folder.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ara.errors import DiskFullError
from ara.models.cache import aside, cache_dir, publish_folder
from ara.models.folder import INDEX, SINGLE
from ara.models.silence import silence_transformers
from ara.progress import Reporter

if TYPE_CHECKING:
    import torch

    from ara.models.completeness import StoredTensor
    from ara.models.stored_model import StoredModel

Offload = Literal["auto", "none", "disk"]

# Floating-point dtypes as safetensors and torch name them.
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Largest file of a copy: one is in memory while it is written.
_FILE_SIZE = "1GB"
# Integers are few (indices, masks), and of at most this many bytes.
_INTEGER_BYTES = 8


def weights_in_memory(stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> int:
    """Return the bytes that the tensors of some files take in memory, with floating-point numbers as ``dtype``."""
    return sum(
        math.prod(tensor.shape) * (dtype.itemsize if tensor.dtype in _FLOATS else _INTEGER_BYTES)
        for tensor in stored.values()
    )


def say(size: int, free: int, report: Reporter) -> None:
    """Report that ``size`` bytes of weights stay in their files, with ``free`` bytes of memory."""
    report.fact(
        f"{size / 2**20:,.0f} MiB of weights stay in their files and are read when they are needed; "
        f"{free / 2**20:,.0f} MiB of memory are free (--offload)"
    )


def is_mapped(stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> bool:
    """Tell whether transformers maps the tensors of some files, instead of converting them to ``dtype``."""
    return all(_FLOATS.get(tensor.dtype, _name(dtype)) == _name(dtype) for tensor in stored.values())


def copies() -> Path:
    """Return the folder of all converted copies, which need not exist yet."""
    return cache_dir() / "weights"


def has_copy(key: str, dtype: torch.dtype) -> bool:
    """Tell whether :func:`converted_folder` has written its copy already."""
    return _is_complete(_folder(key, dtype))


def converted_folder(stored: StoredModel, key: str, dtype: torch.dtype, size: int, report: Reporter) -> Path:
    """Return a folder with the weights of a model as ``dtype``; the first call writes it, file by file.

    Args:
        stored: the model, with ``dtype``, all of whose tensors can be read; its experts are fused afterwards.
        key: the same for the same weights, else another one.
        dtype: of all floating-point tensors.
        size: of the copy, in bytes.
        report: says that a copy is written, and where.

    Raises:
        DiskFullError: the disk has no room.
        ModelError: a file of the model is damaged.
        AraError: the cache folder cannot be written.
    """
    from ara.layouts.modeling_ara import fuse_experts
    from ara.models.shards import write_model

    target = _folder(key, dtype)
    if _is_complete(target):
        return target
    with aside(target.parent) as folder, silence_transformers():
        free = shutil.disk_usage(folder).free
        if free < size:
            raise DiskFullError(
                f"a copy of the weights in {_name(dtype)} needs {size / 2**20:,.0f} MiB, {target.parent} has "
                f"{free / 2**20:,.0f} MiB free",
                "free some space, set ARA_CACHE_DIR to a folder on another disk, or choose the --dtype of the files",
            )
        report.step(f"Writing a copy of the weights in {_name(dtype)} (once)")
        made = folder / "made"
        made.mkdir()
        model = fuse_experts(stored.model)
        write_model(model, model.state_dict(), stored.read, made, _FILE_SIZE)
        publish_folder(made, target, _is_complete)
    report.fact(f"kept in {target}")
    return target


def _folder(key: str, dtype: torch.dtype) -> Path:
    return copies() / f"{key}-{_name(dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in (SINGLE, INDEX))
