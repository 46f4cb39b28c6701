"""Blockwise integer weights for ONNX Runtime's MatMulNBits: round to nearest, symmetric, one scale per 16 of a row.

ONNX Runtime also rounds the activations to 8 bits, in blocks of the same length (``accuracy_level`` 4, the only one
that is fast on a CPU). The activations, more than the weights, are why the blocks are so short.
"""

from __future__ import annotations

import numpy as np
import torch

from ara.errors import NumericalError

BITS = 8
BLOCK = 16
# Rows that are converted to float32 at once; it limits memory.
_ROWS = 2048


def quantize(weight: torch.Tensor, scale_dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Return the blocks of a weight in 8 bits: (m, ⌈n / 16⌉, 16) uint8, the last block of a row padded with zeros.

    A weight is (block − 128) · scale, with an error of at most half a scale; see :func:`scales_of`.

    Args:
        weight: (m, n).
        scale_dtype: the scales are rounded to this type before weights are divided by them.
    """
    m, n = weight.shape
    packed = torch.empty(m, -(-n // BLOCK), BLOCK, dtype=torch.uint8)
    for at in range(0, m, _ROWS):
        steps, _ = _steps(weight[at : at + _ROWS], BITS, scale_dtype)
        # Without zero points, MatMulNBits takes the middle of the range as zero.
        packed[at : at + _ROWS] = steps.add_(1 << (BITS - 1)).to(torch.uint8)
    return packed.numpy()


def scales_of(weight: torch.Tensor, scale_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the scales that belong to :func:`quantize`: (m · ⌈n / 16⌉) float32.

    Raises:
        NumericalError: a block's scale is too small for ``scale_dtype``.
    """
    parts = [_scales(_blocks(weight[at : at + _ROWS]), BITS, scale_dtype) for at in range(0, len(weight), _ROWS)]
    return torch.cat(parts).flatten()


def rounded(weight: torch.Tensor, bits: int, block: int = BLOCK) -> torch.Tensor:
    """Return a weight (m, n) rounded to ``bits`` bits in blocks of this length, as float32.

    With 8 bits it also gives what MatMulNBits rounds activations (t, n) to.
    """
    steps, scales = _steps(weight, bits, torch.float32, block)
    return (steps * scales[..., None]).flatten(1)[:, : weight.shape[1]]


def _blocks(weight: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    m, n = weight.shape
    blocks = -(-n // block)
    return torch.nn.functional.pad(weight.float(), (0, blocks * block - n)).view(m, blocks, block)


def _scales(blocks: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Return scales (m, b) float32 that map the largest weight of a block to the last step."""
    exact = blocks.abs().amax(-1) / ((1 << (bits - 1)) - 1)
    scales = exact.to(dtype).float()
    if ((scales == 0) & (exact > 0)).any() or not scales.isfinite().all():
        raise NumericalError(
            "the scale of a block of weights is beyond float16", "export for the CPU, or with --precision fp16"
        )
    return scales


def _steps(
    weight: torch.Tensor, bits: int, dtype: torch.dtype, block: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights in whole steps, (m, b, block), and scales, (m, b), both float32."""
    blocks, last = _blocks(weight, block), (1 << (bits - 1)) - 1
    scales = _scales(blocks, bits, dtype)
    divisor = scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return blocks.div(divisor).round_().clamp_(-last - 1, last), scales
