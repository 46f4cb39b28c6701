"""The share of repeated 4-grams, against a count by hand."""

from __future__ import annotations

import pytest

from ara.evaluation.repetition import falls_into_repetition, repeated_share


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0.0),
        ([1, 2, 3], 0.0),
        ([1, 2, 3, 4], 0.0),
        ([7] * 4, 0.0),
        ([7] * 5, 1 / 2),
        ([7] * 128, 124 / 125),
        ([1, 2, 3, 4, 5, 1, 2, 3, 4, 6], 1 / 7),
        ([1, 2, 3, 1, 2, 3, 1, 2, 3], 3 / 6),
        (list(range(128)), 0.0),
    ],
)
def test_the_share_of_repeated_4_grams(tokens: list[int], share: float) -> None:
    assert repeated_share(tokens) == pytest.approx(share)
    seen, repeats = set(), 0
    grams = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    for gram in grams:
        repeats += gram in seen
        seen.add(gram)
    assert repeated_share(tokens) == pytest.approx(repeats / len(grams) if grams else 0.0)


def test_other_lengths_of_n_grams() -> None:
    assert repeated_share([1, 1, 2, 1], n=1) == pytest.approx(0.5)
    assert repeated_share([1, 2, 1, 2], n=2) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("start", "falls"), [(0, True), (52, True), (53, False), (115, False)])
def test_a_loop_counts_from_the_middle_on(start: int, falls: bool) -> None:
    """A loop of 10 tokens after ``start`` others, 128 tokens in all: 115 − start of 125 4-grams repeat."""
    tokens = [*range(100, 100 + start), *(i % 10 for i in range(128 - start))]
    assert repeated_share(tokens) == pytest.approx((115 - start) / 125)
    assert falls_into_repetition(tokens) is falls
