"""Mask families: the interface between trainable parameters and the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ara.masks.model import MaskGradients
from ara.models.weights import LinearSpec
from ara.solver.problem import Allocation, Budget


@dataclass(frozen=True, eq=False)
class Cut:
    """The masks of one training step.

    Attributes:
        masks: module path → p (r) float32, differentiable in the family's parameters.
        ranks: module path → rank of the forward pass, ``None`` for dense. If ``ranks`` is ``None``, the forward pass
            multiplies the components by ``masks``.
    """

    masks: Mapping[str, torch.Tensor]
    ranks: Mapping[str, int | None] | None


class MaskFamily:
    """Base class of all trainable masks.

    Class attributes:
        own_step: the family updates its parameters itself (:meth:`update`); otherwise Adam does.

    Attributes:
        specs: the layers.
        budget: of one bit width.
        parameters: name → tensor, saved in checkpoints; leaves that require a gradient unless ``own_step``.
    """

    own_step: ClassVar[bool] = False
    specs: Sequence[LinearSpec]
    budget: Budget
    parameters: dict[str, torch.Tensor]

    def cut(self, progress: float, generator: torch.Generator) -> Cut:
        """Return the masks of a step.

        Args:
            progress: finished share of the training, from 0 to 1, for schedules.
            generator: source of all randomness of the step.
        """
        raise NotImplementedError

    def update(self, gradients: MaskGradients, progress: float) -> None:
        """Update the parameters by the gradients at the latest cut; called only if ``own_step``.

        Args:
            gradients: loss of the step's batch, and its gradient for every mask.
            progress: finished share of the training, from 0 to 1.
        """
        raise NotImplementedError

    def penalty(self) -> torch.Tensor | None:
        """Return the differentiable term added to the language model's loss at the latest cut, or ``None``."""
        return None

    def allocation(self) -> Allocation:
        """Return the allocation of the current parameters: within the budget, less than one rank step unspent."""
        raise NotImplementedError

    def tables(self, parameters: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor] | None:
        """Return the loss of every rank, module path → (r + 1) float64; ``None`` if the family learns only ranks.

        Args:
            parameters: use these instead of the current ones.
        """
        return None
