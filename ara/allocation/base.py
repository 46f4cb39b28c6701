"""What an allocator is given and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ara.allocation.budget import Budget
from ara.config import Layout
from ara.decomposition.base import MethodOptions
from ara.models.linears import LinearSpec
from ara.progress import SILENT, Reporter

if TYPE_CHECKING:
    from ara.masks.learned import LearnedLosses
    from ara.masks.model import MaskedModel
    from ara.masks.table_cache import TableCache

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


@dataclass(frozen=True, eq=False)
class Context:
    """What an allocator that looks at the model may use.

    Attributes:
        model: with all layers dense; an allocator may cut it as it likes.
        train: (w, t) int64 calibration windows to learn from.
        held_out: (w, t) int64 calibration windows that share no document with ``train``, to compare candidates on.
        batch_size: windows per pass.
        seed: of everything random.
        report: progress.
        learned: what ``ara train-masks`` has found, by budget; ``None`` when there was no training.
        table: the sensitivity table that it began with; ``None`` where it needed none.
        table_cache: where sensitivity tables are kept; ``None``: every one is made anew.
    """

    model: MaskedModel
    train: torch.Tensor
    held_out: torch.Tensor
    batch_size: int = 4
    seed: int = 0
    report: Reporter = SILENT
    learned: Sequence[LearnedLosses] | None = None
    table: Mapping[str, torch.Tensor] | None = None
    table_cache: TableCache | None = None


class Allocator:
    """Base class of all allocators.

    Class attributes:
        Options: the method's own options.
        needs_model: whether :meth:`allocate` must be given a :class:`Context`.
        layouts: those whose costs it knows.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    needs_model: ClassVar[bool] = False
    layouts: ClassVar[tuple[Layout, ...]] = ("factors", "pivoted")

    def __init__(self, options: MethodOptions | None = None) -> None:
        self.options = options or self.Options()

    def allocate(self, modules: Sequence[Module], budget: Budget, context: Context | None = None) -> Allocation:
        """Choose a rank, or dense, for every module.

        Args:
            modules: the factorised layers.
            budget: the limit.
            context: the model and calibration text; ``None`` only when ``needs_model`` is false.

        The result never costs more than ``budget.parameters`` and leaves less than the cheapest rank step unspent;
        every rank is a positive multiple of ``budget.rank_multiple`` that costs less than mn.
        """
        raise NotImplementedError

    def starts(self, modules: Sequence[Module], budget: Budget, context: Context) -> dict[str, Allocation]:
        """Return the simpler allocations that this method set out from, by name, for the guard to compare with."""
        return {}
