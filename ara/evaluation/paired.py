"""Do two models differ? Tests on pairs: the same questions, answered by both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Differences with a larger p are called noise.
NOISE = 0.05
# Draws of the bootstrap, and how many are made at once.
_DRAWS = 10_000
_AT_ONCE = 500


@dataclass(frozen=True)
class Difference:
    """How far a model is ahead of another one.

    Attributes:
        difference: mean of the pairs' differences.
        p: two-sided probability of at least this difference if the models were equal.
        test: how that was found.
    """

    difference: float
    p: float
    test: str


def compare_pairs(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Difference:
    """Compare two models on the same questions: McNemar's exact test for right and wrong, else a paired bootstrap.

    Args:
        ours, theirs: (q) values of the questions, in the same order, at least one.
        seed: of the bootstrap.
    """
    if {*ours, *theirs} <= {0, 1}:
        return mcnemar(ours, theirs)
    return bootstrap_pairs({"": (ours, theirs)}, seed)


def mcnemar(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Return McNemar's exact test: the questions that one of both has right fall on either side with probability ½.

    Args:
        ours, theirs: (q) of 0 and 1.
    """
    won = sum(a > b for a, b in zip(ours, theirs, strict=True))
    lost = sum(a < b for a, b in zip(ours, theirs, strict=True))
    differ = won + lost
    tail = sum(math.comb(differ, k) for k in range(min(won, lost) + 1)) / 2**differ
    return Difference((won - lost) / len(ours), min(1.0, 2 * tail), "McNemar's exact test")


def bootstrap_pairs(tasks: Mapping[str, tuple[Sequence[float], Sequence[float]]], seed: int = 0) -> Difference:
    """Compare means over tasks, each task counting the same: questions are drawn with replacement within each task.

    Args:
        tasks: task → values of both models, (q) each, in the same order.
        seed: of the draws.

    Returns:
        ``p`` is at least 1 / draws: what was never drawn may still happen.
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
