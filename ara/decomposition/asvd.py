"""Activation-aware SVD: columns of the weight are scaled by the size of their inputs (ASVD, arXiv 2312.05821)."""

from __future__ import annotations

import torch
from pydantic import Field

from ara.calibration.gradients import GradientStats
from ara.calibration.moments import InputStats
from ara.decomposition.base import Decomposition, Factors, MethodOptions, checked
from ara.decomposition.subspace import weighted_factors


class ActivationScaledOptions(MethodOptions):
    """Options of ASVD."""

    alpha: float = Field(
        0.5, ge=0, le=2, description="exponent of the mean absolute activation; 0 is plain SVD (ASVD uses 0.5)"
    )


class ActivationScaled(Decomposition):
    """Minimises ‖(W − W_k) S‖_F with S = diag(mean|x|^alpha)."""

    Options = ActivationScaledOptions

    def decompose(
        self, weight: torch.Tensor, stats: InputStats | None, gradients: GradientStats | None = None
    ) -> Factors:
        """Factorise ``weight`` (m, n) in the metric S²."""
        assert stats is not None and isinstance(self.options, ActivationScaledOptions)
        scale = stats.abs_mean.to(weight.device).double() ** self.options.alpha
        return weighted_factors(checked(weight), scale**2)
