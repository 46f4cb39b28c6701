"""KL and agreement against NumPy in float64, and inside the interleaved run."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ara.errors import NumericalError
from ara.evaluation.divergence import DivergenceSum, summarise_divergence
from ara.evaluation.perplexity import interleaved_perplexity
from ara.models import likelihood, scores
from tests.tiny import tiny_model


def _window_divergence(dense: torch.Tensor, logits: torch.Tensor) -> list[tuple[float, float]]:
    """Return KL and agreement of each window, without the last position."""
    sums = [DivergenceSum() for _ in dense]
    for total, ours, theirs in zip(sums, dense, logits, strict=True):
        # In two parts.
        total.add(ours[:2], theirs[:2])
        total.add(ours[2:-1], theirs[2:-1])
    return [total.mean() for total in sums]


def _oracle(p_logits: np.ndarray, q_logits: np.ndarray) -> list[tuple[float, float]]:
    found = []
    for dense, other in zip(p_logits[:, :-1], q_logits[:, :-1], strict=True):
        p = np.exp(dense - dense.max(-1, keepdims=True))
        q = np.exp(other - other.max(-1, keepdims=True))
        p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        kl = (p * np.log(p / q)).sum(-1).mean()
        found.append((float(kl), float((p.argmax(-1) == q.argmax(-1)).mean())))
    return found


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_it_is_the_definition(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = 3 * torch.randn(2, 23, 101, generator=generator)
    other = dense + torch.randn(2, 23, 101, generator=generator)
    monkeypatch.setattr(likelihood, "CPU_CHUNK_BYTES", rows * 4 * 101)
    found = _window_divergence(dense, other)
    np.testing.assert_allclose(found, _oracle(dense.double().numpy(), other.double().numpy()), rtol=1e-5)
    assert [same for _, same in _window_divergence(dense, dense)] == [1, 1]
    assert all(abs(kl) < 1e-9 for kl, _ in _window_divergence(dense, dense))


def test_the_mean_has_its_error() -> None:
    found = summarise_divergence([(0.1, 0.5), (0.3, 1.0)])
    assert found.kl == pytest.approx(0.2) and found.agreement == 0.75
    assert found.kl_stderr == pytest.approx(0.1)
    assert summarise_divergence([(0.1, 0.5)]).kl_stderr is None


@pytest.mark.parametrize("chunk", [scores.CHUNK_BYTES, 7 * 4 * 260])
def test_an_interleaved_run_measures_it_from_the_reference(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "CHUNK_BYTES", chunk)
    dense, other = tiny_model("llama").eval(), tiny_model("llama").eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    windows = torch.randint(4, 260, (5, 40), generator=torch.Generator().manual_seed(2))
    models = {"other": other, "dense": dense}
    runs = interleaved_perplexity(models, windows, batch_size=2, reference="dense")
    assert list(runs) == ["other", "dense"] and runs["dense"].divergence is None
    with torch.inference_mode():
        expected = _oracle(dense(windows).logits.double().numpy(), other(windows).logits.double().numpy())
    found = runs["other"].divergence
    assert found is not None and found.kl > 1e-4
    assert found.kl == pytest.approx(math.fsum(kl for kl, _ in expected) / 5, rel=1e-4)
    assert found.agreement == pytest.approx(math.fsum(same for _, same in expected) / 5)
    plain = interleaved_perplexity(models, windows, batch_size=2)
    assert plain["other"].divergence is None and plain["other"].result == runs["other"].result


def test_an_excluded_token_adds_nothing_and_one_that_only_the_model_excludes_is_an_error() -> None:
    logits = torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(3))
    other = logits + torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(4))
    without = _window_divergence(logits[..., :6], other[..., :6])
    logits[..., 6] = -math.inf
    other[..., 6] = -math.inf
    ((kl, same),) = _window_divergence(logits, other)
    assert (kl, same) == (pytest.approx(without[0][0]), without[0][1])

    class Fixed(torch.nn.Module):
        def __init__(self, logits: torch.Tensor) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(logits)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=self.logits.expand(len(input_ids), -1, -1))

    whole, excluding = Fixed(torch.zeros(1, 5, 7)), torch.zeros(1, 5, 7)
    excluding[..., 6] = -math.inf  # its NLL is finite: no window holds token 6
    models = {"dense": whole, "mine": Fixed(excluding)}
    with pytest.raises(NumericalError, match="model 'mine' gives a KL divergence from dense of inf on window 0"):
        interleaved_perplexity(models, torch.zeros(2, 5, dtype=torch.int64), reference="dense")
