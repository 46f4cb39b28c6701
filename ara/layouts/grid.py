"""The grid of weights of few bits: blocks along the inputs of a row, each with a scale and perhaps a zero point.

It is the grid of ONNX Runtime's MatMulNBits. A weight is ``(q − z) · s`` with q and z whole numbers from 0 to 2ᵇ − 1.
Without zero points z is the middle of the range, 2ᵇ⁻¹. A scale may be negative: so the largest weight of a block, of
whichever sign, can be the end of the range that has one more step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Bits = Literal[4, 8]
BITS: tuple[Bits, ...] = (4, 8)


@dataclass(frozen=True)
class Grid:
    """A grid of whole steps per block of weights.

    Attributes:
        bits: b, per weight.
        block: weights per scale, along the inputs.
        zero_points: whether every block has a zero point.
        scale_dtype: the scales are numbers of this type.
    """

    bits: Bits
    block: int
    zero_points: bool = False
    scale_dtype: torch.dtype = torch.float16

    @property
    def last(self) -> int:
        """Largest step, 2ᵇ − 1."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """Zero point of a block without one, 2ᵇ⁻¹."""
        return 1 << (self.bits - 1)

    def blocks(self, n: int) -> int:
        """Return the number of blocks of a row of ``n`` weights; the last one may be filled up."""
        return -(-n // self.block)

    def bytes(self, m: int, n: int) -> int:
        """Return the bytes of a rounded (m, n) weight: steps, scales and zero points."""
        blocks = self.blocks(n)
        zeros = -(-blocks * self.bits // 8) if self.zero_points else 0
        return m * (blocks * (self.block * self.bits // 8 + self.scale_dtype.itemsize) + zeros)
