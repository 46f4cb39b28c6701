"""Pivoted layout: a matrix of rank k in k(m + n − k) parameters, without loss.

A matrix W of rank k has k rows that span all others, the pivots W_p (k, n): W = P [I; C] W_p, with coefficients C
(m − k, k) of the other rows and a permutation P. A and B have k(m + n) numbers. The k² numbers saved are the freedom to
write B A as (B M)(M⁻¹ A). At full rank the cost is mn, so every smaller rank costs less than the dense weight. There is
no jump at R = 1, for which ARA's guidance loss corrects in the case of two factors.

The representation is that of PIFA (Pivoting Factorization, Zhao et al., ICML 2025, arXiv 2501.19090). The choice of
pivots decides how much C magnifies rounding errors of the pivots' outputs. Here no coefficient is much above 1 (a
nearly dominant submatrix, "maxvol": Goreinov et al., 2010).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ara.layouts.base import Layout, Number, Piece
from ara.layouts.modeling_ara import PivotedLinear

# Swaps stop when no coefficient is larger; a value below 1 is never reached. LU leaves a largest coefficient of 2 to 3.
# In layers of SmolLM2-135M, 7 to 62 swaps bring it below 1.05; the first ones matter most.
_LARGEST = 1.05
_SWAPS = 100


class PivotedLayout(Layout):
    """Pivot rows A (k, n), coefficients C (m − k, k) of the other rows, and the order (m) of the outputs."""

    module = PivotedLinear
    indices = ("order",)
    progress = "Pivoting layers"

    def cost(self, m: int, n: int, k: Number) -> Number:
        """Return k(m + n − k), which is mn at full rank."""
        return k * (m + n - k)

    def store(self, m: int, n: int, k: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of pivots, coefficients and order."""
        return {"A.weight": (k, n), "C.weight": (m - k, k), "order": (m,)}

    def split(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return pivots and coefficients in float64, and the order."""
        rows, coefficients, order = pivot(a, b)
        return {"A.weight": rows, "C.weight": coefficients, "order": order}

    def join(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pivots, and the coefficients of all rows, 1 at the pivots, in the order of the outputs."""
        a, c = tensors["A.weight"], tensors["C.weight"]
        rows = torch.cat([torch.eye(len(a), dtype=c.dtype, device=c.device), c])
        return a, rows.index_select(0, tensors["order"])

    def cut(self, tensors: Mapping[str, torch.Tensor], rows: Sequence[slice], columns: slice) -> Piece:
        """Return all pivots with some columns, the rows of C that the outputs need, and their order."""
        a = tensors["A.weight"]
        order = torch.cat([tensors["order"][span] for span in rows]).long()
        combined = order >= len(a)
        c = tensors["C.weight"][order[combined] - len(a)]
        order[combined] = len(a) + torch.arange(len(c), device=order.device)
        return Piece(a[:, columns], c, True, order)


class Pivots(NamedTuple):
    """A matrix of rank k as k of its rows.

    Attributes:
        a: (k, n) float64, the pivots W_p.
        c: (m − k, k) float64, every other row as a combination of the pivots.
        order: (m) int32; row i of the matrix is row ``order[i]`` of [W_p; C W_p].
    """

    a: torch.Tensor
    c: torch.Tensor
    order: torch.Tensor


def pivot(a: torch.Tensor, b: torch.Tensor) -> Pivots:
    """Return the pivots of the product B A, in float64.

    LU with partial pivoting chooses rows of Q, from the QR factorisation of B. Swaps then improve the choice. Q has
    full rank even if B has not. The work is O(m k²), and O(m k) per swap.

    Args:
        a: (k, n).
        b: (m, k), k ≤ m.

    Raises:
        ValueError: k > m.
    """
    m, k = b.shape
    if k > m:
        raise ValueError(f"B of shape {m} × {k} has more columns than rows: no {k} rows to be pivots")
    q, r = torch.linalg.qr(b.double())
    pivots = dominant_rows(q)
    others = torch.ones(m, dtype=torch.bool, device=b.device)
    others[pivots] = False
    rest = others.nonzero()[:, 0]
    order = torch.empty(m, dtype=torch.int32, device=b.device)
    order[torch.cat([pivots, rest])] = torch.arange(m, dtype=torch.int32, device=b.device)
    rows = q[pivots] @ (r @ a.double())
    return Pivots(rows, torch.linalg.solve(q[pivots], q[rest], left=False), order)


def dominant_rows(q: torch.Tensor) -> torch.Tensor:
    """Return k rows of ``q`` (m, k), of full column rank, such that all others have small coefficients: (k) int64.

    While a coefficient is too large, its row replaces its pivot. Each swap multiplies the volume of the pivots by the
    coefficient, so no choice occurs twice and the search ends.
    """
    k = q.shape[1]
    _, swaps = torch.linalg.lu_factor(q)
    rows = torch.arange(len(q))
    for i, other in enumerate(swaps.tolist()):
        rows[[i, other - 1]] = rows[[other - 1, i]]
    rows = rows[:k].to(q.device)
    coefficients = torch.linalg.solve(q[rows], q, left=False).contiguous()
    for _ in range(_SWAPS):
        at = max((coefficients.argmax(), coefficients.argmin()), key=lambda at: float(coefficients.view(-1)[at].abs()))
        i, j = divmod(int(at), k)
        largest = coefficients[i, j].clone()
        if largest.abs() <= _LARGEST:
            break
        change = coefficients[i].clone()
        change[j] -= 1
        coefficients.addr_(coefficients[:, j].clone(), change / largest, alpha=-1)
        rows[j] = i
    return rows
