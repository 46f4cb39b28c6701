"""Base class of the methods that train a mask family of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from ara import bounds
from ara.allocation.base import Allocator
from ara.decomposition.base import MethodOptions
from ara.layout_names import LayoutName
from ara.masks.context import TuningContext
from ara.masks.loop import trained_allocation
from ara.masks.mask_family import MaskFamily
from ara.solver.problem import Allocation, Budget, Module


class TrainedOptions(MethodOptions):
    """Options of every training."""

    steps: int = Field(60, ge=1, le=bounds.MAX_STEPS, description="optimiser steps")
    batch: int = Field(4, ge=1, le=bounds.MAX_WINDOWS, description="windows per step")
    loss: Literal["ce", "kl"] = Field(
        "ce", description="ce: cross-entropy of the text (as in the paper); kl: divergence from the dense model"
    )


class Trained(Allocator):
    """Trains masks, and returns the best allocation seen on held-out text, including the start.

    Class attributes:
        label: of the progress bar.
    """

    needs_model = True
    layouts: ClassVar[tuple[LayoutName, ...]] = ("factors",)
    all_ranks = True
    label: ClassVar[str]

    def allocate(self, modules: Sequence[Module], budget: Budget, context: TuningContext | None = None) -> Allocation:
        """Train the masks and return their best allocation."""
        assert context is not None
        return trained_allocation(self.family(modules, budget), context, self.options, self.label)

    def family(self, modules: Sequence[Module], budget: Budget) -> MaskFamily:
        """Return the masks at their start."""
        raise NotImplementedError
