"""The paper's form: a staircase mask, a budget penalty and a guidance loss (ARA, arXiv 2510.19389).

    α_i = softmax(θ_i)      p_i = α_i M      E_i = Σ_d α_id s_d      R_i = E_i (m_i + n_i) / (m_i n_i)

The forward pass computes rank round(E_i), or W_i itself when R_i ≥ 1, which then costs m_i n_i (Eq. 8). The backward
pass is straight-through to p_i. The loss is

    L = L_LM + λ1 (Σ_i min(R_i, 1) m_i n_i / limit − 1)² + λ2 L_guidance

and afterwards "ranks are rescaled proportionally to meet the target". The paper has a budget term and a guidance loss,
but does not give their exact forms. The forms here are ours.

**Guidance.** Let g(R) be the gain of a layer: the share of its spectral energy that rank k = R mn / (m + n) keeps,
linear between ranks, and 1 for R ≥ 1. It jumps at R = 1, by 1 − g(1⁻). The straight-through gradient contains the slope
g'(R), which is small just below 1, but not the jump. So under a price μ between g'(1⁻) and the slope of a chord to
(1, 1) a layer stays below 1 although dense is better. The least concave function above g, its envelope, does not have
this local optimum:

    ĝ(R) = g(R) up to R_t,  1 − s (1 − R) from there to 1        s = min_{R<1} (1 − g(R)) / (1 − R), R_t its argmin

For every μ the only local maximum of ĝ(R) − μR is at R = 1 if μ < s and at R ≤ R_t if μ > s. Between R_t and 1 the
slopes of ĝ and g differ by s − g'(R). The loss with this gradient is

    L_guidance = Σ_i w_i (g(R_i) − ĝ(R_i)) ≤ 0 for R_t < R_i < 1, else 0        w_i = m_i n_i / Σ mn

It jumps at R = 1 as g does. Only its gradient has a meaning, not its value.

**From dense back to low rank.** A dense layer costs mn for every R ≥ 1, so neither the budget term nor guidance changes
its R. Only two things do: the straight-through gradient of L_LM, although its value does not depend on R there, and the
rescaling. The rescaling makes the layers of smallest R low-rank if the dense ones leave no room for the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ara.layout_names import LayoutName
from ara.masks.mask_family import Cut, MaskFamily
from ara.masks.staircase import Atoms
from ara.models.weights import LinearSpec
from ara.solver.problem import Allocation, Budget
from ara.solver.rounding import proportional, without_choice

_BISECTIONS = 100
# Starting share of a dense layer: near enough to 1 to become low-rank, but not within one step.
_DENSE_START = 1.01
# Least distance of the starting expected rank from the first and the last atom, in ranks.
_OFF_EDGE = 1e-3


class PaperStaircase(MaskFamily):
    """θ over ranks 1 … r, a budget penalty, a guidance loss, and proportional rescaling at the end.

    Class attributes:
        layouts: those in which a rank costs k(m + n), as the formulas assume.
    """

    layouts: ClassVar[tuple[LayoutName, ...]] = ("factors",)

    def __init__(
        self,
        atoms: Atoms,
        spectra: Mapping[str, torch.Tensor],
        budget: Budget,
        start: torch.Tensor,
        budget_weight: float = 100.0,
        guidance_weight: float = 10.0,
    ) -> None:
        """Start from scores.

        Args:
            atoms: of :func:`ara.masks.staircase.paper_atoms`.
            spectra: module path → (r) non-negative, see :class:`ara.decomposition.base.Factors`.
            budget: the limit.
            start: θ (L, D) at the beginning, see :func:`start_at`.
            budget_weight: λ1, nats per squared relative deviation of the cost from the budget.
            guidance_weight: λ2, nats per share of all layers' spectral energy; 0 is off. The paper gives no weights.
        """
        self.specs, self.atoms, self.budget = atoms.specs, atoms, budget
        self.budget_weight, self.guidance_weight = budget_weight, guidance_weight
        self.parameters = {"theta": start.clone().requires_grad_()}
        self.dense_costs = torch.tensor([spec.dense_cost for spec in atoms.specs], dtype=torch.float64)
        self.break_even = torch.tensor([_break_even(spec) for spec in atoms.specs], dtype=torch.float64)
        self.fixed = torch.tensor(without_choice(atoms.specs, budget))
        self.guidance = Guidance(atoms.specs, spectra)
        self.expected = torch.zeros(0)

    def cut(self, progress: float, generator: torch.Generator) -> Cut:
        """Return the masks p and the hard ranks of the current θ."""
        alpha = self.atoms.alpha(self.parameters["theta"])
        self.expected = self._expected(alpha)
        return Cut(self.atoms.masks(alpha), self._ranks(self.expected.detach()))

    def penalty(self) -> torch.Tensor:
        """Return λ1 · budget term + λ2 · guidance of the latest :meth:`cut`, nats; float64 scalar."""
        dense = self.fixed | (self.expected.detach() >= self.break_even)
        capped = torch.where(dense, self.break_even, self.expected)
        spent = (capped / self.break_even * self.dense_costs).sum()
        budget = (spent / self.budget.in_parameters(self.specs) - 1).square()
        return self.budget_weight * budget + self.guidance_weight * self.guidance(capped)

    def allocation(self) -> Allocation:
        """Return the hard ranks, rescaled: dense layers stay dense, the others are scaled by one factor."""
        with torch.no_grad():
            expected = self._expected(self.atoms.alpha(self.parameters["theta"]))
        ranks = self._ranks(expected)
        shares = []
        for spec, value in zip(self.specs, (expected / self.break_even).tolist(), strict=True):
            rank = ranks[spec.name]
            shares.append(value if rank is None else rank / _break_even(spec))
        return proportional(self.specs, shares, self.budget, keep_dense=True)

    def _expected(self, alpha: torch.Tensor) -> torch.Tensor:
        return (alpha * self.atoms.ranks).sum(1)

    def _ranks(self, expected: torch.Tensor) -> dict[str, int | None]:
        """Return the hard rank of every layer; a rank below break-even is not rounded up to it."""
        ranks: dict[str, int | None] = {}
        for spec, value, fixed in zip(self.specs, expected.tolist(), self.fixed.tolist(), strict=True):
            dense = fixed or value >= _break_even(spec)
            ranks[spec.name] = None if dense else max(1, min(round(value), spec.top_rank))
        return ranks


class Guidance:
    """The guidance loss; see the module's docstring.

    Attributes:
        tangent: k_t (L) float64, the rank of R_t; break-even if no rank is cheaper than dense.
        slope: s (L) float64, share of energy per R.
    """

    def __init__(self, specs: Sequence[LinearSpec], spectra: Mapping[str, torch.Tensor]) -> None:
        self.break_even = torch.tensor([_break_even(spec) for spec in specs], dtype=torch.float64)
        # Largest rank below break-even: the last linear piece of g starts here.
        self.highest = torch.tensor([spec.top_rank for spec in specs])
        self.weights = torch.tensor([spec.dense_cost for spec in specs], dtype=torch.float64)
        self.weights = self.weights / self.weights.sum()
        # g at ranks 0 … r, padded with ones.
        self.gains = torch.ones(len(specs), 1 + max(spec.full_rank for spec in specs), dtype=torch.float64)
        for i, spec in enumerate(specs):
            spectrum = spectra[spec.name].double()
            tails = spectrum.flip(0).cumsum(0).flip(0)
            # A zero spectrum loses nothing at any rank.
            self.gains[i, : len(spectrum)] -= tails / tails[0].clamp_min(torch.finfo(torch.float64).tiny)
        ranks = torch.arange(self.gains.shape[1], dtype=torch.float64)
        chords = (1 - self.gains) / (1 - ranks / self.break_even[:, None])
        # g is concave and linear between ranks, so the least chord starts at a rank.
        chords = chords.masked_fill((ranks < 1) | (ranks > self.highest[:, None]), torch.inf)
        self.slope, tangent = chords.min(1)
        pays = self.highest >= 1
        self.slope = torch.where(pays, self.slope, 0)
        self.tangent = torch.where(pays, tangent.double(), self.break_even)

    def gain(self, expected: torch.Tensor) -> torch.Tensor:
        """Return g (L) at the ranks E (L), differentiable. No rank is above break-even, where the result is g(1⁻)."""
        piece = torch.minimum(expected.detach().floor().long(), self.highest)[:, None]
        low, high = self.gains.gather(1, piece)[:, 0], self.gains.gather(1, piece + 1)[:, 0]
        return low + (expected - piece[:, 0]) * (high - low)

    def __call__(self, expected: torch.Tensor) -> torch.Tensor:
        """Return L_guidance at the ranks E (L) float64, none above break-even; scalar.

        At break-even the value is 0 and the gradient is that of just below.
        """
        envelope = 1 - self.slope * (1 - expected / self.break_even)
        deficit = self.gain(expected) - envelope
        dense = expected.detach() >= self.break_even
        deficit = deficit - torch.where(dense, deficit, 0).detach()
        inside = expected.detach() > self.tangent
        return (self.weights * torch.where(inside, deficit, 0)).sum()


def start_at(atoms: Atoms, shares: Mapping[str, float], width: float = 0.05) -> torch.Tensor:
    """Return scores whose α is bell-shaped over the ranks and has a given expected rank.

    θ_d = −((s_d − c) / (width · r))². Bisection finds c, so that the mean is right also if the bell is cut off or lies
    between atoms.

    Args:
        atoms: the ranks.
        shares: module path → R = E(m + n) / mn; values beyond the atoms are clamped to the nearest one.
        width: of the bell, as a fraction of the full rank; a wider bell includes more distant ranks.

    Returns:
        θ (L, D) float64.
    """
    full = torch.tensor([spec.full_rank for spec in atoms.specs], dtype=torch.float64)[:, None]
    wanted = torch.tensor([shares[spec.name] * _break_even(spec) for spec in atoms.specs], dtype=torch.float64)[:, None]
    ranks = atoms.ranks.double()
    # Exactly on the first or last atom the softmax would have no gradient.
    wanted = wanted.clamp(ranks[:, :1] + _OFF_EDGE, full - _OFF_EDGE)
    # At this distance neighbouring atoms differ by 40 nats: all weight lies on the last one.
    margin = full * (1 + 20 * width**2 * ranks.shape[1])
    low, high = -margin, full + margin
    for _ in range(_BISECTIONS):
        centre = (low + high) / 2
        theta = -((ranks - centre) / (width * full)).square()
        mean = (atoms.alpha(theta) * ranks).sum(1, keepdim=True)
        low, high = torch.where(mean < wanted, centre, low), torch.where(mean < wanted, high, centre)
    return theta.masked_fill(~atoms.real, 0)


def shares_of(specs: Sequence[LinearSpec], ranks: Mapping[str, int | None]) -> dict[str, float]:
    """Return the share R of every layer for :func:`start_at`; just above 1 for dense."""
    shares = {}
    for spec in specs:
        rank = ranks[spec.name]
        shares[spec.name] = _DENSE_START if rank is None else rank / _break_even(spec)
    return shares


def _break_even(spec: LinearSpec) -> float:
    """Return k* = mn / (m + n), where R = 1."""
    return spec.dense_cost / (spec.m + spec.n)
