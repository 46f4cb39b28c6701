"""Sizes in bytes, such as 90MB, and grids of few bits: settings that several stages share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ara.config.base import StageConfig

# Bits of the embedding and the head; 16: they stay as they are.
EmbeddingBits = Literal[4, 8, 16]

# Few digits, so that the number is exact and finite.
SIZE_PATTERN = r"^[0-9]{1,6}(\.[0-9]{1,3})?[KMGT]B$"


def bytes_in(size: str) -> float:
    """Return the bytes of a size that matches :data:`SIZE_PATTERN`; 1KB is 1000 bytes."""
    return float(size[:-2]) * 1000 ** (1 + "KMGT".index(size[-2]))


def few_bits(bits: EmbeddingBits) -> Literal[4, 8] | None:
    """Return the bits to round to; ``None`` for 16."""
    return None if bits == 16 else bits


# Weights of a row that share a scale.
Block = Literal[16, 32, 64, 128, 256]
DEFAULT_BLOCKS: tuple[Block, ...] = (32, 64, 128)


class FewBitsConfig(StageConfig):
    """What all grids of weights of few bits have in common."""

    zero_points: bool = Field(True, description="few bits: store a zero point per block as well")


class GridConfig(FewBitsConfig):
    """One grid of weights of few bits."""

    block: Block = Field(32, description="few bits: weights of a row that share a scale")
