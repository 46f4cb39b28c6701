"""Paired tests of whether two models differ on the same questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Differences with a larger p count as noise.
NOISE = 0.05
# Bootstrap samples, and how many are drawn at once.
_DRAWS, _AT_ONCE = 10_000, 500


@dataclass(frozen=True)
class Difference:
    """One model compared with another.

    Attributes:
        difference: mean of the pairwise differences.
        p: two-sided probability of at least this difference if the models were equal.
        test: name of the test.
    """

    difference: float
    p: float
    test: str


def compare_pairs(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Compare two models on the same questions: McNemar's exact test for values 0 and 1, else a paired bootstrap.

    Args:
        ours, theirs: (q) values of at least one question, in the same order.
    """
    if {*ours, *theirs} <= {0, 1}:
        return mcnemar(ours, theirs)
    return bootstrap_pairs({"": (ours, theirs)})


def mcnemar(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Return McNemar's exact test for values (q) of 0 and 1.

    If the models are equal, a question that only one of them answers correctly is either one's with probability ½.
    """
    won = sum(a > b for a, b in zip(ours, theirs, strict=True))
    lost = sum(a < b for a, b in zip(ours, theirs, strict=True))
    differ = won + lost
    tail = sum(math.comb(differ, k) for k in range(min(won, lost) + 1)) / 2**differ
    return Difference((won - lost) / len(ours), min(1.0, 2 * tail), "McNemar's exact test")


def bootstrap_pairs(tasks: Mapping[str, tuple[Sequence[float], Sequence[float]]], seed: int = 0) -> Difference:
    """Compare unweighted means over tasks; questions are drawn with replacement within each task.

    Args:
        tasks: task → values of both models, (q) each, in the same order.
        seed: random seed of the draws.

    Returns:
        The difference; its ``p`` is at least 1 / draws.
    """
    generator = np.random.default_rng(seed)
    drawn = np.zeros(_DRAWS)
    found = 0.0
    for ours, theirs in tasks.values():
        pairs = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
        found += float(pairs.mean()) / len(tasks)
        for start in range(0, _DRAWS, _AT_ONCE):
            picked = generator.integers(0, len(pairs), (_AT_ONCE, len(pairs)))
            drawn[start : start + _AT_ONCE] += pairs[picked].mean(1) / len(tasks)
    p = 2 * min(float((drawn <= 0).mean()), float((drawn >= 0).mean()))
    return Difference(found, min(1.0, max(p, 1 / _DRAWS)), "paired bootstrap")
