"""The best weight of one layer for the inputs that it really gets, by linear algebra.

The dense layer computes W x. The compressed one gets x' instead of x. With the second moments S = E[x' x'ᵀ] and
C = E[x x'ᵀ] the best dense weight for x' is

    W' = W (S + β (C − S) + λ I) (S + λ I)⁻¹ = W (I + β D),    D = (C − S)(S + λ I)⁻¹

with β = 1 and λ = 0. A smaller β believes less of the measured shift, a larger λ less of its weak directions (SAES-SVD,
arXiv 2602.03051; AA-SVD, arXiv 2604.02119, is β = 1). W' is then cut to the rank of the layer in the metric (S, H), H
being the output metric of the layer's factors. β and λ are those with the least error on other, held-out text.

The full factors of a layer, W = B A, satisfy Bᵀ H B = I (:mod:`ara.decomposition.subspace`). So in the coordinates of B
the norm is the plain one, H is not needed, and everything happens on A (r, n):

    Z = A (I + β D)        U = first k eigenvectors of Z S Zᵀ        new factors: B U (m, k) and Uᵀ Z (k, n)

The error of coordinates Ẑ on held-out text follows from its moments, without another pass over the text:

    E‖A x − Ẑ x'‖² = tr(A G Aᵀ) − 2 tr(A C Ẑᵀ) + tr(Ẑ S Ẑᵀ),    G = E[x xᵀ]

If the layer has a bias, it takes up the difference of the means, and S, C are covariances.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

# Shares β of the measured shift; with 0 only the metric of the cut is that of the new inputs. Damping λ is a multiple
# of the mean of S's diagonal.
BETAS = (1.0, 0.75, 0.5, 0.25, 0.0)
LAMBDAS = (1e-2, 1e-1, 1e-3)


@dataclass(frozen=True)
class PairedMoments:
    """Moments of a layer's inputs x in the dense model and x' in the compressed one, over the same tokens.

    Attributes:
        dense: G = E[x xᵀ] (n, n); ``None`` if it was not collected.
        cross: C = E[x x'ᵀ] (n, n).
        compressed: S = E[x' x'ᵀ] (n, n).
        dense_mean, compressed_mean: E[x] and E[x'] (n).
        tokens: their number.

    All are float64.
    """

    dense: torch.Tensor | None
    cross: torch.Tensor
    compressed: torch.Tensor
    dense_mean: torch.Tensor
    compressed_mean: torch.Tensor
    tokens: int


class PairedAccumulator:
    """Sums the moments of pairs of inputs over batches, in float32."""

    def __init__(self, width: int, device: torch.device, dense: bool) -> None:
        """Prepare sums for inputs of the given width; those of x xᵀ only if ``dense``."""
        self._names = ("cross", "compressed", *(("dense",) if dense else ()))
        self._sums = {name: torch.zeros(width, width, device=device) for name in self._names}
        self._means = [torch.zeros(width, device=device) for _ in range(2)]
        self._tokens = 0

    def add(self, x: torch.Tensor, other: torch.Tensor) -> None:
        """Add the inputs ``x`` (..., n) of the dense layer and ``other`` (..., n) of the compressed one."""
        x, other = (one.reshape(-1, one.shape[-1]).float() for one in (x, other))
        left = {"cross": x, "compressed": other, "dense": x}
        for name in self._names:
            self._sums[name].addmm_(left[name].T, x if name == "dense" else other)
        for mean, one in zip(self._means, (x, other), strict=True):
            mean += one.sum(0)
        self._tokens += len(x)

    @property
    def is_finite(self) -> bool:
        """Whether no sum is NaN or infinite."""
        return all(bool(one.isfinite().all()) for one in (*self._means, *self._sums.values()))

    def result(self) -> PairedMoments:
        """Return the averages."""
        count = max(self._tokens, 1)
        sums = {name: one.double() / count for name, one in self._sums.items()}
        dense, compressed = (mean.double() / count for mean in self._means)
        return PairedMoments(sums.get("dense"), sums["cross"], sums["compressed"], dense, compressed, self._tokens)


@dataclass(frozen=True)
class Correction:
    """A corrected layer; all tensors are float64.

    Attributes:
        beta, damping: the chosen β and λ; ``None`` if the layer stays as it is.
        before, after: held-out error of its output, as a share of the dense output's energy, in the metric H.
        a, b: new factors (k, n) and (m, k) of a low-rank layer.
        shift: I + β D (n, n), by which a dense weight is multiplied from the right.
        bias: what is added to the dense layer's bias (m), if there is one.
    """

    beta: float | None
    damping: float | None
    before: float
    after: float
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def correct(
    a: torch.Tensor,
    b: torch.Tensor,
    current: tuple[torch.Tensor, torch.Tensor] | torch.Tensor,
    train: PairedMoments,
    held_out: PairedMoments,
    bias: torch.Tensor | None = None,
) -> Correction:
    """Correct one layer, if that lowers its held-out error.

    Args:
        a: A (r, n), full factors of the dense weight, any floating dtype.
        b: B (m, r).
        current: factors (k, n) and (m, k) of the compressed layer, or the weight (m, n) of one that is dense.
        train: moments to fit to.
        held_out: moments to choose by, with ``dense``.
        bias: present bias less the dense layer's (m), if the layer has one: it takes up the difference of the means.
    """
    problem = _Problem(a.double(), b.double(), train, held_out, bias is not None)
    rank = len(current[0]) if isinstance(current, tuple) else None
    moved = None if bias is None else problem.in_span(bias.double())
    before = problem.error(problem.coordinates(current), moved)
    best = Candidate(before, None, None, None)
    damping = LAMBDAS[0]
    for beta in BETAS:
        best = min(best, problem.candidate(beta, damping, rank), key=_error)
    for damping in LAMBDAS[1:] if best.beta else ():
        assert best.beta is not None
        best = min(best, problem.candidate(best.beta, damping, rank), key=_error)
    found = Correction(best.beta, best.damping, before / problem.energy, best.error / problem.energy)
    if best.beta is None or best.damping is None or best.coordinates is None:
        return found
    offset = problem.offset(best.coordinates)
    found = replace(found, bias=None if offset is None else problem.b @ offset)
    if best.basis is None:
        return replace(found, shift=problem.shift(best.beta, best.damping))
    return replace(found, a=best.basis.T @ best.coordinates, b=problem.b @ best.basis)


@dataclass(frozen=True)
class Candidate:
    """One β and λ: held-out error, coordinates Ẑ (r, n), and their basis U (r, k) for a low-rank layer."""

    error: float
    beta: float | None
    damping: float | None
    coordinates: torch.Tensor | None
    basis: torch.Tensor | None = None


def _error(candidate: Candidate) -> float:
    # NaN is never better.
    return candidate.error if candidate.error == candidate.error else float("inf")


class _Problem:
    """One layer in the coordinates of its factor B."""

    def __init__(
        self, a: torch.Tensor, b: torch.Tensor, train: PairedMoments, held_out: PairedMoments, bias: bool
    ) -> None:
        self.a, self.b, self.train, self.held, self.bias = a, b, train, held_out, bias
        assert held_out.dense is not None
        self.energy = float((a @ held_out.dense * a).sum().clamp_min(torch.finfo(torch.float64).tiny))
        self.metric, self.cross = train.compressed, train.cross
        if bias:
            self.metric = self.metric - torch.outer(train.compressed_mean, train.compressed_mean)
            self.cross = self.cross - torch.outer(train.dense_mean, train.compressed_mean)
        self._shifts: dict[float, torch.Tensor] = {}

    def coordinates(self, current: tuple[torch.Tensor, torch.Tensor] | torch.Tensor) -> torch.Tensor:
        """Return the coordinates (r, n) of the present weight."""
        if isinstance(current, tuple):
            down, up = current
            return self.in_span(up.double()) @ down.double()
        return self.in_span(current.double())

    def in_span(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the coordinates (r, …) of ``outputs`` (m, …): their part in the span of B."""
        columns = outputs if outputs.dim() == 2 else outputs[:, None]
        return torch.linalg.lstsq(self.b, columns).solution.view(-1, *outputs.shape[1:])

    def candidate(self, beta: float, damping: float, rank: int | None) -> Candidate:
        """Return the best coordinates of rank ``rank`` (``None``: full) for β and λ."""
        z = self.a + beta * (self.a @ self._shift(damping)) if beta else self.a
        if rank is None:
            return Candidate(self.error(z, self.offset(z)), beta, damping, z)
        gram = z @ self.metric @ z.T
        basis = torch.linalg.eigh((gram + gram.T) / 2)[1][:, -rank:].flip(1)
        cut = basis @ (basis.T @ z)
        return Candidate(self.error(cut, self.offset(cut)), beta, damping, cut, basis)

    def error(self, z: torch.Tensor, offset: torch.Tensor | None = None) -> float:
        """Return the held-out error E‖A x − Z x' − d‖² of coordinates ``z`` (r, n) and a change d (r) of the bias."""
        held = self.held
        value = self.energy - 2 * (self.a @ held.cross * z).sum() + (z @ held.compressed * z).sum()
        if offset is not None:
            mean = self.a @ held.dense_mean - z @ held.compressed_mean
            value = value - 2 * offset @ mean + offset @ offset
        return float(value)

    def offset(self, z: torch.Tensor) -> torch.Tensor | None:
        """Return the difference of the means (r) that the bias takes up; ``None`` without a bias."""
        return self.a @ self.train.dense_mean - z @ self.train.compressed_mean if self.bias else None

    def shift(self, beta: float, damping: float) -> torch.Tensor:
        """Return I + β D (n, n)."""
        shift = beta * self._shift(damping)
        shift.diagonal().add_(1)
        return shift

    def _shift(self, damping: float) -> torch.Tensor:
        if damping not in self._shifts:
            damped = self.metric.clone()
            # A constant input has no variance: the tiny number keeps the matrix invertible.
            damped.diagonal().add_(damping * self.metric.diagonal().mean() + torch.finfo(torch.float64).tiny)
            difference = self.cross - self.metric
            self._shifts[damping] = torch.linalg.solve(damped, difference, left=False)
        return self._shifts[damping]
