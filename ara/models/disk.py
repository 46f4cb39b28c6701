"""What a model, its factors and a checkpoint take on the disk, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ara.layouts import layout_named
from ara.models.weights import LinearSpec

# Bytes of one value of a spectrum, float64.
_SPECTRUM_BYTES = 8


@dataclass(frozen=True)
class DiskUse:
    """Bytes on the disk, without the headers of files.

    Attributes:
        model: the weights of the dense model.
        factors: the result of ``ara decompose`` without second moments.
        checkpoint: of ``ara truncate``, at most: all layers dense.
    """

    model: int
    factors: int
    checkpoint: int


def disk_use(linears: Sequence[LinearSpec], parameters: int, itemsize: int) -> DiskUse:
    """Return what a decomposition needs.

    Args:
        linears: the layers to factorise, with the ranks that are stored.
        parameters: of the dense model, tied ones once.
        itemsize: bytes of one weight.
    """
    dense = parameters * itemsize
    return DiskUse(dense, factor_bytes(linears, itemsize), dense)


def factor_bytes(linears: Sequence[LinearSpec], itemsize: int) -> int:
    """Return the bytes of the factors A (k, n) and B (m, k) of some layers, with all values of their spectra.

    Args:
        linears: the layers; k is :attr:`~ara.models.weights.LinearSpec.stored_rank`.
        itemsize: bytes of one number of a factor.
    """
    return sum(spec.stored_rank * (spec.m + spec.n) * itemsize + spec.full_rank * _SPECTRUM_BYTES for spec in linears)


def storing(linears: Sequence[LinearSpec], max_keep: float | None) -> list[LinearSpec]:
    """Return layers with the ranks that ``ara decompose`` stores of them, see :func:`rank_to_store`."""
    return [replace(spec, stored=rank_to_store(spec.m, spec.n, max_keep)) for spec in linears]


def rank_to_store(m: int, n: int, max_keep: float | None) -> int | None:
    """Return the largest rank of an (m, n) layer that ``ara decompose`` stores; ``None`` for all ranks.

    It is the largest rank k with k(m + n) ≤ ``max_keep`` · mn that costs less than the dense weight, and at least 1. So
    at ``max_keep`` = 1 factors lose no rank that is cheaper than dense, and take less room than the layers.

    Args:
        m: out features.
        n: in features.
        max_keep: in (0, 1], see :class:`ara.config.DecomposeConfig`; ``None``: nothing is left out.
    """
    if max_keep is None:
        return None
    # The small term compensates for rounding in products such as 0.3 · 1 000 000.
    affordable = int((max_keep * m * n + 1e-6) / (m + n))
    rank = max(1, min(affordable, layout_named("factors").top_rank(m, n)))
    return rank if rank < min(m, n) else None
