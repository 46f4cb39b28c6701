"""The work of a stage, counted by what limits it, and the formulas of the single steps.

Names: W (m, n), r = min(m, n), k the kept rank. A product of (a, b) and (b, c) takes 2abc FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ara.models.weights import LinearSpec

# FLOPs of a symmetric eigenproblem with all vectors per cubed width: 4/3 for the tridiagonal form, 8/3 for divide and
# conquer at most, 2 to bring the vectors back (Golub and Van Loan, Matrix Computations, section 8.3), about.
EIGEN_FLOPS = 6
# FLOPs of an SVD with both bases (22 per cubed width, Golub and Van Loan, section 8.6) in eigenproblems.
_SVD_EIGENPROBLEMS = 22 / EIGEN_FLOPS
# Operations of float32 per logit, each reading and writing it: softmax, drawn targets, gradient (ara.models.losses).
LOSS_OPERATIONS = 7
# The same for a component of a layer in the backward pass of a sensitivity table (ara.masks.sensitivity_table).
_EFFECT_OPERATIONS = 7


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        products: FLOPs of matrix products in the dtype of the run.
        attention: FLOPs of causal attention in that dtype.
        single: FLOPs of matrix products in float32.
        double: FLOPs of matrix products in float64.
        eigen: Σ r³ over symmetric eigenproblems in float64.
        moved: bytes that other operations read and write.
        written: bytes that are written to the disk.
    """

    products: float = 0.0
    attention: float = 0.0
    single: float = 0.0
    double: float = 0.0
    eigen: float = 0.0
    moved: float = 0.0
    written: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, times: float) -> Work:
        return Work(*(getattr(self, field.name) * times for field in fields(self)))

    @property
    def flops(self) -> float:
        """All FLOPs of products, attention and eigenproblems."""
        return self.products + self.attention + self.single + self.double + EIGEN_FLOPS * self.eigen


def factorisation(spec: LinearSpec, inputs: bool, outputs: bool) -> Work:
    """Return the work of :func:`ara.decomposition.subspace.weighted_factors` for one layer.

    Args:
        spec: the layer.
        inputs: whether G is a matrix.
        outputs: whether there is an H.
    """
    m, n, r = spec.m, spec.n, spec.full_rank
    # W G Wᵀ, Uᵀ W.
    double = 2.0 * r * r * n + 2 * r * r * n
    if inputs:
        double += 2 * r * n * n
    if m > n:
        # QR of W with its basis, and the basis times U.
        double += 4 * m * n * n - 4 / 3 * n**3 + 2 * m * n * n
        if outputs:
            double += 2 * m * m * n + 2 * m * n * n
    if outputs:
        # Cholesky of H, Lᵀ W, and the triangular solve.
        double += r**3 / 3 + 2 * r * r * n + r**3
    return Work(double=double, eigen=float(r) ** 3)


def correction(spec: LinearSpec, rank: int | None) -> Work:
    """Return the most work of :func:`ara.recovery.correction.correct` for one layer.

    Args:
        spec: the layer.
        rank: k; ``None``: it is dense.
    """
    from ara.recovery.correction import BETAS, GAMMAS, LAMBDAS

    m, n, r = spec.m, spec.n, spec.full_rank
    candidates = len(BETAS) + len(GAMMAS) + len(LAMBDAS) - 1
    # Of each λ: Cholesky of S + λ I, D from its n right-hand sides, and A D.
    double = len(LAMBDAS) * (n**3 / 3 + 2.0 * n**3 + 2 * r * n * n)
    # Least squares in the span of B, for the present weight.
    double += 4.0 * m * r * r + 2 * m * r * (rank or n) + 2 * r * n * (rank or 0)
    # Of each candidate: its error on held-out text.
    double += candidates * 2 * r * n * n
    eigen = 0.0
    if rank is not None:
        double += candidates * (2 * r * n * n + 2 * r * r * n + 4 * r * rank * n)
        eigen = candidates * float(r) ** 3
    return Work(double=double, eigen=eigen)


def balancing(spec: LinearSpec, rank: int) -> Work:
    """Return the work of :func:`ara.recovery.trainable.balanced` for factors of rank k."""
    # Two QR with their bases, and the bases times the vectors; the SVD of (k, k) counts as that many eigenproblems.
    return Work(double=6.0 * (spec.m + spec.n) * rank * rank, eigen=_SVD_EIGENPROBLEMS * float(rank) ** 3)


def mask_gradient(spec: LinearSpec, tokens: int) -> Work:
    """Return what the gradient of all stored components adds to a backward pass (:mod:`ara.masks.linear`)."""
    r = spec.stored_rank
    return Work(products=2.0 * r * (spec.m + spec.n) * tokens, moved=8.0 * _EFFECT_OPERATIONS * r * tokens)


def loss(vocabulary: int, tokens: int) -> Work:
    """Return the work of a loss and its gradient over logits."""
    return Work(moved=8.0 * LOSS_OPERATIONS * vocabulary * tokens)
