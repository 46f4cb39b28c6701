"""The one computation behind all weighted decompositions.

For a positive semi-definite input metric G (n, n), the rank-k matrix nearest to W in ‖(W − W_k) G^{1/2}‖_F is
``W_k = U_k U_kᵀ W``, where U holds the left singular vectors of W G^{1/2}, i.e. the eigenvectors of W G Wᵀ, and the
eigenvalues are the squared singular values. So neither a root nor an inverse of G is needed, G may be singular, and
any number of calibration tokens will do. G = I is the plain SVD, a diagonal G is ASVD, G = E[x xᵀ] is SVD-LLM's
whitening, for which the textbook route is: Cholesky of G, SVD of W L, triangular solve.

An output metric H = L Lᵀ (m, m) as well makes it ‖Lᵀ (W − W_k) G^{1/2}‖_F, the same problem for LᵀW:
``W_k = L^{-T} U_k U_kᵀ Lᵀ W`` with U the eigenvectors of Lᵀ W G Wᵀ L. H does need to be positive definite.
"""

from __future__ import annotations

import torch

from ara.decomposition.base import Factors


def weighted_factors(weight: torch.Tensor, inputs: torch.Tensor | None, outputs: torch.Tensor | None = None) -> Factors:
    """Factorise W in the norm ‖H^{1/2} (W − W_k) G^{1/2}‖_F.

    Args:
        weight: W (m, n) float64.
        inputs: G, as (n, n), or as (n) when it is diagonal, or ``None`` for the identity; float64.
        outputs: H (m, m) float64, positive definite; ``None`` for the identity.

    Returns:
        ``b`` = L^{-T} U (m, r), ``a`` = Uᵀ Lᵀ W (r, n), ``spectrum`` = eigenvalues (r). Without H the columns of
        ``b`` are orthonormal.

    Squaring loses singular values below 1e-8 of the largest (float64), far under the precision of any stored factor.
    """
    m, n = weight.shape
    if m > n:
        # The column space of W has only n dimensions: work inside it.
        basis, core = torch.linalg.qr(weight)
        if outputs is not None:
            outputs = basis.T @ outputs @ basis
    else:
        basis, core = None, weight
    root = None
    if outputs is not None:
        root = torch.linalg.cholesky(_symmetric(outputs))
        core = root.T @ core
    if inputs is None:
        weighted = core
    elif inputs.dim() == 1:
        weighted = core * inputs
    else:
        weighted = core @ inputs
    energies, vectors = torch.linalg.eigh(_symmetric(weighted @ core.T))
    vectors = vectors.flip(1)
    spectrum = energies.flip(0).clamp_min(0)
    left = vectors if root is None else torch.linalg.solve_triangular(root.T, vectors, upper=True)
    return Factors(a=vectors.T @ core, b=left if basis is None else basis @ left, spectrum=spectrum)


def _symmetric(matrix: torch.Tensor) -> torch.Tensor:
    return (matrix + matrix.T) / 2
