"""Whitened SVD: least error of the layer's outputs on calibration text (SVD-LLM, arXiv 2403.07378)."""

from __future__ import annotations

import torch

from ara.calibration.gradients import GradientStats
from ara.calibration.moments import InputStats
from ara.decomposition.base import Decomposition, Factors, checked
from ara.decomposition.subspace import weighted_factors


class Whitened(Decomposition):
    """Minimises E‖(W − W_k) x‖²; the unit of the spectrum is squared output per token."""

    def decompose(
        self, weight: torch.Tensor, stats: InputStats | None, gradients: GradientStats | None = None
    ) -> Factors:
        """Factorise ``weight`` (m, n) in the metric G = E[x xᵀ]."""
        assert stats is not None
        return weighted_factors(checked(weight), stats.second_moment.to(weight.device).double())
