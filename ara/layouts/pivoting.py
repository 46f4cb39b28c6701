"""Pivoted storage of a low-rank matrix: the same matrix in fewer parameters, without loss.

A matrix of rank k has k rows that span all others: W_k = P [I; C] W_p with the pivot rows W_p (k, n) themselves, the
coefficients C (m − k, k) of the other rows, and a permutation P. That is k(m + n − k) numbers and m indices, where A
and B are k(m + n): the k² that go are the freedom to write B A as (B M)(M⁻¹ A). At full rank it is mn, so every rank
below is cheaper than the dense weight, and the jump of the gain at R = 1 that ARA's guidance loss is about is gone.

The representation is that of PIFA (Pivoting Factorization, Zhao et al., ICML 2025, arXiv 2501.19090). Which rows are
pivots is free, and decides how far C magnifies the rounding of the pivots' outputs: rows are chosen here so that no
coefficient is much above 1 (a nearly dominant submatrix, "maxvol": Goreinov et al., 2010).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# No coefficient is larger, unless _SWAPS are used up first; 1 is the limit of what swaps can reach. LU leaves a largest
# coefficient of 2 to 3, and 7 to 62 swaps bring it below 1.05 in layers of SmolLM2-135M; the first ones matter most.
_LARGEST = 1.05
_SWAPS = 100


@dataclass(frozen=True, eq=False)
class Pivoted:
    """A matrix of rank k, pivoted.

    Attributes:
        a: (k, n) float64, the pivot rows W_p.
        c: (m − k, k) float64, every other row as a combination of the pivot rows.
        order: (m) int32; row i of the matrix is row ``order[i]`` of [W_p; C W_p].
    """

    a: torch.Tensor
    c: torch.Tensor
    order: torch.Tensor


def pivot(a: torch.Tensor, b: torch.Tensor) -> Pivoted:
    """Return the product B A pivoted, in float64.

    QR of B, rows of Q by LU with partial pivoting, improved by swaps; Q has full rank even where B has not. O(m k²) and
    O(m k) per swap.

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
    return Pivoted(rows, torch.linalg.solve(q[pivots], q[rest], left=False), order)


def dominant_rows(q: torch.Tensor) -> torch.Tensor:
    """Return k rows of ``q`` (m, k), of full column rank, in which the others have small coefficients: (k) int64.

    While a coefficient is too large, its row takes the place of the pivot that it belongs to: that multiplies the
    volume of the pivot rows by the coefficient, so no choice comes back and the search ends.
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
