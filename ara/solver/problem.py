"""The ranks of all layers, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ara.models.weights import LinearSpec
from ara.solver.budget import Budget

# What a rank is called when the layer stays dense.
DENSE = "dense"


@dataclass(frozen=True)
class Module:
    """A factorised layer as an allocator sees it.

    Attributes:
        spec: name, layer, kind and widths.
        spectrum: (r) float64, see :class:`ara.decomposition.base.Factors`.
    """

    spec: LinearSpec
    spectrum: torch.Tensor


@dataclass(frozen=True)
class Allocation:
    """Kept rank of every layer, by module path; ``None`` means dense."""

    ranks: Mapping[str, int | None]

    @classmethod
    def from_picks(cls, specs: Sequence[LinearSpec], picks: Sequence[int], budget: Budget) -> Allocation:
        """Return the allocation that ``picks``, an index into ``budget.choices(spec)`` per layer, stands for."""
        return cls({spec.name: budget.choices(spec)[pick][0] for spec, pick in zip(specs, picks, strict=True)})

    def cost(self, specs: Sequence[LinearSpec]) -> int:
        """Return the parameters of all ``specs`` under this allocation."""
        return sum(cost(spec, self.ranks[spec.name]) for spec in specs)

    def keep(self, specs: Sequence[LinearSpec]) -> float:
        """Return the fraction of the layers' dense parameters that stays."""
        return self.cost(specs) / sum(spec.dense_cost for spec in specs)

    def low_rank(self) -> dict[str, int]:
        """Return module path → rank of the layers that do not stay dense."""
        return {name: rank for name, rank in self.ranks.items() if rank is not None}

    def dense_count(self) -> int:
        """Return how many layers stay dense."""
        return sum(rank is None for rank in self.ranks.values())


def cost(spec: LinearSpec, rank: int | None) -> int:
    """Parameters of one layer: those of its rank, or mn when it stays dense (``rank`` is ``None``)."""
    return spec.dense_cost if rank is None else spec.cost(rank)
