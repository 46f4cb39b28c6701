"""Rounding to the nearest weights of a grid (:class:`ara.layouts.grid.Grid`), and the choice of its scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ara.errors import NumericalError
from ara.layouts.grid import Grid

# Scales that are tried, as shares of the one that covers the whole block. Clipping the largest weights can help.
_SHARES = tuple(1 - 0.05 * step for step in range(9))
# Largest share of the squared weights that scales below the smallest number of their type may turn into zeros.
_LOST = 1e-8
# Rows that are rounded at once; it limits memory. A vocabulary has hundreds of thousands.
_ROWS = 2048


@dataclass(frozen=True)
class Rounded:
    """A rounded weight of (m, n).

    Attributes:
        grid: that it lies on.
        steps: q, (m, n) uint8.
        scales: s, (m, blocks) in the grid's type.
        zeros: z, (m, blocks) uint8; ``None`` without zero points.
    """

    grid: Grid
    steps: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def weight(self) -> torch.Tensor:
        """Return the weight (m, n) float32."""
        return dequantised(self.steps, self.scales, self.zeros, self.grid)


def dequantised(steps: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, grid: Grid) -> torch.Tensor:
    """Return ``(steps − zeros) · scales`` as float32, of the shape (m, n) of ``steps``."""
    s, z = per_weight(scales, zeros, grid, steps.shape[1])
    return (steps.float() - z) * s


def fit_scales(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scales and zero points with the least squared error of rounding to nearest.

    Args:
        weight: (m, n), any floating dtype.
        grid: bits, length of blocks.

    Returns:
        scales (m, blocks) of ``grid.scale_dtype``; zeros (m, blocks) uint8, or ``None`` without zero points.

    Raises:
        NumericalError: a scale is too small or too large for ``grid.scale_dtype``.
    """
    found = [_fit(part, grid) for part in weight.split(_ROWS)]
    scales, zeros = (torch.cat([one[place] for one in found]) for place in (0, 1))
    # A block of tiny weights may become zero, as long as it hardly counts beside the others.
    squares = [_squares(part, one[0], grid) for part, one in zip(weight.split(_ROWS), found, strict=True)]
    lost, total = (sum(one[place] for one in squares) for place in (0, 1))
    if lost > _LOST * total:
        raise _beyond(grid)
    return scales, zeros if grid.zero_points else None


def _squares(weight: torch.Tensor, scales: torch.Tensor, grid: Grid) -> tuple[float, float]:
    """Return the sum of squared weights in blocks with a scale of zero, and of all."""
    squares = weight.double().square()
    zero = (scales == 0).repeat_interleave(grid.block, 1)[:, : weight.shape[1]]
    return float(squares[zero].sum()), float(squares.sum())


def round_to_nearest(weight: torch.Tensor, grid: Grid) -> Rounded:
    """Round every weight of (m, n) for itself; see :func:`fit_scales`."""
    scales, zeros = fit_scales(weight, grid)
    steps = []
    for rows in row_slices(len(weight)):
        s, z = per_weight(scales[rows], None if zeros is None else zeros[rows], grid, weight.shape[1])
        steps.append(nearest(weight[rows].float(), s, z, grid).to(torch.uint8))
    return Rounded(grid, torch.cat(steps), scales, zeros)


def row_slices(m: int) -> list[slice]:
    """Return slices of m rows that are rounded one after the other."""
    return [slice(at, at + _ROWS) for at in range(0, m, _ROWS)]


def per_weight(
    scales: torch.Tensor, zeros: torch.Tensor | None, grid: Grid, n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point of every weight, both (m, n) float32, from those of the blocks (m, blocks)."""
    s = scales.float().repeat_interleave(grid.block, 1)[:, :n]
    z = torch.full_like(s, grid.middle) if zeros is None else zeros.float().repeat_interleave(grid.block, 1)[:, :n]
    return s, z


def nearest(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the nearest steps, float32; scales and zeros are broadcast to the weight, a scale of 0 gives zeros."""
    divisor = torch.where(scales == 0, torch.ones_like(scales), scales)
    return weight.div(divisor).round_().add_(zeros).clamp_(0, grid.last)


def _fit(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Try all shares, with both signs or with zero points, and keep the best of every block."""
    m, n = weight.shape
    blocks = grid.blocks(n)
    missing = blocks * grid.block - n
    w = torch.nn.functional.pad(weight.float(), (0, missing)).view(m, blocks, grid.block)
    best = torch.full((m, blocks), torch.inf, device=w.device)
    scales, zeros = torch.zeros_like(best), torch.full_like(best, grid.middle)
    for scale, zero in _candidates(w, grid):
        steps = nearest(w, scale[..., None], zero[..., None], grid)
        error = ((steps - zero[..., None]) * scale[..., None] - w).square_().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales.to(grid.scale_dtype), zeros.to(torch.uint8)


def _candidates(w: torch.Tensor, grid: Grid) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return scales, rounded to their type, and zero points, both (m, blocks) float32."""
    low, high = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)
    middle = torch.full_like(low, grid.middle)
    # Without zero points the end of the range with 2ᵇ⁻¹ steps is the low one: the sign decides which weights get it.
    extreme = torch.where(high > -low, -high, -low)
    whole = [extreme / grid.middle, torch.maximum(high, -low) / (grid.middle - 1)]
    found = []
    for exact in [(high - low) / grid.last] if grid.zero_points else whole:
        for share in _SHARES:
            scale = _stored(exact * share, grid)
            divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
            zero = (-low * share / divisor).round().clamp(0, grid.last) if grid.zero_points else middle
            found.append((scale, zero))
    return found


def _stored(exact: torch.Tensor, grid: Grid) -> torch.Tensor:
    scale = exact.to(grid.scale_dtype).float()
    if not scale.isfinite().all():
        raise _beyond(grid)
    return scale


def _beyond(grid: Grid) -> NumericalError:
    kind = str(grid.scale_dtype).removeprefix("torch.")
    return NumericalError(f"scales of weights are beyond the range of {kind}", "this checkpoint cannot be rounded")
