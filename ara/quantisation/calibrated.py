"""Calibrated rounding: the error of each weight is made up for by the weights that are not rounded yet.

For a weight W (m, n) on inputs with the second moment G = E[x xᵀ], the output error of a rounded weight Q is

    tr((W − Q) G (W − Q)ᵀ)

GPTQ (Frantar et al., arXiv 2210.17323) rounds column by column, and after each one moves the columns that are left to
where the error is least, given those that are fixed. The largest inputs come first. Scales are chosen before, from the
whole weight, so the order changes nothing in what is stored.

Of a product B A, A is rounded on G, then B on the second moment of what the rounded Â really gives, Â G Âᵀ; no further
text is needed. In between B is fitted again, to take back what the rounding of A has changed.

A layer of two factors may have any basis inside: B A = (B T⁻¹)(T A). The components of a decomposition are the worst
one, as their moment A G Aᵀ is nearly diagonal. The columns of B then cannot make up for each other, and each of them is
rounded with the same relative error, however little it matters. So :func:`mixed_basis` scales the components until A
and B share their energy, and rotates them at random. (Rotations against outliers in few bits: QuIP, arXiv 2307.13304.)
"""

from __future__ import annotations

import torch

from ara.errors import NumericalError
from ara.layouts.grid import Grid
from ara.quantisation.nearest import Rounded, fit_scales, nearest, per_weight, row_slices

# Share of the mean of G's diagonal that is added to it.
DAMPING = 0.01
# Columns whose errors are passed on at once.
_COLUMNS = 128


def round_calibrated(weight: torch.Tensor, moment: torch.Tensor, grid: Grid, damping: float = DAMPING) -> Rounded:
    """Round a weight with the least error of its outputs.

    Args:
        weight: W, (m, n).
        moment: G, (n, n), symmetric and positive semidefinite.
        grid: to round to.
        damping: share of the mean diagonal of G that is added to its diagonal.

    Raises:
        NumericalError: W or G holds NaN or infinity, or a scale does not fit.
    """
    # Smallest and largest number are enough: a mask over all weights of a vocabulary would take much memory.
    if not (torch.stack(weight.aminmax()).isfinite().all() and moment.isfinite().all()):
        raise NumericalError("weights or moments to round with hold NaN or infinity", "compress with --dtype float32")
    # Not weighted by the inputs: a few tokens with massive channels would decide the scales of all others.
    scales, zeros = fit_scales(weight, grid)
    order = moment.diagonal().argsort(descending=True)
    upper = _inverse_factor(moment[order][:, order], damping)
    steps = []
    # Rows do not depend on each other.
    for rows in row_slices(len(weight)):
        s, z = per_weight(scales[rows], None if zeros is None else zeros[rows], grid, weight.shape[1])
        found = _compensated(weight[rows, order].float(), s[:, order], z[:, order], upper, grid)
        steps.append(found[:, order.argsort()].to(torch.uint8))
    return Rounded(grid, torch.cat(steps), scales, zeros)


def _compensated(left: torch.Tensor, s: torch.Tensor, z: torch.Tensor, upper: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round column after column, and move the columns that are left.

    Args:
        left: weights (m, n) float32, columns in the order of rounding; overwritten.
        s: scale of every weight, (m, n) float32.
        z: zero point of every weight, (m, n) float32.
        upper: U, (n, n), see :func:`_inverse_factor`.
        grid: to round to.

    Returns:
        Steps (m, n) float32.
    """
    steps = torch.empty_like(left)
    for start in range(0, left.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, left.shape[1])
        part, errors = left[:, start:stop].T.contiguous(), torch.empty(stop - start, len(left), device=left.device)
        for column in range(stop - start):
            at = start + column
            q = nearest(part[column], s[:, at], z[:, at], grid)
            steps[:, at] = q
            error = (part[column] - (q - z[:, at]) * s[:, at]) / upper[at, at]
            part[column:] -= upper[at, at:stop, None] * error
            errors[column] = error
        left[:, stop:] -= errors.T @ upper[start:stop, stop:]
    return steps


def round_product(
    a: torch.Tensor, b: torch.Tensor, moment: torch.Tensor, grid: Grid, damping: float = DAMPING
) -> tuple[Rounded, Rounded]:
    """Round the factors of a product B A.

    The same holds for a pivoted layer, whose other rows are C A: there B is C, and the rows of A are rounded as they
    are.

    Args:
        a: A, (k, n).
        b: B, (m, k).
        moment: G, (n, n), of the inputs.
        grid: of both factors.
        damping: as of :func:`round_calibrated`.

    Returns:
        Rounded A and B.

    Raises:
        NumericalError: as of :func:`round_calibrated`.
    """
    first = round_calibrated(a, moment, grid, damping)
    rounded, exact = first.weight().double(), b.double()
    given = moment.double() @ rounded.T
    inner = rounded @ given
    # B moves only where it is known what the rounding of A has changed: damping holds it to B, not to zero.
    change = exact @ ((a.double() - rounded) @ given)
    fitted = exact + torch.cholesky_solve(change.T, torch.linalg.cholesky(damped(inner, damping))).T
    return first, round_calibrated(fitted, inner, grid, damping)


def mixed_basis(a: torch.Tensor, b: torch.Tensor, moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return other factors of the same product B A that lose less when they are rounded.

    T = R D. D is diagonal: row j of A then has the energy of its outputs, a G aᵀ, that column j of B has as squared
    norm. R is a random rotation, the same for every layer of a rank.

    Args:
        a: A, (k, n).
        b: B, (m, k).
        moment: G, (n, n), of the inputs.

    Returns:
        T A and B T⁻¹, float64.
    """
    a, b = a.double(), b.double()
    energies, norms = ((a @ moment.double()) * a).sum(1), b.square().sum(0)
    # A component that does nothing keeps its scale.
    used = (energies > 0) & (norms > 0)
    scale = torch.where(used, (norms / torch.where(used, energies, 1)) ** 0.25, 1)
    rotation = _rotation(len(a)).to(a.device)
    return rotation @ (scale[:, None] * a), (b / scale) @ rotation.T


def _rotation(k: int) -> torch.Tensor:
    """Return an orthogonal matrix (k, k) float64, the same in every call."""
    numbers = torch.randn(k, k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    basis, upper = torch.linalg.qr(numbers)
    return basis * upper.diagonal().sign()


def output_error(weight: torch.Tensor, rounded: torch.Tensor, moment: torch.Tensor) -> float:
    """Return the relative error of the outputs, tr((W − Q) G (W − Q)ᵀ) / tr(W G Wᵀ)."""
    g, w = moment.double(), weight.double()
    change = w - rounded.double()
    return float(((change @ g) * change).sum() / ((w @ g) * w).sum())


def damped(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the moment in float64 with a share of its mean diagonal added to the diagonal; positive definite."""
    found = moment.double().clone()
    diagonal = found.diagonal()
    # An input that is always zero has no moment; any number makes the matrix regular.
    diagonal += max(damping * float(diagonal.mean()), torch.finfo(torch.float32).tiny)
    return found


def _inverse_factor(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the upper Cholesky factor U of the inverse of the damped moment, UᵀU = H⁻¹, float32."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(moment, damping)))
    return torch.linalg.cholesky(inverse, upper=True).float()
