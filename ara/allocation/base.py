"""The base class of allocators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ara.config.latency import Objective
from ara.decomposition.base import MethodOptions
from ara.layout_names import LAYOUT_NAMES, LayoutName
from ara.masks.context import TuningContext
from ara.solver.problem import Allocation, Budget, Module


class Allocator:
    """Base class of all allocators.

    Class attributes:
        Options: the method's own options.
        needs_model: whether :meth:`allocate` needs a :class:`TuningContext`.
        layouts: the layouts that the method supports.
        all_ranks: whether the method needs the factors of all ranks, also of those that no budget offers.
        objectives: what its budget may limit: parameters, or time (latency).
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    needs_model: ClassVar[bool] = False
    layouts: ClassVar[tuple[LayoutName, ...]] = LAYOUT_NAMES
    all_ranks: ClassVar[bool] = False
    objectives: ClassVar[tuple[Objective, ...]] = ("parameters",)

    def __init__(self, options: MethodOptions | None = None) -> None:
        self.options = options or self.Options()

    def allocate(self, modules: Sequence[Module], budget: Budget, context: TuningContext | None = None) -> Allocation:
        """Choose a rank, or dense, for every module.

        Args:
            modules: the factorised layers.
            budget: the limit, in parameters, bytes or nanoseconds.
            context: the model and calibration text; may be ``None`` if ``needs_model`` is false.

        The result never costs more than ``budget.limit`` and leaves less than the cheapest rank step unspent. Every
        rank is a positive multiple of ``budget.rank_multiple`` that costs less than the dense layer.

        Raises:
            ValueError: the budget offers several bit widths, and the method chooses only ranks.
        """
        raise NotImplementedError

    def starts(self, modules: Sequence[Module], budget: Budget, context: TuningContext) -> dict[str, Allocation]:
        """Return the simpler allocations from which this method starts, by name; the guard compares with them."""
        return {}
