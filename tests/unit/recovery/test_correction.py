"""The correction of one layer against least squares on the data itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ara.decomposition.base import Factors
from ara.decomposition.subspace import weighted_factors
from ara.recovery.correction import Correction, correct
from ara.recovery.paired_moments import PairedAccumulator, PairedMoments

M, N, TOKENS = 11, 7, 4000


def inputs(n: int, shift: float = 0.4, seed: int = 0, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x and x' (t, n) float64: x' is a mixture of x and something else, with other means."""
    weights, text = (torch.Generator().manual_seed(one) for one in (1, 10 + seed))
    mix = torch.eye(n).double() + shift * torch.randn(n, n, generator=weights).double()
    x = torch.randn(tokens, n, generator=text).double() * torch.linspace(3, 0.5, n) + torch.linspace(-1, 1, n)
    return x, x @ mix.T + 0.1 * torch.randn(tokens, n, generator=text).double()


def moments(x: torch.Tensor, other: torch.Tensor, dense: bool, centred: bool = False) -> PairedMoments:
    sums = PairedAccumulator(x.shape[1], torch.device("cpu"), dense, centred=centred)
    for ours, theirs in zip(x.float().split(100), other.float().split(100), strict=True):
        sums.add(ours[None], theirs[None])
    return sums.result()


def layer(m: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Factors]:
    """Return W (m, n), the metrics G and H, and two-sided factors of W."""
    generator = torch.Generator().manual_seed(m)
    weight = torch.randn(m, n, generator=generator).double()
    x, _ = inputs(n)
    root = torch.randn(m, m, generator=generator).double()
    outputs = root @ root.T + torch.eye(m)
    return weight, x.T @ x / len(x), outputs, weighted_factors(weight, x.T @ x / len(x), outputs)


def output_error(
    weight: torch.Tensor, new: torch.Tensor, outputs: torch.Tensor, x: torch.Tensor, other: torch.Tensor
) -> float:
    """Return E‖H^{1/2} (W x − W' x')‖² / E‖H^{1/2} W x‖², from the data itself."""
    dense = x @ weight.T
    error = dense - other @ new.T
    return float(((error @ outputs) * error).sum() / ((dense @ outputs) * dense).sum())


@pytest.mark.parametrize(("m", "n"), [(M, N), (N, M), (9, 9)])
def test_errors_are_those_of_the_layer_in_its_output_metric(m: int, n: int) -> None:
    weight, _, outputs, factors = layer(m, n)
    train, held = inputs(n), inputs(n, seed=1)
    k = 4
    found = correct(
        factors.a, factors.b, (factors.a[:k], factors.b[:, :k]), moments(*train, False), moments(*held, True)
    )
    assert found.a is not None and found.b is not None and found.a.shape == (k, n) and found.b.shape == (m, k)
    cut = factors.b[:, :k] @ factors.a[:k]
    assert found.before == pytest.approx(output_error(weight, cut, outputs, *held), rel=1e-4)
    assert found.after == pytest.approx(output_error(weight, found.b @ found.a, outputs, *held), rel=1e-4)
    assert found.after < found.before


@pytest.mark.parametrize(("m", "n"), [(M, N), (N, M)])
def test_much_text_gives_nearly_the_least_squares_weight(m: int, n: int) -> None:
    weight, _, _, factors = layer(m, n)
    x, other = inputs(n)
    found = correct(factors.a, factors.b, weight, moments(x, other, False), moments(*inputs(n, seed=1), True))
    assert found.beta == 1 and found.damping == 1e-3 and found.shift is not None and found.a is None
    best = torch.linalg.lstsq(other, x @ weight.T).solution.T
    residual = [float(((x @ weight.T - other @ new.T) ** 2).sum()) for new in (weight, weight @ found.shift, best)]
    assert residual[2] <= residual[1] < residual[2] + 0.01 * (residual[0] - residual[2])


def test_a_low_rank_layer_gets_the_best_factors_of_the_corrected_weight() -> None:
    weight, _, outputs, factors = layer(M, N)
    train = moments(*inputs(N), False)
    found = correct(factors.a, factors.b, (factors.a[:3], factors.b[:, :3]), train, moments(*inputs(N, seed=1), True))
    assert found.beta is not None and found.damping is not None and found.a is not None and found.b is not None
    metric = train.compressed
    damped = metric + found.damping * metric.diagonal().mean() * torch.eye(N)
    shift = torch.eye(N) + found.beta * (train.cross - metric) @ torch.linalg.inv(damped)
    expected = weighted_factors(weight @ shift, metric, outputs)
    torch.testing.assert_close(found.b @ found.a, expected.b[:, :3] @ expected.a[:3], rtol=1e-6, atol=1e-8)


def test_a_share_limits_beta() -> None:
    weight, _, _, factors = layer(M, N)
    train, held_out = moments(*inputs(N), False), moments(*inputs(N, seed=1), True)
    half, full = (correct(factors.a, factors.b, weight, train, held_out, share=share) for share in (0.5, 1.0))
    assert half.beta == 0.5 and full.beta == 1
    # The error is quadratic in β.
    assert half.after - full.after == pytest.approx((half.before - full.after) / 4, rel=0.05)


def test_noise_is_not_believed() -> None:
    weight, _, _, factors = layer(M, N)
    # Eight tokens for seven inputs, and x' = x + noise: any shift measured on them is chance.
    x, _ = inputs(N, tokens=100)
    noise = torch.randn(100, N, generator=torch.Generator().manual_seed(3)).double()
    train = moments(x[:8], (x + noise)[:8] - 2 * noise[:8], False)
    held_x, _ = inputs(N, seed=1)
    found = correct(factors.a, factors.b, weight, train, moments(held_x, held_x, True))
    assert found == Correction(None, None, found.before, found.before)
    assert found.before == pytest.approx(0, abs=1e-6)


def test_a_bias_takes_up_the_difference_of_the_means() -> None:
    weight, _, outputs, factors = layer(M, N)
    (x, other), held = inputs(N, shift=0.1), inputs(N, shift=0.1, seed=1)
    other, held = other + 5, (held[0], held[1] + 5)
    current = (factors.a[:5], factors.b[:, :5])
    train, test = moments(x, other, False), moments(*held, True)
    without = correct(factors.a, factors.b, current, train, test)
    found = correct(factors.a, factors.b, current, train, test, torch.zeros(M).double())
    assert found.bias is not None and found.a is not None and found.b is not None and found.after < without.after
    dense = held[0] @ weight.T
    error = dense - held[1] @ (found.b @ found.a).T - found.bias
    share = float(((error @ outputs) * error).sum() / ((dense @ outputs) * dense).sum())
    assert found.after == pytest.approx(share, rel=1e-3)
    mean = (x @ weight.T - other @ (found.b @ found.a).T - found.bias).mean(0)
    assert float(mean.norm()) < 1e-4
    # A bias that is already moved counts in the error before.
    moved = correct(factors.a, factors.b, current, train, test, torch.full((M,), 0.5).double())
    assert moved.before != found.before and moved.after == pytest.approx(found.after)


@pytest.mark.parametrize("offset", [300, 3000])
def test_a_large_mean_leaves_the_correction_as_it_is(offset: int) -> None:
    """Covariances of inputs whose mean is many times their deviation: in float32 raw moments do not hold them."""
    factors = layer(M, N)[3]
    train, held = inputs(N, shift=0.1), inputs(N, shift=0.1, seed=1)
    no_bias = torch.zeros(M).double()
    pairs = [(one - one.mean(0), other - one.mean(0)) for one, other in (train, held)]

    def corrected(by: int) -> Correction:
        sums = [
            moments(x + by, other + by, dense, True) for (x, other), dense in zip(pairs, (False, True), strict=True)
        ]
        return correct(factors.a, factors.b, (factors.a[:4], factors.b[:, :4]), *sums, no_bias)

    near, far = corrected(0), corrected(offset)
    assert near.a is not None and far.a is not None and near.b is not None and far.b is not None
    assert (far.beta, far.damping) == (near.beta, near.damping)
    torch.testing.assert_close(far.b @ far.a, near.b @ near.a, rtol=1e-3, atol=1e-4)


def test_centred_sums_are_those_of_the_raw_products() -> None:
    (x, other), drift = inputs(N), inputs(N, seed=2)[0]
    found = []
    for centred in (False, True):
        sums = PairedAccumulator(N, torch.device("cpu"), True, N, centred)
        for parts in zip(x.float().split(1000), other.float().split(1000), drift.float().split(1000), strict=True):
            sums.add(*parts)
        found.append(sums.result())
    plain, restored = ({**vars(one), **vars(one.drift)} for one in found)
    for name, value in plain.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(restored[name], value, rtol=1e-5, atol=1e-5)


def test_a_metric_that_is_not_definite_changes_nothing() -> None:
    weight, _, _, factors = layer(M, N)
    x, _ = inputs(N)
    sums = moments(x, x, True)
    broken = replace(sums, compressed=sums.compressed - 2 * sums.compressed.diagonal().mean() * torch.eye(N))
    found = correct(factors.a, factors.b, weight, broken, sums)
    assert found.beta in (None, 0.0)


def test_sums_know_when_they_are_not_finite() -> None:
    sums = PairedAccumulator(N, torch.device("cpu"), dense=True)
    x = torch.zeros(3, N)
    sums.add(x, x)
    assert sums.is_finite
    sums.add(x, torch.full((3, N), torch.inf))
    assert not sums.is_finite


def drifted(seed: int = 0, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, x' and a drift e (t, N) that is partly a function of x', with a mean of its own."""
    x, other = inputs(N, shift=0.1, seed=seed, tokens=tokens)
    mix = torch.randn(N, N, generator=torch.Generator().manual_seed(5)).double()
    noise = torch.randn(tokens, N, generator=torch.Generator().manual_seed(seed)).double()
    return x, other, other @ mix.T + 0.5 * noise + 2


@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_layer_that_writes_to_the_residual_stream_takes_back_the_drift(low_rank: bool, with_bias: bool) -> None:
    # As many outputs as inputs, so that every output has coordinates.
    weight = torch.randn(N, N, generator=torch.Generator().manual_seed(9)).double()
    x, other, e = drifted()
    held_x, held_other, held_e = drifted(1)
    factors = weighted_factors(weight, x.T @ x / len(x))
    current = (factors.a[:5], factors.b[:, :5]) if low_rank else weight

    def moments_of(x: torch.Tensor, other: torch.Tensor, e: torch.Tensor, dense: bool) -> PairedMoments:
        sums = PairedAccumulator(N, torch.device("cpu"), dense, N)
        sums.add(x, other, e)
        return sums.result()

    zero = torch.zeros(N).double() if with_bias else None
    found = correct(
        factors.a,
        factors.b,
        current,
        moments_of(x, other, e, False),
        moments_of(held_x, held_other, held_e, True),
        zero,
    )
    assert found.gamma == 1
    if low_rank:
        assert found.a is not None and found.b is not None
        new = found.b @ found.a
    else:
        assert found.shift is not None and found.taken_back is not None
        new = weight @ found.shift + found.taken_back
    added = torch.zeros(N).double() if found.bias is None else found.bias
    error = held_x @ weight.T - held_e - held_other @ new.T - added
    energy = float((held_x @ weight.T).square().sum())
    assert found.after == pytest.approx(float(error.square().sum()) / energy, rel=1e-3)
    old = held_x @ weight.T - held_e - held_other @ (factors.b[:, :5] @ factors.a[:5] if low_rank else weight).T
    assert found.before == pytest.approx(float(old.square().sum()) / energy, rel=1e-3)
    assert found.after < 0.5 * found.before
