"""Metrics of an error at the output of a block."""

from __future__ import annotations

import torch

# Share of the mean Fisher information that is added to that of every channel: a noisy estimate gives no direction for
# free. As the damping of the two-sided decomposition.
DAMPING = 0.1


class Metric:
    """A quadratic form eᵀ M e of the error e (d) of a block's output.

    Attributes:
        root: ``None`` for M = I; (d) with M = diag(root²); (d, d) with M = root rootᵀ.
        device: of the errors.
    """

    def __init__(self, fisher: torch.Tensor | None = None, device: torch.device | str = "cpu") -> None:
        """Prepare the form.

        Args:
            fisher: (d) or (d, d) Fisher information, see :func:`ara.recovery.fisher.block_fisher`; ``None`` for the
                plain squared error.
            device: of the errors.
        """
        self.device = torch.device(device)
        self.root = None if fisher is None else _root(fisher).to(device)

    def __call__(self, error: torch.Tensor) -> torch.Tensor:
        """Return eᵀ M e of errors (..., d): (...) float32."""
        weighted = error.float()
        if self.root is not None:
            weighted = weighted * self.root if self.root.dim() == 1 else weighted @ self.root
        return weighted.square().sum(-1)


def _root(fisher: torch.Tensor) -> torch.Tensor:
    """Return the root of damped Fisher information, float32."""
    form = fisher.double()
    diagonal = form if form.dim() == 1 else form.diagonal()
    mean = float(diagonal.mean())
    if mean == 0:  # no gradient reaches this block: all errors count the same
        return torch.ones_like(diagonal, dtype=torch.float32)
    if form.dim() == 1:
        return (form + DAMPING * mean).sqrt().float()
    damped = form + DAMPING * mean * torch.eye(len(form), dtype=form.dtype)
    return torch.linalg.cholesky(damped).float()
