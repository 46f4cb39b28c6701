"""What the training loop asks of a way to turn trainable numbers into masks."""

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
        ranks: what the forward pass computes, ``None`` inside for dense; when the whole is ``None`` the forward pass
            multiplies the components by ``masks``.
    """

    masks: Mapping[str, torch.Tensor]
    ranks: Mapping[str, int | None] | None


class MaskFamily:
    """Base class of all trainable masks.

    Class attributes:
        own_step: the family moves its parameters itself (:meth:`update`) instead of leaving that to Adam.

    Attributes:
        specs: the layers.
        budget: the limit, and the choices of the layers; of one bit width.
        parameters: name → tensor, saved in checkpoints; leaves that require a gradient unless ``own_step``.
    """

    own_step: ClassVar[bool] = False
    specs: Sequence[LinearSpec]
    budget: Budget
    parameters: dict[str, torch.Tensor]

    def cut(self, progress: float, generator: torch.Generator) -> Cut:
        """Return the masks of a step.

        Args:
            progress: share of the training that is done, from 0 to 1, for schedules.
            generator: of everything random in the step.
        """
        raise NotImplementedError

    def update(self, found: MaskGradients, progress: float) -> None:
        """Move the parameters by the gradient of the latest cut; only where ``own_step``.

        Args:
            found: loss of the step's batch, and its gradient for every mask.
            progress: share of the training that is done, from 0 to 1.
        """
        raise NotImplementedError

    def penalty(self) -> torch.Tensor | None:
        """Return what is added to the language model's loss, differentiable, or ``None``; for the latest cut."""
        return None

    def allocation(self) -> Allocation:
        """Return choices within the budget, less than one rank step unspent, from the parameters as they are now."""
        raise NotImplementedError
