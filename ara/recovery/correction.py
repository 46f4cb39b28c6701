"""The best weight of one layer for the inputs that it really gets, by linear algebra.

The dense layer computes W x. The compressed one gets x' instead of x. With the second moments S = E[x' x'ᵀ] and
C = E[x x'ᵀ] the best dense weight for x' is

    W' = W (S + β (C − S) + λ I) (S + λ I)⁻¹ = W (I + β D),    D = (C − S)(S + λ I)⁻¹

with β = 1 and λ = 0. A smaller β believes less of the measured shift, a larger λ less of its weak directions (SAES-SVD,
arXiv 2602.03051; AA-SVD, arXiv 2604.02119, is β = 1). W' is then cut to the rank of the layer in the metric (S, H), H
being the output metric of the layer's factors. β and λ are those with the least error on held-out windows of the text.

β is at most a given share, ¼ by default. With β = 1 a layer gives the mean of W x over all x of the text that may be
behind x'. So it gives less of what the compressed model renders badly, and whatever depends on exactly that loses.
Held-out errors of single layers do not show it: they are least near β = 1, where the whole model is worse. The error of
a layer is quadratic in β, so β = ¼ still has nearly half of the gain.

The full factors of a layer, W = B A, satisfy Bᵀ H B = I (:mod:`ara.decomposition.subspace`). So in the coordinates of B
the norm is the plain one, H is not needed, and everything happens on A (r, n):

    Z = A (I + β D)        U = first k eigenvectors of Z S Zᵀ        new factors: B U (m, k) and Uᵀ Z (k, n)

The error of coordinates Ẑ on held-out text follows from its moments, without another pass over the text:

    E‖A x − Ẑ x'‖² = tr(A G Aᵀ) − 2 tr(A C Ẑᵀ) + tr(Ẑ S Ẑᵀ),    G = E[x xᵀ]

If the layer has a bias, it takes up the difference of the means, and S, C are covariances.

The output of some layers is added to the residual stream as it is, and is the last thing that a block adds (down_proj).
There the compressed stream has already drifted by e = r' − r beside the layer. Such a layer can take back the part of
the drift that its inputs x' predict: its target is W x − e instead of W x, so

    Z = A (I + β D) − γ B⁺ E[e x'ᵀ] (S + λ I)⁻¹        γ from 0 to the same share, chosen like β

and its held-out error is that of the block's output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ara.recovery.paired_moments import PairedMoments

# Candidates for β and γ, as parts of the largest share. With β = 0 only the cut changes: its metric is that of x'.
BETAS, GAMMAS = (1.0, 0.5, 0.0), (1.0, 0.5)
# Damping λ, as a multiple of the mean of S's diagonal.
LAMBDAS = (1e-2, 1e-1, 1e-3)


@dataclass(frozen=True)
class Correction:
    """A corrected layer; all tensors are float64.

    Attributes:
        beta, damping: the chosen β and λ; ``None`` if the layer stays as it is.
        gamma: the chosen γ; ``None`` if it stays, or does not write to the residual stream.
        before, after: held-out error of its output, as a share of the dense output's energy, in the metric H; where the
            layer writes to the residual stream, the error of the block's output, as a share of the same energy.
        a, b: new factors (k, n) and (m, k) of a low-rank layer.
        shift: I + β D (n, n), by which a dense weight is multiplied from the right.
        taken_back: what is then added to it (m, n), against the drift.
        bias: what is added to the dense layer's bias (m), if there is one.
    """

    beta: float | None
    damping: float | None
    before: float
    after: float
    gamma: float | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    taken_back: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def correct(
    a: torch.Tensor,
    b: torch.Tensor,
    current: tuple[torch.Tensor, torch.Tensor] | torch.Tensor,
    train: PairedMoments,
    held_out: PairedMoments,
    bias: torch.Tensor | None = None,
    share: float = 1.0,
) -> Correction:
    """Correct one layer, if that lowers its held-out error.

    Args:
        a: A (r, n), full factors of the dense weight, any floating dtype.
        b: B (m, r).
        current: factors (k, n) and (m, k) of the compressed layer, or the weight (m, n) of one that is dense.
        train: moments to fit to.
        held_out: moments to choose by, with ``dense``.
        bias: present bias less the dense layer's (m), if the layer has one: it takes up the difference of the means.
        share: largest β and γ.
    """
    problem = _Problem(a.double(), b.double(), train, held_out, bias is not None)
    rank = len(current[0]) if isinstance(current, tuple) else None
    moved = None if bias is None else problem.in_span(bias.double())
    before = problem.error(problem.coordinates(current), moved)
    best = stays = Candidate(before, 0.0, LAMBDAS[0], 0.0)
    for beta in (share * part for part in BETAS):
        best = min(best, problem.candidate(beta, LAMBDAS[0], 0.0, rank), key=_error)
    for gamma in (share * part for part in GAMMAS if train.drift is not None):
        best = min(best, problem.candidate(best.beta, LAMBDAS[0], gamma, rank), key=_error)
    for damping in LAMBDAS[1:] if best.beta or best.gamma else ():
        best = min(best, problem.candidate(best.beta, damping, best.gamma, rank), key=_error)
    if best is stays or best.coordinates is None:
        return Correction(None, None, before / problem.energy, before / problem.energy)
    offset = problem.offset(best.coordinates, best.gamma)
    found = Correction(
        best.beta,
        best.damping,
        before / problem.energy,
        best.error / problem.energy,
        None if train.drift is None else best.gamma,
        bias=None if offset is None else problem.b @ offset,
    )
    if best.basis is None:
        back = problem.taken_back(best.damping, best.gamma)
        return replace(found, shift=problem.shift(best.beta, best.damping), taken_back=back)
    return replace(found, a=best.basis.T @ best.coordinates, b=problem.b @ best.basis)


@dataclass(frozen=True)
class Candidate:
    """One choice of β, λ and γ.

    Attributes:
        error: on held-out text.
        beta, damping, gamma: the choice.
        coordinates: Ẑ (r, n); ``None`` for the present weight.
        basis: U (r, k), whose span holds the columns of Ẑ, for a low-rank layer.
    """

    error: float
    beta: float
    damping: float
    gamma: float
    coordinates: torch.Tensor | None = None
    basis: torch.Tensor | None = None


def _error(candidate: Candidate) -> float:
    # NaN is never better.
    return candidate.error if candidate.error == candidate.error else float("inf")


class _NotDefinite(Exception):
    """S + λ I has no Cholesky factor."""


class _Problem:
    """One layer in the coordinates of its factor B.

    Attributes:
        energy: of the dense output on held-out text, E‖A x‖².
    """

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
        self._drift = None if train.drift is None else train.drift.compressed
        if bias and train.drift is not None:
            self._drift = train.drift.compressed - torch.outer(train.drift.mean, train.compressed_mean)
        self._difference = self.cross - self.metric
        # By damping: roots of S + λ I, A D, and the coordinates of what is taken back.
        self._roots: dict[float, torch.Tensor] = {}
        self._products: dict[float, torch.Tensor] = {}
        self._back: dict[float, torch.Tensor] = {}
        # Held-out: target u = A x − B⁺ e; E‖u‖², E[u x'ᵀ] and E[u].
        self._total, self._target = self.energy, a @ held_out.cross
        self._target_mean = a @ held_out.dense_mean
        if held_out.drift is not None:
            drift = held_out.drift
            assert drift.dense is not None and drift.square is not None
            inverse = self.in_span(torch.eye(len(b), dtype=torch.float64, device=b.device))
            both = (inverse @ drift.dense * a).sum()
            self._total += float((inverse @ drift.square * inverse).sum() - 2 * both)
            self._target = self._target - inverse @ drift.compressed
            self._target_mean = self._target_mean - inverse @ drift.mean

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

    def candidate(self, beta: float, damping: float, gamma: float, rank: int | None) -> Candidate:
        """Return the best coordinates of rank ``rank`` (``None``: full) for β, λ and γ.

        Its error is infinite if S + λ I is not positive definite: too few tokens for the precision of their moments.
        """
        try:
            return self._solved(beta, damping, gamma, rank)
        except _NotDefinite:
            return Candidate(float("inf"), beta, damping, gamma)

    def _solved(self, beta: float, damping: float, gamma: float, rank: int | None) -> Candidate:
        z = self.a + beta * self._moved(damping) if beta else self.a
        if gamma:
            z = z - gamma * self._taken_back(damping)
        if rank is None:
            return Candidate(self.error(z, self.offset(z, gamma)), beta, damping, gamma, z)
        gram = z @ self.metric @ z.T
        basis = torch.linalg.eigh((gram + gram.T) / 2)[1][:, -rank:].flip(1)
        cut = basis @ (basis.T @ z)
        return Candidate(self.error(cut, self.offset(cut, gamma)), beta, damping, gamma, cut, basis)

    def _moved(self, damping: float) -> torch.Tensor:
        """Return A D (r, n)."""
        if damping not in self._products:
            # First with A: it may have fewer rows than D.
            self._products[damping] = self._solve(damping, self.a @ self._difference)
        return self._products[damping]

    def error(self, z: torch.Tensor, offset: torch.Tensor | None = None) -> float:
        """Return the held-out error E‖u − Z x' − d‖² of coordinates ``z`` (r, n) and a change d (r) of the bias."""
        held = self.held
        value = self._total - 2 * (self._target * z).sum() + (z @ held.compressed * z).sum()
        if offset is not None:
            value = value - 2 * offset @ (self._target_mean - z @ held.compressed_mean) + offset @ offset
        return float(value)

    def offset(self, z: torch.Tensor, gamma: float) -> torch.Tensor | None:
        """Return the difference of the means (r) that the bias takes up; ``None`` without a bias."""
        if not self.bias:
            return None
        found = self.a @ self.train.dense_mean - z @ self.train.compressed_mean
        return found if self.train.drift is None else found - gamma * self.in_span(self.train.drift.mean)

    def shift(self, beta: float, damping: float) -> torch.Tensor:
        """Return I + β D (n, n)."""
        shift = torch.eye(len(self.metric), dtype=self.metric.dtype, device=self.metric.device)
        return shift + beta * self._solve(damping, self._difference) if beta else shift

    def taken_back(self, damping: float, gamma: float) -> torch.Tensor | None:
        """Return −γ E[e x'ᵀ] (S + λ I)⁻¹ (m, n); ``None`` if it is 0."""
        if self._drift is None or not gamma:
            return None
        return -gamma * self._solve(damping, self._drift)

    def _taken_back(self, damping: float) -> torch.Tensor:
        """Return the coordinates (r, n) of E[e x'ᵀ] (S + λ I)⁻¹."""
        if damping not in self._back:
            assert self._drift is not None
            self._back[damping] = self._solve(damping, self.in_span(self._drift))
        return self._back[damping]

    def _solve(self, damping: float, matrix: torch.Tensor) -> torch.Tensor:
        """Return ``matrix`` (…, n) times (S + λ I)⁻¹."""
        if damping not in self._roots:
            damped = self.metric.clone()
            # A constant input has no variance: the tiny number keeps the matrix definite.
            damped.diagonal().add_(damping * self.metric.diagonal().mean() + torch.finfo(torch.float64).tiny)
            root, failed = torch.linalg.cholesky_ex(damped)
            if failed:
                raise _NotDefinite
            self._roots[damping] = root
        return torch.cholesky_solve(matrix.T, self._roots[damping]).T
