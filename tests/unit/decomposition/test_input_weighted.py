"""The three input-weighted decompositions against textbook routes in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from ara.calibration.moments import InputStats
from ara.decomposition.asvd import ActivationScaled, ActivationScaledOptions
from ara.decomposition.base import Factors, MethodOptions
from ara.decomposition.plain import Plain
from ara.decomposition.subspace import weighted_factors
from ara.decomposition.whitened import Whitened
from ara.errors import NumericalError
from tests.oracles import decomposition as oracle

# (m, n): taller than wide, wider than tall, square, and the extremes.
SHAPES = [(45, 27), (26, 43), (33, 33), (1, 19), (23, 1), (77, 6)]


def _problem(m: int, n: int, tokens: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a weight (m, n) and correlated inputs (t, n) of very different sizes, exact in float32."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((m, n)).astype(np.float32).astype(np.float64)
    mixing = random.standard_normal((n, n)) * np.geomspace(0.1, 5, n)
    inputs = (random.standard_normal((tokens, n)) @ mixing).astype(np.float32).astype(np.float64)
    return weight, inputs


def _stats(inputs: NDArray[np.float64]) -> InputStats:
    x = torch.from_numpy(inputs)
    return InputStats(x.T @ x / len(x), x.abs().mean(0), len(x))


def _cut(factors: Factors, rank: int) -> NDArray[np.float64]:
    return (factors.b[:, :rank] @ factors.a[:rank]).numpy()


def _ranks(m: int, n: int) -> list[int]:
    r = min(m, n)
    return sorted({1, max(r // 3, 1), max(r // 2, 1), max(r - 1, 1), r})


# -- whitened ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_whitened_equals_the_cholesky_route(m: int, n: int) -> None:
    weight, inputs = _problem(m, n, tokens=3 * n + 5)
    factors = Whitened().decompose(torch.from_numpy(weight), _stats(inputs))
    metric = inputs.T @ inputs / len(inputs)
    for rank in _ranks(m, n):
        expected = oracle.whitened_by_cholesky(weight, metric, rank)
        np.testing.assert_allclose(_cut(factors, rank), expected, rtol=0, atol=1e-8 * np.abs(weight).max())


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("tokens_per_width", [0.4, 1.0, 3.0])
def test_the_output_error_of_rank_k_is_the_rest_of_the_spectrum(m: int, n: int, tokens_per_width: float) -> None:
    weight, inputs = _problem(m, n, tokens=int(tokens_per_width * n) + 1)
    factors = Whitened().decompose(torch.from_numpy(weight), _stats(inputs))
    total = oracle.output_error(weight, inputs)
    for rank in [0, *_ranks(m, n)]:
        error = oracle.output_error(weight - _cut(factors, rank), inputs)
        assert error == pytest.approx(float(factors.spectrum[rank:].sum()), rel=1e-9, abs=1e-12 * total)


@pytest.mark.parametrize(("m", "n", "tokens"), [(45, 27, 11), (26, 43, 17), (26, 43, 30), (33, 33, 1)])
def test_fewer_tokens_than_inputs_are_enough_and_still_optimal(m: int, n: int, tokens: int) -> None:
    """G is singular: the Cholesky route has no answer here, the pseudo-inverse has, and none is better."""
    weight, inputs = _problem(m, n, tokens)
    metric = inputs.T @ inputs / tokens
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(metric - 1e-9 * np.trace(metric) * np.eye(n))
    factors = Whitened().decompose(torch.from_numpy(weight), _stats(inputs))
    assert all(torch.isfinite(t).all() for t in (factors.a, factors.b, factors.spectrum))
    total = oracle.output_error(weight, inputs)
    for rank in _ranks(m, n):
        ours = oracle.output_error(weight - _cut(factors, rank), inputs)
        best = oracle.output_error(weight - oracle.whitened_by_root(weight, metric, rank), inputs)
        assert ours == pytest.approx(best, rel=1e-7, abs=1e-10 * total)
    # Unlike the pseudo-inverse, it does not forget what the text did not show.
    np.testing.assert_allclose(_cut(factors, min(m, n)), weight, atol=1e-10)


def test_the_least_error_beats_the_other_methods_and_random_changes() -> None:
    weight, inputs = _problem(26, 43, 200)
    stats = _stats(inputs)
    whitened = oracle.output_error(weight - _cut(Whitened().decompose(torch.from_numpy(weight), stats), 9), inputs)
    for method in (Plain(), ActivationScaled()):
        other = _cut(method.decompose(torch.from_numpy(weight), stats), 9)
        assert whitened < 0.99 * oracle.output_error(weight - other, inputs)


def test_a_zero_metric_and_a_zero_weight_stay_finite_and_exact() -> None:
    weight, inputs = _problem(20, 13, 30)
    for w, x in ((weight, 0 * inputs), (0 * weight, inputs)):
        factors = Whitened().decompose(torch.from_numpy(w), _stats(x))
        assert torch.equal(factors.spectrum, torch.zeros(13, dtype=torch.float64))
        np.testing.assert_allclose(_cut(factors, 13), w, atol=1e-12)


def test_a_weight_of_low_rank_is_exact_at_that_rank() -> None:
    random = np.random.default_rng(3)
    weight = random.standard_normal((41, 5)) @ random.standard_normal((5, 30))
    _, inputs = _problem(41, 30, 100)
    factors = Whitened().decompose(torch.from_numpy(weight), _stats(inputs))
    np.testing.assert_allclose(_cut(factors, 5), weight, atol=1e-9)
    assert np.abs(_cut(factors, 4) - weight).max() > 1e-3


# -- plain ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_plain_is_the_truncated_svd(m: int, n: int) -> None:
    weight, _ = _problem(m, n, 2)
    factors = Plain().decompose(torch.from_numpy(weight), None)
    for rank in _ranks(m, n):
        np.testing.assert_allclose(_cut(factors, rank), oracle.truncated_svd(weight, rank), atol=1e-9)
    np.testing.assert_allclose(factors.spectrum.numpy(), np.linalg.svd(weight, compute_uv=False) ** 2, rtol=1e-9)


def test_plain_does_not_look_at_the_text() -> None:
    weight, inputs = _problem(20, 13, 30)
    without = Plain().decompose(torch.from_numpy(weight), None)
    with_text = Plain().decompose(torch.from_numpy(weight), _stats(inputs))
    assert torch.equal(without.a, with_text.a) and torch.equal(without.b, with_text.b)


# -- asvd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.7])
def test_asvd_equals_explicit_scaling_of_the_columns(m: int, n: int, alpha: float) -> None:
    weight, inputs = _problem(m, n, 50)
    factors = ActivationScaled(ActivationScaledOptions(alpha=alpha)).decompose(torch.from_numpy(weight), _stats(inputs))
    scale = np.abs(inputs).mean(0) ** alpha
    for rank in _ranks(m, n):
        cut = _cut(factors, rank)
        np.testing.assert_allclose(cut, oracle.scaled_by_columns(weight, scale, rank), atol=1e-8)
        error = np.square((weight - cut) * scale).sum()
        assert error == pytest.approx(float(factors.spectrum[rank:].sum()), rel=1e-9, abs=1e-9)


def test_asvd_scales_by_the_square_root_unless_told() -> None:
    weight, inputs = _problem(26, 43, 50)
    ours = _cut(ActivationScaled().decompose(torch.from_numpy(weight), _stats(inputs)), 8)
    np.testing.assert_allclose(ours, oracle.scaled_by_columns(weight, np.abs(inputs).mean(0) ** 0.5, 8), atol=1e-9)


def test_asvd_with_alpha_0_is_plain() -> None:
    weight, inputs = _problem(26, 43, 50)
    inputs[:, 7] = 0  # a dead input: 0 to the power of 0 is 1
    asvd = ActivationScaled(ActivationScaledOptions(alpha=0)).decompose(torch.from_numpy(weight), _stats(inputs))
    np.testing.assert_allclose(_cut(asvd, 11), oracle.truncated_svd(weight, 11), atol=1e-9)


def test_asvd_lives_with_inputs_that_are_always_zero() -> None:
    weight, inputs = _problem(26, 43, 50)
    inputs[:, [3, 20]] = 0
    factors = ActivationScaled().decompose(torch.from_numpy(weight), _stats(inputs))
    np.testing.assert_allclose(_cut(factors, 26), weight, atol=1e-10)


# -- all --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("method", [Whitened, Plain, ActivationScaled])
def test_b_has_orthonormal_columns_and_full_rank_is_exact(m: int, n: int, method: type) -> None:
    weight, inputs = _problem(m, n, 3 * n + 5)
    factors = method().decompose(torch.from_numpy(weight), _stats(inputs))
    r = min(m, n)
    assert factors.a.shape == (r, n) and factors.b.shape == (m, r) and factors.spectrum.shape == (r,)
    np.testing.assert_allclose(factors.b.numpy().T @ factors.b.numpy(), np.eye(r), atol=1e-12)
    np.testing.assert_allclose(_cut(factors, r), weight, atol=1e-11)


@pytest.mark.parametrize("method", [Whitened, Plain, ActivationScaled])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_weight_is_refused_with_the_number_of_bad_values(method: type, value: float) -> None:
    weight, inputs = _problem(20, 13, 30)
    broken = torch.from_numpy(weight)
    broken[3, 5] = broken[19, 12] = value
    with pytest.raises(NumericalError, match="holds 2 values that are NaN or infinite") as caught:
        method().decompose(broken, _stats(inputs))
    assert caught.value.hint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_weights_are_factorised_in_float64(dtype: torch.dtype) -> None:
    weight, inputs = _problem(45, 27, 90)
    stored = torch.from_numpy(weight).to(dtype)
    factors = Whitened().decompose(stored, _stats(inputs))
    assert factors.a.dtype == factors.b.dtype == factors.spectrum.dtype == torch.float64
    metric = inputs.T @ inputs / len(inputs)
    expected = oracle.whitened_by_cholesky(stored.double().numpy(), metric, 10)
    np.testing.assert_allclose(_cut(factors, 10), expected, atol=1e-8)


def test_a_diagonal_metric_may_be_given_as_a_vector() -> None:
    weight, _ = _problem(26, 43, 2)
    diagonal = torch.from_numpy(np.random.default_rng(5).uniform(0.1, 4, 43))
    vector = weighted_factors(torch.from_numpy(weight), diagonal)
    matrix = weighted_factors(torch.from_numpy(weight), torch.diag(diagonal))
    np.testing.assert_allclose(_cut(vector, 9), _cut(matrix, 9), atol=1e-10)


@pytest.mark.parametrize(
    ("options", "values", "field"),
    [
        (MethodOptions, {"alpha": 0.5}, "alpha"),
        (ActivationScaledOptions, {"alhpa": 0.5}, "alhpa"),
        (ActivationScaledOptions, {"alpha": -0.1}, "alpha"),
        (ActivationScaledOptions, {"alpha": 2.1}, "alpha"),
        (ActivationScaledOptions, {"alpha": float("nan")}, "alpha"),
        (ActivationScaledOptions, {"alpha": "large"}, "alpha"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options: type, values: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        options(**values)
    assert [error["loc"] for error in caught.value.errors()] == [(field,)]
