"""Blockwise integer weights for ONNX Runtime's MatMulNBits: round to nearest, symmetric, a scale per 32 of a row."""

from __future__ import annotations

import numpy as np
import torch

BITS = 8
BLOCK = 32


def quantize(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the blocks of a weight in 8 bits, and their scales.

    Args:
        weight: (m, n).

    Returns:
        (m, ⌈n / 32⌉, 32) uint8, the last block of a row filled up with zeros, and (m · ⌈n / 32⌉) float32.
        A weight is (block − 128) · scale, off by at most half a scale.
    """
    steps, scales = _steps(weight, BITS)
    # MatMulNBits takes the middle for zero when it is given no zero points.
    return (steps + (1 << (BITS - 1))).to(torch.uint8).numpy(), scales.flatten().numpy()


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Return what is left of a weight (m, n) after rounding to so many bits, float32."""
    steps, scales = _steps(weight, bits)
    return (steps * scales[..., None]).flatten(1)[:, : weight.shape[1]]


def _steps(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whole steps (m, b, 32) and scales (m, b), float32; the largest weight of a block is the last step."""
    m, n = weight.shape
    blocks = -(-n // BLOCK)
    padded = torch.nn.functional.pad(weight.float(), (0, blocks * BLOCK - n)).view(m, blocks, BLOCK)
    scales = padded.abs().amax(-1) / ((1 << (bits - 1)) - 1)
    return (padded / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round(), scales
