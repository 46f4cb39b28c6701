"""Decompositions that store only the lower ranks (``ara decompose --max-keep``), and what cannot be done with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ara.errors import UsageError
from ara.models.weights import LinearSpec
from ara.progress import Reporter


@dataclass(frozen=True)
class StoredRanks:
    """Which ranks a decomposition stores, or will store.

    Attributes:
        key: of the decomposition, as errors name it.
        max_keep: ranks above this share of a layer's parameters are not stored; ``None`` if all are.
        lacking: whether a layer lacks ranks. A small layer may have none above :attr:`max_keep`.
        remedy: how to store all of them, in words.
    """

    key: str
    max_keep: float | None
    lacking: bool
    remedy: str

    def need_all(self, what: str, instead: str) -> None:
        """Check that all ranks are stored.

        Args:
            what: needs them; starts the error.
            instead: what else to do.

        Raises:
            UsageError: they are not.
        """
        if self.lacking:
            raise UsageError(
                f"{what} needs the factors of all ranks, and {self.key} stores {self._stored}",
                f"{instead}, or {self.remedy}",
            )

    def check_keep(self, specs: Sequence[LinearSpec], keep: float, report: Reporter) -> None:
        """Check that a budget does not need ranks that are not stored; report if some are not offered to it.

        Args:
            specs: the layers, in the wanted layout.
            keep: of their parameters.
            report: hears of ranks that are not offered.

        Raises:
            UsageError: the budget has room for a rank above the stored ones in every layer.
        """
        if not any(spec.lacks_ranks for spec in specs):
            return
        dense = sum(spec.dense_cost for spec in specs)

        def share(above: int) -> float:
            """Return the share of the parameters at the largest stored ranks, or ``above`` them."""
            cost = sum(spec.cost(spec.stored_rank + above) if spec.lacks_ranks else spec.dense_cost for spec in specs)
            return cost / dense

        most = share(0)
        if keep >= share(1):
            raise UsageError(
                f"keep {keep:g} needs higher ranks than {self.key} stores: {self._stored}, which is keep {most:.3f} in "
                f"the layout {specs[0].layout}",
                f"use --keep {math.floor(100 * most) / 100:g} or less, or {self.remedy}",
            )
        report.fact(
            f"{self.key} stores {self._stored}, which is keep {most:.3f} in the layout {specs[0].layout}: higher ranks "
            "are not offered"
        )

    @property
    def _stored(self) -> str:
        """Which ranks are stored, in words."""
        return f"ranks up to --max-keep {self.max_keep:g}"


def planned_ranks(key: str, specs: Sequence[LinearSpec], max_keep: float | None) -> StoredRanks:
    """Return what a decomposition will store.

    Args:
        key: of the decomposition.
        specs: its layers, with the ranks to store.
        max_keep: see :class:`StoredRanks`.
    """
    return StoredRanks(key, max_keep, any(spec.stored is not None for spec in specs), "leave out --max-keep")
