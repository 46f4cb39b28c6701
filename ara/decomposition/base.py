"""The interface of a decomposition: statistics in, factors out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ara.calibration.gradients import GradientStats
from ara.calibration.moments import InputStats
from ara.config import MethodOptions
from ara.errors import NumericalError


@dataclass(frozen=True)
class Factors:
    """A weight as ordered rank-one components: ``W ≈ B[:, :k] @ A[:k]`` for every k, exact at k = r.

    Attributes:
        a: (r, n) float64.
        b: (m, r) float64.
        spectrum: (r) float64, non-increasing, non-negative: the squared error that component j removes, in the norm of
            the method. Rank k leaves the squared error ``spectrum[k:].sum()``.
    """

    a: torch.Tensor
    b: torch.Tensor
    spectrum: torch.Tensor


class Decomposition:
    """Base class of all methods.

    Class attributes:
        Options: the method's own options.
        needs_text: whether :meth:`decompose` needs input statistics.
        needs_gradients: whether it needs gradient statistics as well.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    needs_text: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = False

    def __init__(self, options: MethodOptions | None = None) -> None:
        self.options = options or self.Options()

    def decompose(
        self, weight: torch.Tensor, stats: InputStats | None, gradients: GradientStats | None = None
    ) -> Factors:
        """Factorise one weight.

        Args:
            weight: W (m, n), any floating dtype.
            stats: statistics of its inputs; ``None`` only if ``needs_text`` is false.
            gradients: statistics of the gradients at its outputs; ``None`` only if ``needs_gradients`` is false.

        Raises:
            NumericalError: the weight holds NaN or infinity.
        """
        raise NotImplementedError


def checked(weight: torch.Tensor) -> torch.Tensor:
    """Return ``weight`` (m, n) in float64, the precision of all decompositions.

    Raises:
        NumericalError: it holds NaN or infinity.
    """
    refuse_nonfinite(weight)
    return weight.double()


def refuse_nonfinite(weight: torch.Tensor) -> None:
    """Check a weight of any shape.

    Raises:
        NumericalError: it holds NaN or infinity.
    """
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise NumericalError(
            f"the weight holds {bad:,} values that are NaN or infinite",
            "the model has numbers beyond the range of float16, or is broken: try --dtype bfloat16"
            if weight.dtype == torch.float16
            else "the model is broken: download it again",
        )
