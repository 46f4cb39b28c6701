"""Plain SVD: least error of the weight itself, whatever its inputs are; the usual baseline."""

from __future__ import annotations

import torch

from ara.calibration.gradients import GradientStats
from ara.calibration.moments import InputStats
from ara.decomposition.base import Decomposition, Factors, checked
from ara.decomposition.subspace import weighted_factors


class Plain(Decomposition):
    """Minimises ‖W − W_k‖_F; needs no text."""

    needs_text = False

    def decompose(
        self, weight: torch.Tensor, stats: InputStats | None, gradients: GradientStats | None = None
    ) -> Factors:
        """Factorise ``weight`` (m, n); ``stats`` is not used."""
        return weighted_factors(checked(weight), None)
