"""The staircase mask: a few trainable numbers per layer, a monotone mask over all of its components.

A layer has D *atoms*, ranks s_1 < s_2 < … < s_D, and θ ∈ R^D. With α = softmax(θ) on the simplex and the staircase
matrix M ∈ {0, 1}^{D×r} whose row d is ones up to s_d, the mask is p = αM (ARA, arXiv 2510.19389). So p decreases
monotonically, Σ_j p_j = Σ_d α_d s_d is the expected rank, and the gradient of every θ_d includes all components.

All layers share one padded matrix: rows are layers, columns atoms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ara.models.weights import LinearSpec
from ara.solver.problem import Budget, Choice

# Score of padding atoms.
_NEVER = -1e30


@dataclass(frozen=True, eq=False)
class Atoms:
    """The ranks that each layer may take, cheapest first.

    Attributes:
        specs: the layers (L).
        ranks: (L, D) int64, components kept; the full rank for the dense atom, 0 for padding.
        costs: (L, D) float64, in the unit of the budget; parameters for the paper's atoms.
        real: (L, D) bool, False for padding.
        dense: (L, D) bool, True for the dense atom, which is the last real one of a row.
    """

    specs: tuple[LinearSpec, ...]
    ranks: torch.Tensor
    costs: torch.Tensor
    real: torch.Tensor
    dense: torch.Tensor

    def masks(self, alpha: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return p = αM per layer, (r) float32, differentiable in ``alpha`` (L, D)."""
        result = {}
        for i, spec in enumerate(self.specs):
            # Row d of M is ones up to s_d, so αM is a sum over the atoms from the right.
            at = torch.zeros(spec.full_rank + 1, dtype=alpha.dtype).index_add(0, self.ranks[i], alpha[i])
            result[spec.name] = at.flip(0).cumsum(0).flip(0)[1:].float()
        return result

    def alpha(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the softmax over each row's real atoms, (L, D)."""
        return torch.softmax(scores.masked_fill(~self.real, _NEVER), 1)

    def hard_ranks(self, picks: torch.Tensor) -> dict[str, int | None]:
        """Return module path → rank, ``None`` for the dense atom, of the picked columns (L)."""
        ranks = self.ranks.gather(1, picks[:, None])[:, 0].tolist()
        dense = self.dense.gather(1, picks[:, None])[:, 0].tolist()
        return {spec.name: None if whole else rank for spec, rank, whole in zip(self.specs, ranks, dense, strict=True)}

    def expand(self, tables: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the entries of per-rank tables, (r + 1) each, at every atom: (L, D) float64, 0 for padding."""
        rows = [tables[spec.name].double()[self.ranks[i]] for i, spec in enumerate(self.specs)]
        return torch.stack(rows).masked_fill(~self.real, 0)


def priced_atoms(specs: Sequence[LinearSpec], budget: Budget, count: int) -> Atoms:
    """Return up to ``count`` evenly spaced ranks cheaper than dense per layer, and dense as one more atom.

    Ranks that cost more than dense (between break-even and full rank) are left out. So the gain has no jump in this
    search space.
    """
    rows = []
    for spec in specs:
        *low, dense = budget.rank_choices(spec)
        steps = min(count, len(low))
        picks = sorted({round(i * (len(low) - 1) / max(1, steps - 1)) for i in range(steps)})
        rows.append([*(low[i] for i in picks), dense])
    return _stack(specs, rows)


def paper_atoms(specs: Sequence[LinearSpec], count: int) -> Atoms:
    """Return ``count`` evenly spaced ranks from 1 to full rank per layer; their cost k(m + n) may exceed mn."""
    rows = []
    for spec in specs:
        steps = min(count, spec.full_rank)
        ranks = sorted({max(1, round((i + 1) * spec.full_rank / steps)) for i in range(steps)})
        rows.append([Choice(rank, spec.bits, rank * (spec.m + spec.n)) for rank in ranks])
    return _stack(specs, rows)


def _stack(specs: Sequence[LinearSpec], rows: Sequence[Sequence[Choice]]) -> Atoms:
    width = max(len(row) for row in rows)
    ranks = torch.zeros(len(rows), width, dtype=torch.int64)
    costs = torch.zeros(len(rows), width, dtype=torch.float64)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    dense = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        for d, choice in enumerate(row):
            ranks[i, d] = specs[i].full_rank if choice.rank is None else choice.rank
            costs[i, d], real[i, d], dense[i, d] = choice.cost, True, choice.rank is None
    return Atoms(tuple(specs), ranks, costs, real, dense)
