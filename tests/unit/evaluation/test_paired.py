"""Paired tests against SciPy and against their own definition."""

from __future__ import annotations

import random

import pytest
from scipy.stats import binomtest

from ara.evaluation.paired import bootstrap_pairs, compare_pairs, mcnemar


@pytest.mark.parametrize(
    ("won", "lost", "same"), [(0, 0, 5), (1, 0, 0), (3, 9, 40), (9, 3, 40), (50, 50, 7), (80, 30, 1)]
)
def test_mcnemar_is_a_binomial_test_of_the_questions_that_differ(won: int, lost: int, same: int) -> None:
    ours = [1.0] * won + [0.0] * lost + [1.0] * same
    theirs = [0.0] * won + [1.0] * lost + [1.0] * same
    found = mcnemar(ours, theirs)
    expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert found.p == pytest.approx(expected, rel=1e-9)
    assert found.difference == pytest.approx((won - lost) / (won + lost + same))


def test_the_bootstrap_finds_what_is_there_and_nothing_else() -> None:
    generator = random.Random(0)
    noise = [generator.gauss(0, 1) for _ in range(400)]
    shifted = [value + 0.2 + generator.gauss(0, 0.3) for value in noise]
    found = compare_pairs(shifted, noise)
    assert found.test == "paired bootstrap" and found.p <= 2e-4
    assert found.difference == pytest.approx(0.2, abs=0.05)
    back = compare_pairs(noise, shifted)
    assert back.difference == -found.difference and back.p <= 2e-4
    jittered = [value + generator.gauss(0, 0.3) for value in noise]
    assert compare_pairs(jittered, noise).p > 0.01
    assert compare_pairs(noise, noise).p == 1


def test_every_task_counts_the_same() -> None:
    """A long task without a difference does not drown a short one with one."""
    tasks = {"long": ([0.0] * 1000, [0.0] * 1000), "short": ([1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0])}
    found = bootstrap_pairs(tasks)
    assert found.difference == pytest.approx(0.375)
    # The mean of four draws is 0 only if the one question that does not differ is drawn four times.
    assert found.p == pytest.approx(2 / 4**4, abs=5e-3)
    assert bootstrap_pairs(tasks) == found


def test_right_and_wrong_take_the_exact_test() -> None:
    assert compare_pairs([1, 0, 1], [0, 0, 1]).test == "McNemar's exact test"
    assert compare_pairs([1, 0.5, 1], [0, 0, 1]).test == "paired bootstrap"
