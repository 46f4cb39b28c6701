"""What the weight files of a checkpoint hold beside the factorised layers."""

from __future__ import annotations

from collections.abc import Sequence

from ara.errors import UsageError
from ara.layouts.grid import Grid
from ara.models.embeddings import Embeddings
from ara.models.weights import LinearSpec

# Bytes of a tensor's entry in the header of a weight file, and tensors of a layer, about.
_HEADER, _TENSORS = 130, 6


def bytes_beside(parameters: int, specs: Sequence[LinearSpec]) -> int:
    """Return the bytes of all that is not a factorised layer, with the headers of the files.

    Args:
        parameters: outside of the factorised layers.
        specs: these layers.
    """
    return parameters * specs[0].bits // 8 + _HEADER * _TENSORS * len(specs)


def bytes_saved(embeddings: Embeddings, bits: int, grid: Grid) -> int:
    """Return by how many bytes embedding and head become smaller on a grid.

    Args:
        embeddings: both matrices.
        bits: per weight now.
        grid: of few bits.

    Raises:
        UsageError: a block is longer than a row.
    """
    return embeddings.parameters * bits // 8 - embeddings.stored_bytes(grid)


def check_room(limit: int, others: int, asked: str, least: int = 0) -> None:
    """Check that a size leaves room for the factorised layers.

    Args:
        limit: bytes of all weight files.
        others: bytes of everything else.
        asked: the size as it was given.
        least: bytes of the smallest choices of these layers, if they are known.

    Raises:
        UsageError: it does not.
    """
    if least and others + least > limit:
        raise UsageError(
            f"{asked} allows {limit:,} bytes, the least is {others + least:,}: {least:,} for the smallest choices of "
            f"the factorised layers, {others:,} for everything else",
            f"allow --size {(others + least) / 1e6 + 0.1:.1f}MB or more, fewer bits (--bits, --embedding-bits), or a "
            "smaller --min-rank",
        )
    if others >= limit:
        raise UsageError(
            f"everything but the factorised layers takes {others:,} bytes, {asked} allows {limit:,}",
            "allow a larger size",
        )
