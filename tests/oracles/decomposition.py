"""Rank-k approximations in plain float64 numpy, by the textbook; written without looking at ara.decomposition."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def truncated_svd(weight: Matrix, rank: int) -> Matrix:
    """Return the nearest matrix of rank k in the Frobenius norm (Eckart and Young), (m, n)."""
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def whitened_by_cholesky(weight: Matrix, metric: Matrix, rank: int) -> Matrix:
    """Return SVD-LLM's W_k for a positive definite G (n, n): G = L Lᵀ, SVD of W L, truncation, and L solved away."""
    lower = np.linalg.cholesky(metric)
    truncated = truncated_svd(weight @ lower, rank)
    return np.linalg.solve(lower.T, truncated.T).T


def whitened_by_root(weight: Matrix, metric: Matrix, rank: int) -> Matrix:
    """Return the W_k of least ‖(W − W_k) G^{1/2}‖_F for a semi-definite G, by symmetric root and pseudo-inverse.

    What G does not see is lost: W_k is 0 on the kernel of G.
    """
    values, vectors = np.linalg.eigh(metric)
    seen = values > values.max() * 1e-12
    roots = np.sqrt(np.where(seen, values, 0))
    inverse = np.where(seen, 1 / np.where(seen, roots, 1), 0)
    truncated = truncated_svd(weight @ (vectors * roots), rank)
    return truncated @ (vectors * inverse).T


def scaled_by_columns(weight: Matrix, scale: Matrix, rank: int) -> Matrix:
    """Return ASVD's W_k: SVD of W diag(s), truncation, and diag(s) divided away; s (n) positive."""
    return truncated_svd(weight * scale, rank) / scale


def output_error(difference: Matrix, inputs: Matrix) -> float:
    """Return the mean squared output (1/t) Σ ‖D x‖² of D (m, n) over the inputs (t, n)."""
    return float(np.square(inputs @ difference.T).sum() / len(inputs))
