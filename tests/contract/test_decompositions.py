"""What every registered decomposition must do; a new file is tested by being registered."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ara.calibration.gradients import GradientStats
from ara.calibration.moments import InputStats
from ara.decomposition import DECOMPOSITIONS
from ara.decomposition.base import Decomposition, Factors, MethodOptions
from ara.errors import NumericalError, UsageError

NAMES = DECOMPOSITIONS.names()
SHAPES = [(45, 27), (26, 43), (33, 33), (1, 19), (23, 1)]


def _problem(m: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, InputStats]:
    generator = torch.Generator().manual_seed(m * 100 + n)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float32).to(dtype)
    x = torch.randn(4 * n, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return weight, InputStats(x.T @ x / len(x), x.abs().mean(0), len(x))


def _factors(name: str, weight: torch.Tensor, stats: InputStats) -> Factors:
    method: Decomposition = DECOMPOSITIONS.load(name)()
    gradients = _gradients(weight.shape[0]) if method.needs_gradients else None
    return method.decompose(weight, stats if method.needs_text else None, gradients)


def _gradients(m: int) -> GradientStats:
    generator = torch.Generator().manual_seed(m)
    g = torch.randn(4 * m, m, generator=generator) @ torch.randn(m, m, generator=generator)
    return GradientStats(g.T @ g / len(g), len(g))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_shapes_dtypes_and_order(name: str, m: int, n: int) -> None:
    weight, stats = _problem(m, n)
    factors = _factors(name, weight, stats)
    r = min(m, n)
    assert factors.a.shape == (r, n)
    assert factors.b.shape == (m, r)
    assert factors.spectrum.shape == (r,)
    assert factors.a.dtype == factors.b.dtype == factors.spectrum.dtype == torch.float64
    assert (factors.spectrum >= 0).all() and factors.spectrum[0] > 0
    assert (factors.spectrum.diff() <= 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_rank_reproduces_the_weight(name: str, m: int, n: int, dtype: torch.dtype) -> None:
    weight, stats = _problem(m, n, dtype)
    factors = _factors(name, weight, stats)
    torch.testing.assert_close(factors.b @ factors.a, weight.double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_every_further_component_helps_on_weights_of_low_rank(name: str) -> None:
    """A weight of rank 5 is exact after 5 components, and the spectrum says so."""
    weight, stats = _problem(41, 30)
    weight = weight[:, :5] @ weight[:5] / 5
    factors = _factors(name, weight, stats)
    errors = [float((factors.b[:, :k] @ factors.a[:k] - weight).norm() / weight.norm()) for k in range(8)]
    assert errors[4] > 0.01 and errors[5] < 1e-5
    assert float(factors.spectrum[5:].sum() / factors.spectrum.sum()) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_same_input_same_bytes(name: str) -> None:
    weight, stats = _problem(45, 27)
    torch.manual_seed(1)
    first = _factors(name, weight, stats)
    torch.manual_seed(2)
    second = _factors(name, weight.clone(), stats)
    for attribute in ("a", "b", "spectrum"):
        assert getattr(first, attribute).numpy().tobytes() == getattr(second, attribute).numpy().tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_what_goes_in_is_not_changed(name: str) -> None:
    weight, stats = _problem(26, 43)
    copies = weight.clone(), stats.second_moment.clone(), stats.abs_mean.clone()
    _factors(name, weight, stats)
    assert torch.equal(weight, copies[0])
    assert torch.equal(stats.second_moment, copies[1]) and torch.equal(stats.abs_mean, copies[2])


@pytest.mark.parametrize("name", NAMES)
def test_a_transposed_view_gives_the_same_approximation(name: str) -> None:
    """GPT-2's Conv1D weights arrive as transposed views."""
    weight, stats = _problem(26, 43)
    straight = _factors(name, weight, stats)
    view = _factors(name, weight.T.contiguous().T, stats)
    torch.testing.assert_close(view.b[:, :9] @ view.a[:9], straight.b[:, :9] @ straight.a[:9], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_refused(name: str) -> None:
    weight, stats = _problem(26, 43)
    weight[2, 3] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        _factors(name, weight, stats)


@pytest.mark.parametrize("name", NAMES)
def test_options_are_documented_and_unknown_ones_refused(name: str) -> None:
    options = DECOMPOSITIONS.load(name).Options
    assert issubclass(options, MethodOptions)
    options()  # every option has a default
    for field, info in options.model_fields.items():
        assert info.description, field
    with pytest.raises(ValueError, match="no_such_option"):
        options(no_such_option=1)


@pytest.mark.parametrize("name", NAMES)
def test_the_entry_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    entry = DECOMPOSITIONS.entry(name)
    assert entry.name == name
    assert entry.title and entry.paper
    assert len(entry.title) < 80 and not entry.title.endswith(".")
    assert issubclass(entry.load(), Decomposition)
    assert entry.load().__doc__


@pytest.mark.parametrize(("typed", "meant"), [("whitend", "whitened"), ("PLAIN", "plain"), ("svd", "asvd")])
def test_an_unknown_name_answers_with_near_matches_and_the_list(typed: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        DECOMPOSITIONS.load(typed)
    message = str(caught.value)
    assert f"unknown decomposition {typed!r}" in message
    assert f"did you mean {meant}" in message
    assert f"known are {', '.join(NAMES)}" in message


def test_listing_names_does_not_import_torch() -> None:
    script = (
        "import sys\n"
        "from ara.allocation import ALLOCATORS\n"
        "from ara.decomposition import DECOMPOSITIONS\n"
        "print([entry.title for table in (ALLOCATORS, DECOMPOSITIONS) for entry in table])\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    titles, heavy = done.stdout.splitlines()
    assert DECOMPOSITIONS.entry(NAMES[0]).title in titles
    assert heavy == "[]"
