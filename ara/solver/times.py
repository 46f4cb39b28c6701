"""Measured times of layers: what a rank costs on one machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ara.models.weights import LinearSpec


@dataclass(frozen=True)
class ShapeTimes:
    """Times of a layer of one shape.

    Attributes:
        dense: nanoseconds of the dense layer, at least 1.
        ranks: rank → nanoseconds, at least 1; ranks increase, and times do not decrease. Empty if no rank was measured.
    """

    dense: int
    ranks: Mapping[int, int]

    @classmethod
    def of_seconds(cls, dense: float, ranks: Mapping[int, float]) -> ShapeTimes:
        """Return measured times as whole nanoseconds.

        A larger rank does more work, so a time below that of a smaller rank is noise. Such times are pooled, see
        :func:`rising`. A rank may be slower than the dense layer: that is what the measurement is for.

        Args:
            dense: seconds of the dense layer.
            ranks: rank → seconds, in any order.
        """
        smooth = rising([ranks[rank] for rank in sorted(ranks)])
        return cls(_nanoseconds(dense), dict(zip(sorted(ranks), map(_nanoseconds, smooth), strict=True)))

    def at(self, rank: int | None) -> int:
        """Return the nanoseconds of a rank, linear between those measured; ``None`` means dense.

        Raises:
            ValueError: the rank is not between those measured.
        """
        if rank is None:
            return self.dense
        if not min(self.ranks, default=1) <= rank <= max(self.ranks, default=0):
            raise ValueError(f"rank {rank} is not between the measured ranks {', '.join(map(str, self.ranks))}")
        return round(float(np.interp(rank, list(self.ranks), list(self.ranks.values()))))


@dataclass(frozen=True)
class TimeTable:
    """Times of all shapes of a model, in one layout.

    Attributes:
        shapes: (m, n) → times.
    """

    shapes: Mapping[tuple[int, int], ShapeTimes]

    def nanoseconds(self, spec: LinearSpec, rank: int | None) -> int:
        """Return the time of a layer at a rank; ``None`` means dense.

        Raises:
            ValueError: the rank is not between those measured.
        """
        return self.shapes[spec.m, spec.n].at(rank)

    def total(self, specs: Iterable[LinearSpec], ranks: Mapping[str, int | None]) -> int:
        """Return the summed nanoseconds of layers at ``ranks``, by module path."""
        return sum(self.nanoseconds(spec, ranks[spec.name]) for spec in specs)

    def share(self, specs: Sequence[LinearSpec], ranks: Mapping[str, int | None]) -> float:
        """Return the time of layers at ``ranks``, as a share of their time if all are dense."""
        return self.total(specs, ranks) / sum(self.nanoseconds(spec, None) for spec in specs)


def rising(values: Sequence[float]) -> list[float]:
    """Return the non-decreasing values with the least summed square difference to ``values``.

    Neighbours in the wrong order are replaced by their mean (pool adjacent violators: Ayer et al., "An empirical
    distribution function for sampling with incomplete information", Ann. Math. Statist. 26, 1955).
    """
    pools: list[tuple[float, int]] = []  # mean and number of values
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, number = pools.pop()
            mean, count = (before * number + mean * count) / (number + count), number + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def _nanoseconds(seconds: float) -> int:
    # A clock may be too coarse for a tiny layer; a choice that costs nothing would be no choice.
    return max(1, round(1e9 * seconds))
