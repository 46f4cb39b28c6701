"""The one computation behind all input-weighted decompositions.

For a positive semi-definite metric G (n, n), the rank-k matrix nearest to W in ‖(W − W_k) G^{1/2}‖_F is
``W_k = U_k U_kᵀ W``, where U holds the left singular vectors of W G^{1/2}, i.e. the eigenvectors of W G Wᵀ, and the
eigenvalues are the squared singular values. So neither a root nor an inverse of G is needed, G may be singular, and
any number of calibration tokens will do. G = I is the plain SVD, a diagonal G is ASVD, G = E[x xᵀ] is SVD-LLM's
whitening, for which the textbook route is: Cholesky of G, SVD of W L, triangular solve.
"""

from __future__ import annotations

import torch

from ara.decomposition.base import Factors


def input_weighted_factors(weight: torch.Tensor, metric: torch.Tensor | None) -> Factors:
    """Factorise W in the norm ‖(W − W_k) G^{1/2}‖_F.

    Args:
        weight: W (m, n) float64.
        metric: G, as (n, n), or as (n) when it is diagonal, or ``None`` for the identity; float64.

    Returns:
        ``b`` = U (m, r) with orthonormal columns, ``a`` = Uᵀ W (r, n), ``spectrum`` = eigenvalues (r).

    Squaring loses singular values below 1e-8 of the largest (float64), far under the precision of any stored factor.
    """
    m, n = weight.shape
    if m > n:
        # The column space of W has only n dimensions: work inside it.
        q, core = torch.linalg.qr(weight)
    else:
        q, core = None, weight
    if metric is None:
        weighted = core
    elif metric.dim() == 1:
        weighted = core * metric
    else:
        weighted = core @ metric
    energies, vectors = torch.linalg.eigh(_symmetric(weighted @ core.T))
    vectors = vectors.flip(1)
    spectrum = energies.flip(0).clamp_min(0)
    left = vectors if q is None else q @ vectors
    return Factors(a=vectors.T @ core, b=left, spectrum=spectrum)


def _symmetric(matrix: torch.Tensor) -> torch.Tensor:
    return (matrix + matrix.T) / 2
