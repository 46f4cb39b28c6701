"""FLOPs of single steps, against the products that their code runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ara.calibration.moments import add_gram, gram_flops
from ara.decomposition.subspace import weighted_factors
from ara.masks.linear import MaskedLinear
from ara.models.weights import LinearSpec
from ara.planning.work import EIGEN_FLOPS, Work, balancing, correction, factorisation, mask_gradient

WIDE, TALL = LinearSpec("wide", 0, "wide", 30, 50), LinearSpec("tall", 0, "tall", 50, 30)


def flops(run: Callable[[], object]) -> int:
    """Return the FLOPs of the matrix products of a function; solvers do not count."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def spd(size: int) -> torch.Tensor:
    """Return a symmetric positive definite matrix."""
    root = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return root @ root.T + torch.eye(size, dtype=torch.float64)


def test_work_is_added_and_multiplied() -> None:
    work = Work(1, 2, 3, 4, 5, 6, 7) + Work(written=1) * 3
    assert work == Work(1, 2, 3, 4, 5, 6, 10)
    assert work.flops == 1 + 2 + 3 + 4 + 5 * EIGEN_FLOPS


@pytest.mark.parametrize("inputs", [False, True])
def test_a_wide_layer_is_factorised_by_products_alone(inputs: bool) -> None:
    weight = torch.randn(30, 50, dtype=torch.float64)
    metric = spd(50) if inputs else None
    work = factorisation(WIDE, inputs, False)
    assert work.double == flops(lambda: weighted_factors(weight, metric))
    assert work.eigen == 30**3


@pytest.mark.parametrize("spec", [WIDE, TALL])
def test_solvers_come_on_top_of_the_products(spec: LinearSpec) -> None:
    weight = torch.randn(spec.m, spec.n, dtype=torch.float64)
    inputs, outputs = spd(spec.n), spd(spec.m)
    products = flops(lambda: weighted_factors(weight, inputs, outputs))
    r = 30
    solvers = r**3 / 3 + r**3
    if spec is TALL:
        solvers += 4 * spec.m * r * r - 4 / 3 * r**3
    assert factorisation(spec, True, True).double == pytest.approx(products + solvers, rel=1e-9)


@pytest.mark.parametrize("n", [30, 256, 600])
def test_second_moments_count_the_blocks_above_the_diagonal(n: int) -> None:
    rows = 7
    total, x = torch.zeros(n, n), torch.randn(rows, n)
    seen = []

    class Slice(torch.Tensor):
        """Notes the sizes of the products that are added to it."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.Tensor.addmm_:
                _, left, right = args
                seen.append(2 * left.shape[0] * left.shape[1] * right.shape[1])
            return super().__torch_function__(func, types, args, kwargs or {})

    add_gram(total.as_subclass(Slice), x)
    assert sum(seen) == rows * gram_flops(n)


def test_gradients_of_masks_add_two_thin_products() -> None:
    tokens, dense = 11, nn.Linear(50, 30, bias=False).requires_grad_(False)
    layer = MaskedLinear(dense, dense.weight, torch.randn(30, 50), torch.randn(30, 30))
    layer.mask = torch.ones(30, requires_grad=True)
    x = torch.randn(tokens, 50, requires_grad=True)

    def run() -> None:
        layer(x).sum().backward()

    assert flops(run) == 2 * 2 * tokens * 30 * 50 + mask_gradient(WIDE, tokens).products


def test_a_correction_is_less_for_a_dense_layer() -> None:
    dense, low = correction(WIDE, None), correction(WIDE, 10)
    assert dense.eigen == 0 < low.eigen
    assert dense.double < low.double
    assert balancing(WIDE, 20).double == 4 * balancing(WIDE, 10).double
