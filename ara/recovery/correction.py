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

The output of some layers is added to the residual stream as it is, and is the last thing that a block adds (down_proj).
There the compressed stream has already drifted by e = r' − r beside the layer. Such a layer can take back the part of
the drift that its inputs x' predict: its target is W x − e instead of W x, so

    Z = A (I + β D) − γ B⁺ E[e x'ᵀ] (S + λ I)⁻¹        γ from 0 to 1, chosen like β

and its held-out error is that of the block's output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

# Shares β of the measured shift; with 0 only the metric of the cut is that of the new inputs. Damping λ is a multiple
# of the mean of S's diagonal.
BETAS = (1.0, 0.75, 0.5, 0.25, 0.0)
LAMBDAS = (1e-2, 1e-1, 1e-3)
# Shares γ of the drift that a layer takes back.
GAMMAS = (1.0, 0.5)


@dataclass(frozen=True)
class Drift:
    """Moments of the drift e of the residual stream beside a layer, over the same tokens; all float64.

    Attributes:
        compressed: E[e x'ᵀ] (m, n).
        dense: E[e xᵀ] (m, n); ``None`` if it was not collected, like ``square``.
        square: E[e eᵀ] (m, m).
        mean: E[e] (m).
    """

    compressed: torch.Tensor
    dense: torch.Tensor | None
    square: torch.Tensor | None
    mean: torch.Tensor


@dataclass(frozen=True)
class PairedMoments:
    """Moments of a layer's inputs x in the dense model and x' in the compressed one, over the same tokens.

    Attributes:
        dense: G = E[x xᵀ] (n, n); ``None`` if it was not collected.
        cross: C = E[x x'ᵀ] (n, n).
        compressed: S = E[x' x'ᵀ] (n, n).
        dense_mean, compressed_mean: E[x] and E[x'] (n).
        tokens: their number.
        drift: of the residual stream beside the layer; ``None`` if the layer does not write to it.

    All are float64.
    """

    dense: torch.Tensor | None
    cross: torch.Tensor
    compressed: torch.Tensor
    dense_mean: torch.Tensor
    compressed_mean: torch.Tensor
    tokens: int
    drift: Drift | None = None


class PairedAccumulator:
    """Sums the moments of pairs of inputs over batches, in float32."""

    def __init__(self, width: int, device: torch.device, dense: bool, outputs: int | None = None) -> None:
        """Prepare sums.

        Args:
            width: n of the inputs.
            device: of the inputs.
            dense: whether to sum products with x as well.
            outputs: m, if the drift is summed too.
        """
        self._pairs = ["cross", "compressed", *(["dense"] if dense else [])]
        sizes = {name: (width, width) for name in self._pairs}
        if outputs is not None:
            sizes["drift"] = (outputs, width)
            sizes |= {"drift_dense": (outputs, width), "drift_square": (outputs, outputs)} if dense else {}
        self._sums = {name: torch.zeros(size, device=device) for name, size in sizes.items()}
        widths = [width, width, *([outputs] if outputs else [])]
        self._means = [torch.zeros(one, device=device) for one in widths]
        self._tokens = 0

    def add(self, x: torch.Tensor, other: torch.Tensor, drift: torch.Tensor | None = None) -> None:
        """Add the inputs ``x`` (..., n) of the dense layer, ``other`` (..., n) of the compressed one, and the drift."""
        x, other = (one.reshape(-1, one.shape[-1]).float() for one in (x, other))
        pairs = {"cross": (x, other), "compressed": (other, other), "dense": (x, x)}
        inputs = [x, other]
        if drift is not None:
            e = drift.reshape(-1, drift.shape[-1]).float()
            pairs |= {"drift": (e, other), "drift_dense": (e, x), "drift_square": (e, e)}
            inputs.append(e)
        for name, total in self._sums.items():
            left, right = pairs[name]
            total.addmm_(left.T, right)
        for mean, one in zip(self._means, inputs, strict=True):
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
        dense, compressed, *rest = (mean.double() / count for mean in self._means)
        drift = Drift(sums["drift"], sums.get("drift_dense"), sums.get("drift_square"), rest[0]) if rest else None
        return PairedMoments(
            sums.get("dense"), sums["cross"], sums["compressed"], dense, compressed, self._tokens, drift
        )


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
    best = stays = Candidate(before, 0.0, LAMBDAS[0], 0.0)
    for beta in BETAS:
        best = min(best, problem.candidate(beta, LAMBDAS[0], 0.0, rank), key=_error)
    for gamma in GAMMAS if train.drift is not None else ():
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
        self._shifts: dict[float, torch.Tensor] = {}
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
        """Return the best coordinates of rank ``rank`` (``None``: full) for β, λ and γ."""
        z = self.a + beta * (self.a @ self._shift(damping)) if beta else self.a
        back = self.taken_back(damping, gamma)
        if back is not None:
            z = z + self.in_span(back)
        if rank is None:
            return Candidate(self.error(z, self.offset(z, gamma)), beta, damping, gamma, z)
        gram = z @ self.metric @ z.T
        basis = torch.linalg.eigh((gram + gram.T) / 2)[1][:, -rank:].flip(1)
        cut = basis @ (basis.T @ z)
        return Candidate(self.error(cut, self.offset(cut, gamma)), beta, damping, gamma, cut, basis)

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
        shift = beta * self._shift(damping)
        shift.diagonal().add_(1)
        return shift

    def taken_back(self, damping: float, gamma: float) -> torch.Tensor | None:
        """Return −γ E[e x'ᵀ] (S + λ I)⁻¹ (m, n); ``None`` if it is 0."""
        drift = self.train.drift
        if drift is None or not gamma:
            return None
        moment = drift.compressed
        if self.bias:
            moment = moment - torch.outer(drift.mean, self.train.compressed_mean)
        return -gamma * torch.linalg.solve(self._damped(damping), moment, left=False)

    def _shift(self, damping: float) -> torch.Tensor:
        if damping not in self._shifts:
            difference = self.cross - self.metric
            self._shifts[damping] = torch.linalg.solve(self._damped(damping), difference, left=False)
        return self._shifts[damping]

    def _damped(self, damping: float) -> torch.Tensor:
        """Return S + λ I (n, n)."""
        damped = self.metric.clone()
        # A constant input has no variance: the tiny number keeps the matrix invertible.
        damped.diagonal().add_(damping * self.metric.diagonal().mean() + torch.finfo(torch.float64).tiny)
        return damped
