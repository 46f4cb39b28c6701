"""What an allocator is given and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ara.allocation.budget import Budget
from ara.decomposition.base import MethodOptions
from ara.models.linears import LinearSpec

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
    """Parameters of one layer: k(m + n), or mn when it stays dense (``rank`` is ``None``)."""
    return spec.dense_cost if rank is None else rank * spec.rank_cost


class Allocator:
    """Base class of all allocators."""

    Options: ClassVar[type[MethodOptions]] = MethodOptions

    def __init__(self, options: MethodOptions | None = None) -> None:
        self.options = options or self.Options()

    def allocate(self, modules: Sequence[Module], budget: Budget) -> Allocation:
        """Choose a rank, or dense, for every module.

        The result never costs more than ``budget.parameters`` and leaves less than the cheapest rank step unspent;
        every rank is a positive multiple of ``budget.rank_multiple`` with k(m + n) < mn.
        """
        raise NotImplementedError
