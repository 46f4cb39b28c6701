"""Decompositions that store only the lower ranks (``ara decompose --max-keep``), and what cannot be done with them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ara.artifacts.factors import FactorsResults, FactorsSettings
from ara.errors import UsageError
from ara.models.weights import LinearSpec
from ara.progress import Reporter
from ara.workspace.view import StageView

_ALL = "decompose the model again without --max-keep (--name keeps both)"


def lacks_ranks(decomposition: StageView) -> bool:
    """Tell whether a decomposition stores only the lower ranks of a layer."""
    return any(layer.stored is not None for layer in FactorsResults.read(decomposition).modules)


def need_all_ranks(decomposition: StageView, what: str, instead: str) -> None:
    """Check that a decomposition stores all ranks.

    Args:
        decomposition: the factors.
        what: needs them; starts the error.
        instead: what else to do.

    Raises:
        UsageError: it does not.
    """
    if lacks_ranks(decomposition):
        raise UsageError(
            f"{what} needs the factors of all ranks, and {decomposition.key} stores {_stored(decomposition)}",
            f"{instead}, or {_ALL}",
        )


def check_keep(decomposition: StageView, specs: Sequence[LinearSpec], keep: float, report: Reporter) -> None:
    """Check that a budget does not need ranks that are not stored; report if some are not offered to it.

    Args:
        decomposition: the factors.
        specs: its layers, in the wanted layout.
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
            f"keep {keep:g} needs higher ranks than {decomposition.key} stores: {_stored(decomposition)}, which is "
            f"keep {most:.3f} in the layout {specs[0].layout}",
            f"use --keep {math.floor(100 * most) / 100:g} or less, or {_ALL}",
        )
    report.fact(
        f"{decomposition.key} stores {_stored(decomposition)}, which is keep {most:.3f} in the layout "
        f"{specs[0].layout}: higher ranks are not offered"
    )


def _stored(decomposition: StageView) -> str:
    """Return which ranks a decomposition stores, in words."""
    return f"ranks up to --max-keep {FactorsSettings.read(decomposition).max_keep:g}"
