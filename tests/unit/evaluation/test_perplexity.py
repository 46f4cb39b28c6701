"""Perplexity against an independent float64 oracle, and the interleaved run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ara.errors import NumericalError
from ara.evaluation import perplexity
from ara.evaluation.perplexity import interleaved_perplexity, summarise
from ara.evaluation.timing import Spread, spread
from ara.models import likelihood
from ara.models.likelihood import window_nll
from ara.progress import Bar, SilentReporter
from tests.oracles import perplexity as oracle
from tests.tiny import tiny_model


def _logits(batch: int, length: int, vocabulary: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 6 * torch.randn(batch, length, vocabulary, generator=generator)
    return logits, torch.randint(vocabulary, (batch, length), generator=generator)


# -- window_nll -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_nll_matches_the_float64_oracle_on_the_same_logits(dtype: torch.dtype) -> None:
    logits, ids = _logits(3, 37, 1003)
    logits = logits.to(dtype)
    expected = oracle.window_nlls(logits.double().numpy(), ids.numpy())
    nll = window_nll(logits, ids)
    assert nll.shape == (3,) and nll.dtype == torch.float64
    np.testing.assert_allclose(nll.numpy(), expected, rtol=2e-7)


@pytest.mark.parametrize("rows", [0, 1, 5, 36, 37, 1000])
def test_chunks_do_not_change_the_result(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids = _logits(2, 37, 11)
    whole = window_nll(logits, ids)
    monkeypatch.setattr(likelihood, "CPU_CHUNK_BYTES", rows * 4 * 11)
    torch.testing.assert_close(window_nll(logits, ids), whole, rtol=1e-7, atol=0)


def test_float32_copies_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids = _logits(2, 37, 11)
    seen: list[int] = []
    original = likelihood.token_nll

    def watch(chunk: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(chunk.numel() * 4)
        return original(chunk, targets)

    monkeypatch.setattr(likelihood, "token_nll", watch)
    monkeypatch.setattr(likelihood, "CPU_CHUNK_BYTES", 500)
    window_nll(logits.bfloat16(), ids)
    assert len(seen) > 4 and max(seen) <= 500


def test_a_uniform_guess_costs_the_log_of_the_vocabulary() -> None:
    nll = window_nll(torch.zeros(1, 9, 47, dtype=torch.bfloat16), torch.zeros(1, 9, dtype=torch.int64))
    assert nll.item() == pytest.approx(math.log(47), rel=1e-6)


def test_the_last_logits_and_the_first_token_do_not_count() -> None:
    logits, ids = _logits(1, 9, 13)
    expected = window_nll(logits, ids)
    logits[:, -1] = float("nan")
    ids[:, 0] = (ids[:, 0] + 1) % 13
    assert torch.equal(window_nll(logits, ids), expected)


# -- summarise --------------------------------------------------------------------------------------------------


def test_perplexity_is_that_over_all_tokens() -> None:
    logits, ids = _logits(5, 17, 23)
    result = summarise(window_nll(logits, ids).tolist(), 17)
    assert result.perplexity == pytest.approx(oracle.perplexity(logits.double().numpy(), ids.numpy()), rel=1e-5)
    assert (result.windows, result.tokens, result.seq_len) == (5, 80, 17)


def test_standard_error_over_windows() -> None:
    values = (2.0, 3.0, 4.0, 7.0)
    result = summarise(values, 8)
    assert (result.nll, result.window_nlls) == (4.0, values)
    assert result.nll_stderr == pytest.approx(np.std(values, ddof=1) / 2)
    assert summarise([2.0], 8).nll_stderr is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_never_skipped(bad: float) -> None:
    with pytest.raises(NumericalError, match="window 2"):
        summarise([1.0, 2.0, bad, 3.0], 8)


def test_overflow_is_an_error() -> None:
    assert math.isfinite(summarise([709.0], 8).perplexity)
    with pytest.raises(NumericalError, match=r"overflows.*1,000\.0 nats"):
        summarise([1000.0], 8)


# -- interleaved_perplexity -------------------------------------------------------------------------------------


class _Recorder(torch.nn.Module):
    """A language model that remembers when it ran; its logits are those of a lookup table."""

    def __init__(self, name: str, log: list[str], vocabulary: int = 13, nan_in_call: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(len(name))
        self.table = torch.nn.Parameter(torch.randn(vocabulary, vocabulary, generator=generator))
        self.name, self.log, self.nan_in_call, self.calls = name, log, nan_in_call, 0

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache and not self.training and torch.is_inference_mode_enabled()
        self.log.append(self.name)
        self.calls += 1
        logits = self.table[input_ids]
        return SimpleNamespace(logits=logits * float("nan") if self.calls == self.nan_in_call else logits)


def _windows(count: int, length: int = 7, vocabulary: int = 13) -> torch.Tensor:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(1))


def test_models_take_turns_in_rotating_order() -> None:
    log: list[str] = []
    models = {name: _Recorder(name, log) for name in ("a", "bb", "ccc")}
    interleaved_perplexity(models, _windows(4))
    assert log == ["a", "bb", "ccc", "bb", "ccc", "a", "ccc", "a", "bb", "a", "bb", "ccc"]


def test_the_reference_takes_turns_too() -> None:
    log: list[str] = []
    models = {name: _Recorder(name, log) for name in ("dense", "a", "bb")}
    runs = interleaved_perplexity(models, _windows(8), reference="dense")
    orders = [tuple(log[i : i + 3]) for i in range(0, 24, 3)]
    places = {name: [order.index(name) for order in orders] for name in models}
    assert places["dense"] == [0, 1] * 4
    assert sorted(places["a"]) == sorted(places["bb"]) == [0, 0, 1, 1, 2, 2, 2, 2]
    for name in ("a", "bb"):
        alone = interleaved_perplexity({name: models[name], "dense": models["dense"]}, _windows(8), reference="dense")
        assert (alone[name].result, alone[name].divergence) == (runs[name].result, runs[name].divergence)
    assert runs["a"].divergence != runs["bb"].divergence and runs["dense"].divergence is None


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 9])
def test_each_model_gets_its_own_result_whatever_the_batch(batch_size: int) -> None:
    models = {name: _Recorder(name, []) for name in ("a", "bb")}
    windows = _windows(5)
    runs = interleaved_perplexity(models, windows, batch_size=batch_size)
    assert list(runs) == ["a", "bb"]
    for name, model in models.items():
        logits = model.table.detach()[windows].double().numpy()
        np.testing.assert_allclose(
            runs[name].result.window_nlls, oracle.window_nlls(logits, windows.numpy()), rtol=1e-5
        )
        speed = runs[name].tokens_per_second
        assert 0 < speed.low <= speed.median <= speed.high


def test_a_real_model_matches_the_oracle_and_stays_in_its_mode() -> None:
    model = tiny_model("llama").train()
    windows = _windows(3, length=19, vocabulary=260)
    run = interleaved_perplexity({"dense": model}, windows, batch_size=2)["dense"]
    assert model.training
    with torch.inference_mode():
        logits = model.eval()(input_ids=windows).logits.double().numpy()
    assert run.result.perplexity == pytest.approx(oracle.perplexity(logits, windows.numpy()), rel=1e-5)


def test_nan_names_model_and_window() -> None:
    models = {"dense": _Recorder("dense", []), "uniform": _Recorder("uniform", [], nan_in_call=3)}
    with pytest.raises(NumericalError, match=r"model 'uniform' .*nan on window 4"):
        interleaved_perplexity(models, _windows(9), batch_size=2)


def test_first_batch_is_left_out_of_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([10.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(
        perplexity, "_read_batch", lambda heads, *_: {name: ([0.0], [], next(seconds)) for name in heads}
    )
    speed = interleaved_perplexity({"a": _Recorder("a", [])}, _windows(4, length=8))["a"].tokens_per_second
    assert speed.median == 4.0  # 8 tokens in 1, 2 and 4 seconds
    assert (speed.low, speed.high) == pytest.approx((2.4, 7.2))


def test_spread_of_one_and_of_many() -> None:
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0)
    values = [5.0, 1.0, 4.0, 2.0, 8.0, 9.0]
    many = spread(values)
    assert (many.median, many.low, many.high) == pytest.approx(tuple(np.percentile(values, [50, 10, 90])))


def test_progress_ends_at_its_total() -> None:
    done: list[float] = []

    class _Counter(SilentReporter):
        @contextmanager
        def bar(self, label: str, total: float) -> Iterator[Bar]:
            amounts: list[float] = []

            class _Bar:
                def advance(self, amount: float = 1) -> None:
                    amounts.append(amount)

            yield _Bar()
            done.extend([sum(amounts), total])

    interleaved_perplexity(
        {"a": _Recorder("a", []), "b": _Recorder("b", [])}, _windows(5), batch_size=2, report=_Counter()
    )
    assert done == [10, 10]
