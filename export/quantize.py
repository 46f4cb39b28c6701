"""Blockwise int8 weights for ONNX Runtime's MatMulNBits: round to nearest, symmetric, a scale per 32 of a row."""

from __future__ import annotations

import numpy as np
import torch

BITS = 8
BLOCK = 32
# What MatMulNBits takes for zero when it is given no zero points.
_ZERO = 1 << (BITS - 1)


def quantize(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the blocks of a weight and their scales.

    Args:
        weight: (m, n).

    Returns:
        (m, ⌈n / 32⌉, 32) uint8, the last block of a row filled up with zeros, and (m · ⌈n / 32⌉) float32.
        A weight is (block − 128) · scale, off by at most half a scale.
    """
    m, n = weight.shape
    blocks = -(-n // BLOCK)
    padded = torch.nn.functional.pad(weight.float(), (0, blocks * BLOCK - n)).view(m, blocks, BLOCK)
    scales = padded.abs().amax(-1) / (_ZERO - 1)
    steps = padded / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    packed = (steps.round() + _ZERO).clamp(0, 2 * _ZERO - 1).to(torch.uint8)
    return packed.numpy(), scales.flatten().numpy()
