"""Two-sided SVD: errors are weighted by the layer's inputs and by the gradients of the loss at its outputs.

Minimises tr(H (W − W_k) G (W − W_k)ᵀ) with G = E[x xᵀ] and H = E[g gᵀ], the second moments of inputs and of output
gradients. H ⊗ G is the Kronecker approximation of the layer's Fisher information (K-FAC, arXiv 1503.05671); whitening
takes H = I. As in GFWSVD (arXiv 2505.17974) and IO-SVD (arXiv 2605.15626).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from ara.calibration.gradients import GradientStats
from ara.calibration.moments import InputStats
from ara.decomposition.base import Decomposition, Factors, MethodOptions, checked
from ara.decomposition.subspace import weighted_factors


class TwoSidedOptions(MethodOptions):
    """Options of the two-sided decomposition."""

    targets: Literal["model", "text"] = Field(
        "model", description="gradients of the loss against tokens drawn from the model (Fisher) or the text's own"
    )
    damping: float = Field(
        0.1, gt=0, le=10, description="multiple of the mean gradient energy added to H's diagonal, against noise"
    )
    gradient_share: float = Field(
        0.5, gt=0, le=1, description="share of the calibration windows that is also used for gradients"
    )


class TwoSided(Decomposition):
    """Minimises ‖H^{1/2} (W − W_k) G^{1/2}‖_F; the unit of the spectrum is about (nats per window)² per token."""

    Options = TwoSidedOptions
    needs_gradients = True

    def decompose(
        self, weight: torch.Tensor, stats: InputStats | None, gradients: GradientStats | None = None
    ) -> Factors:
        """Factorise ``weight`` (m, n) in the metrics G and H."""
        assert stats is not None and gradients is not None and isinstance(self.options, TwoSidedOptions)
        outputs = gradients.second_moment.to(weight.device).double()
        diagonal = outputs.dim() == 1
        mean = (outputs if diagonal else outputs.diagonal()).mean()
        ones = torch.ones(len(outputs), dtype=torch.float64, device=weight.device)
        identity = ones if diagonal else ones.diag()
        if mean == 0:  # no gradient reached this layer: all errors count the same
            outputs, mean = identity, mean + 1
        damped = outputs + self.options.damping * mean * identity
        return weighted_factors(checked(weight), stats.second_moment.to(weight.device).double(), damped)
