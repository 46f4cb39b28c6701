"""Both factors as they are: y = B (A x) + bias, in k(m + n) parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ara.layouts.base import Layout, Number
from ara.layouts.modeling_ara import LowRankLinear


class FactorsLayout(Layout):
    """Two thin matrices, A (k, n) and B (m, k)."""

    module = LowRankLinear
    bias = "B.bias"
    free_basis = as_given = True

    def cost(self, m: int, n: int, k: Number) -> Number:
        """Return k(m + n): a rank above mn / (m + n) costs more than the dense weight."""
        return k * (m + n)

    def store(self, m: int, n: int, k: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A and B."""
        return {"A.weight": (k, n), "B.weight": (m, k)}

    def split(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return A and B themselves."""
        return {"A.weight": a, "B.weight": b}

    def join(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B themselves."""
        return tensors["A.weight"], tensors["B.weight"]
