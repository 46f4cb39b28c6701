"""Tokens are drawn by the probabilities that temperature and top-p give them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from ara.evaluation.sampling import Sampler, token_probabilities

V = 37


def some_logits(seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal(V)).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.93, 1.0])
def test_probabilities_are_those_of_transformers(temperature: float, top_p: float) -> None:
    logits = torch.from_numpy(some_logits()).double()[None]
    nobody = torch.zeros((1, 0), dtype=torch.int64)
    warped = TopPLogitsWarper(top_p)(nobody, TemperatureLogitsWarper(temperature)(nobody, logits))
    found = token_probabilities(some_logits(), temperature, top_p)
    assert found == pytest.approx(warped.softmax(-1)[0].numpy(), abs=1e-12)
    assert (found > 0).sum() == torch.isfinite(warped).sum()


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits, count = some_logits(), 20_000
    sampler = Sampler(1.3, 0.9, 7)
    drawn = np.bincount([sampler(logits) for _ in range(count)], minlength=V)
    expected = count * token_probabilities(logits, 1.3, 0.9)
    assert not drawn[expected == 0].any()
    kept = expected > 0
    # Chi-squared: its mean is the number of tokens less one, its variance twice that.
    spread = ((drawn - expected)[kept] ** 2 / expected[kept]).sum()
    assert spread < (kept.sum() - 1) + 4 * np.sqrt(2 * (kept.sum() - 1))


def test_a_seed_repeats_itself() -> None:
    texts = []
    for seed in (0, 0, 1):
        sampler = Sampler(1.0, 1.0, seed)
        texts.append([sampler(some_logits(step)) for step in range(40)])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("temperature", "top_p"), [(5e-324, 1.0), (1e-300, 0.5), (1e6, 1e-300), (1.0, 5e-324)])
def test_extreme_settings_take_the_most_likely_token(temperature: float, top_p: float) -> None:
    sampler = Sampler(temperature, top_p, 0)
    assert {sampler(some_logits()) for _ in range(50)} == {int(some_logits().argmax())}


def test_excluded_tokens_are_never_drawn() -> None:
    logits = np.full(V, -np.inf, np.float32)
    logits[[3, 30]] = 1.0
    sampler = Sampler(1e6, 1.0, 0)
    assert {sampler(logits) for _ in range(50)} == {3, 30}


def test_of_equal_tokens_the_first_ones_reach_the_share() -> None:
    assert np.flatnonzero(token_probabilities(np.zeros(8, np.float32), 1.0, 0.5)).tolist() == [0, 1, 2, 3]
