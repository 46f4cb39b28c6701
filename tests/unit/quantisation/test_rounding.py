"""Grids and calibrated rounding on made-up weights and moments."""

from __future__ import annotations

import pytest
import torch

from ara.decomposition.subspace import weighted_factors
from ara.errors import NumericalError
from ara.layouts.grid import Bits, Grid
from ara.quantisation.calibrated import mixed_basis, output_error, round_calibrated, round_product
from ara.quantisation.nearest import round_to_nearest

GRIDS = [Grid(bits, block, zero_points) for bits in (4, 8) for block in (16, 32, 128) for zero_points in (False, True)]


def weight(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) / n**0.5


def moment(n: int, seed: int = 1) -> torch.Tensor:
    """Return the second moment of inputs with correlations and a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator) * torch.logspace(0, -2, n)
    scale = torch.ones(n)
    scale[:: max(1, n // 5)] = 10
    x = torch.randn(8 * n, n, generator=generator) @ mix.T * scale
    return x.T @ x / len(x)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weights_on_the_grid_stay_as_they_are(grid: Grid) -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, grid.last + 1, (6, 256), generator=generator).float()
    # Every block has both ends of its range.
    steps[:, :: grid.block], steps[:, 1 :: grid.block] = 0, grid.last
    zero = 3 if grid.zero_points else grid.middle
    exact = (steps - zero) * 0.125
    for found in (round_to_nearest(exact, grid), round_calibrated(exact, moment(256), grid)):
        assert torch.equal(found.weight(), exact)
        assert (found.zeros is not None) == grid.zero_points


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("n", [1, 15, 100])
def test_an_error_is_at_most_a_step_and_sizes_are_counted(grid: Grid, n: int) -> None:
    w = weight(7, n)
    found = round_to_nearest(w, grid)
    scales = found.scales.float().repeat_interleave(grid.block, 1)[:, :n]
    # Clipped weights may be further away; the best share of clipping never costs more in all.
    whole = Grid(grid.bits, grid.block, grid.zero_points, torch.float32)
    assert float((found.weight() - w).square().sum()) <= float(scales.abs().square().sum())
    assert found.steps.dtype == torch.uint8 and int(found.steps.max()) <= grid.last
    bits = 8 * (grid.bytes(7, n) / 7)
    blocks = -(-n // grid.block)
    assert bits == blocks * (grid.block * grid.bits + 16) + (8 * -(-blocks * grid.bits // 8) if grid.zero_points else 0)
    assert float((round_to_nearest(w, whole).weight() - w).square().sum()) < float(w.square().sum())


def test_the_range_has_one_more_step_for_the_largest_weight_of_either_sign() -> None:
    grid = Grid(4, 16)
    for value in (8.0, -8.0):
        w = torch.zeros(1, 16)
        w[0, 3], w[0, 4] = value, -0.875 * value
        assert torch.equal(round_to_nearest(w, grid).weight(), w)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("n", [64, 200, 300])
def test_calibration_lowers_the_output_error(bits: Bits, zero_points: bool, n: int) -> None:
    w, g, grid = weight(96, n), moment(n), Grid(bits, 32, zero_points)
    nearest, aware = (
        output_error(w, one.weight(), g) for one in (round_to_nearest(w, grid), round_calibrated(w, g, grid))
    )
    assert aware < 0.5 * nearest


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    w, grid = weight(20, 96), Grid(4, 32)
    found, plain = round_calibrated(w, torch.eye(96), grid), round_to_nearest(w, grid)
    assert torch.equal(found.steps, plain.steps) and torch.equal(found.scales, plain.scales)


@pytest.mark.parametrize("bits", [4, 8])
def test_factors_are_rounded_one_after_the_other(bits: Bits) -> None:
    g, grid = moment(160), Grid(bits, 32)
    a, b = weight(40, 160), weight(96, 40, 5)
    product = b @ a
    first, second = round_product(a, b, g, grid)
    together = output_error(product, second.weight() @ first.weight(), g)
    apart = round_calibrated(b, a @ g @ a.T, grid).weight() @ round_calibrated(a, g, grid).weight()
    plain = round_to_nearest(b, grid).weight() @ round_to_nearest(a, grid).weight()
    assert together < output_error(product, apart, g) < 0.7 * output_error(product, plain, g)


@pytest.mark.parametrize("bits", [4, 8])
def test_another_basis_of_the_components_loses_less(bits: Bits) -> None:
    """Of a decomposition, whose components do not depend on each other: their basis is the worst one."""
    g, w, grid = moment(160).double(), weight(96, 160).double(), Grid(bits, 32)
    factors = weighted_factors(w, g)
    a, b = factors.a[:64], factors.b[:, :64]
    product = b @ a
    mixed = mixed_basis(a, b, g)
    torch.testing.assert_close(mixed[1] @ mixed[0], product)
    assert all(torch.equal(one, other) for one, other in zip(mixed, mixed_basis(a, b, g), strict=True))
    # Each row of A gives outputs as large as a column of B is, on average over the rotation.
    assert float((mixed[0] @ g @ mixed[0].T).trace()) == pytest.approx(float(mixed[1].square().sum()))

    def lost(a: torch.Tensor, b: torch.Tensor) -> float:
        first, second = round_product(a, b, g, grid)
        return output_error(product, second.weight().double() @ first.weight().double(), g)

    assert lost(*mixed) < 0.6 * lost(a, b)


def test_components_that_do_nothing_stay_finite() -> None:
    a, b = weight(8, 16), weight(12, 8)
    a[2], b[:, 5] = 0, 0
    first, second = mixed_basis(a, b, moment(16))
    torch.testing.assert_close((second @ first).float(), b @ a)


def test_inputs_of_which_little_is_known_keep_their_weights() -> None:
    # A massive channel, as language models have, and fewer tokens than inputs.
    x = torch.randn(40, 160, generator=torch.Generator().manual_seed(4))
    x[:, 3] *= 1e3
    a, b = weight(40, 160), weight(96, 40, 5)
    first, second = round_product(a, b, x.T @ x / len(x), Grid(8, 32))
    change = second.weight() @ first.weight() - b @ a
    assert float(change.norm()) < 0.02 * float((b @ a).norm())


def test_a_dead_input_and_a_moment_of_low_rank_are_no_obstacle() -> None:
    g, w, grid = moment(64), weight(8, 64), Grid(4, 32)
    g[5], g[:, 5] = 0, 0
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(2))
    for one in (g, x.T @ x, torch.zeros(64, 64)):
        assert round_calibrated(w, one, grid).weight().isfinite().all()


def test_a_block_of_tiny_weights_becomes_zero() -> None:
    w = weight(4, 64)
    w[1, :32] *= 1e-9
    found = round_to_nearest(w, Grid(8, 32)).weight()
    assert not found[1, :32].any() and float((found - w).norm()) < 0.01 * float(w.norm())


def test_nan_and_scales_out_of_range_are_said() -> None:
    w, grid = weight(4, 32), Grid(4, 32)
    w[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="NaN"):
        round_calibrated(w, torch.eye(32), grid)
    for factor in (1e9, 1e-9):
        with pytest.raises(NumericalError, match="beyond the range of float16"):
            round_to_nearest(weight(4, 32) * factor, grid)
        round_to_nearest(weight(4, 32) * factor, Grid(4, 32, scale_dtype=torch.float32))
