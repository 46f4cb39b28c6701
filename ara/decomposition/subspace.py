"""The computation that all decompositions share.

G (n, n) is a positive semi-definite input metric. The rank-k matrix nearest to W in ‖(W − W_k) G^{1/2}‖_F is
``W_k = U_k U_kᵀ W``. U holds the left singular vectors of W G^{1/2}, which are the eigenvectors of W G Wᵀ; the
eigenvalues are the squared singular values. So no root or inverse of G is needed, G may be singular, and any number of
calibration tokens is enough. G = I is the plain SVD, a diagonal G is ASVD, and G = E[x xᵀ] is the whitening of SVD-LLM,
which is usually computed by a Cholesky factorisation of G, an SVD of W L, and a triangular solve.

With an output metric H = L Lᵀ (m, m) the norm is ‖Lᵀ (W − W_k) G^{1/2}‖_F, the same problem for LᵀW:
``W_k = L^{-T} U_k U_kᵀ Lᵀ W`` with U the eigenvectors of Lᵀ W G Wᵀ L. H must be positive definite. If it is diagonal,
so is L.
"""

from __future__ import annotations

import torch

from ara.decomposition.base import Factors


def weighted_factors(weight: torch.Tensor, inputs: torch.Tensor | None, outputs: torch.Tensor | None = None) -> Factors:
    """Factorise W in the norm ‖H^{1/2} (W − W_k) G^{1/2}‖_F.

    Args:
        weight: W (m, n) float64.
        inputs: G as (n, n), or (n) if it is diagonal, or ``None`` for the identity; float64.
        outputs: H as (m, m), or (m) if it is diagonal; float64, positive definite; ``None`` for the identity.

    Returns:
        ``b`` = L^{-T} U (m, r), ``a`` = Uᵀ Lᵀ W (r, n), ``spectrum`` = eigenvalues (r). Without H the columns of
        ``b`` are orthonormal.

    Squaring loses singular values below 1e-8 of the largest (float64), far below the precision of stored factors.
    """
    if outputs is not None and outputs.dim() == 1:
        scales = outputs.sqrt()[:, None]
        scaled = weighted_factors(weight * scales, inputs)
        return Factors(scaled.a, scaled.b / scales, scaled.spectrum)
    m, n = weight.shape
    if m > n:
        # The column space of W has only n dimensions, so the work is done inside it.
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
