"""What an allocator is given and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ara.allocation.allocation import Allocation, Module
from ara.allocation.budget import Budget
from ara.config import Layout
from ara.decomposition.base import MethodOptions
from ara.progress import SILENT, Reporter

if TYPE_CHECKING:
    from ara.masks.learned import LearnedLosses
    from ara.masks.model import MaskedModel
    from ara.masks.table_cache import TableCache


@dataclass(frozen=True, eq=False)
class Context:
    """What an allocator that looks at the model may use.

    Attributes:
        model: with all layers dense; an allocator may cut it as it likes.
        train: (w, t) int64 calibration windows to learn from.
        held_out: (w, t) int64 calibration windows to compare candidates on, at least one window away from ``train``.
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
