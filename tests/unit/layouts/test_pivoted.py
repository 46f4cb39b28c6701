"""The pivoted layout: the same matrix, fewer numbers, small coefficients."""

from __future__ import annotations

import pytest
import torch

from ara.layouts.pivoted import PivotedLayout, Pivots, dominant_rows, pivot

SHAPES = [(37, 41, 1), (37, 41, 20), (41, 37, 36), (20, 60, 20), (60, 20, 20), (90, 30, 17), (1, 5, 1), (64, 64, 63)]


def _factors(m: int, n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    decay = 10 ** -torch.linspace(0, 3, k, dtype=torch.float64)
    b = torch.randn(m, k, generator=generator, dtype=torch.float64) * decay
    return torch.randn(k, n, generator=generator, dtype=torch.float64), b


def _product(parts: Pivots) -> torch.Tensor:
    return torch.cat([parts.a, parts.c @ parts.a])[parts.order.long()]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_the_product_is_the_same_and_the_numbers_are_fewer(m: int, n: int, k: int) -> None:
    a, b = _factors(m, n, k)
    parts = pivot(a, b)
    torch.testing.assert_close(_product(parts), b @ a, rtol=0, atol=1e-10)
    assert parts.a.numel() + parts.c.numel() == k * (m + n - k) == PivotedLayout().cost(m, n, k)
    assert parts.order.dtype == torch.int32 and sorted(parts.order.tolist()) == list(range(m))
    assert parts.c.numel() == 0 or parts.c.abs().max() <= 1.05 + 1e-9
    # The pivots are rows of the product itself.
    rows = (b @ a)[(parts.order < k).nonzero()[:, 0]]
    torch.testing.assert_close(parts.a[parts.order[parts.order < k].long()], rows, rtol=0, atol=1e-10)


def test_factors_of_any_dtype_are_pivoted_exactly() -> None:
    a, b = (factor.bfloat16() for factor in _factors(90, 30, 17))
    parts = pivot(a, b)
    assert (parts.a.dtype, parts.c.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(_product(parts), b.double() @ a.double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("like", ["zero", "equal"])
def test_rows_that_say_nothing_are_no_pivots(like: str) -> None:
    a, b = _factors(20, 30, 6)
    b[4:12] = 0 if like == "zero" else b[3]
    parts = pivot(a, b)
    torch.testing.assert_close(_product(parts), b @ a, rtol=0, atol=1e-10)
    assert parts.c.abs().max() <= 1.05 + 1e-9


@pytest.mark.parametrize("zero", [0, 3, 9])
def test_factors_of_less_than_full_rank(zero: int) -> None:
    a, b = _factors(40, 30, 10)
    b[:, zero:] = 0
    torch.testing.assert_close(_product(pivot(a, b)), b @ a, rtol=0, atol=1e-10)


def test_the_rows_it_settles_on_hold_more_volume_than_those_it_began_with() -> None:
    q = torch.linalg.qr(torch.randn(200, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    _, swaps = torch.linalg.lu_factor(q)
    first = list(range(200))
    for i, other in enumerate(swaps.tolist()):
        first[i], first[other - 1] = first[other - 1], first[i]
    rows = dominant_rows(q)
    assert len(set(rows.tolist())) == 40
    assert torch.linalg.det(q[rows]).abs() > torch.linalg.det(q[first[:40]]).abs()
    assert (q @ torch.linalg.inv(q[rows])).abs().max() <= 1.05 + 1e-9


def test_more_columns_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="B of shape 5 × 6 has more columns than rows"):
        pivot(torch.ones(6, 4), torch.ones(5, 6))
