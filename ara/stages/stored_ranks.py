"""Which ranks a finished decomposition stores."""

from __future__ import annotations

from ara.artifacts.factors import FactorsResults, FactorsSettings
from ara.solver.stored_ranks import StoredRanks
from ara.workspace.view import StageView


def stored_ranks(decomposition: StageView) -> StoredRanks:
    """Return which ranks a decomposition stores."""
    return StoredRanks(
        decomposition.key,
        FactorsSettings.read(decomposition).max_keep,
        any(layer.stored is not None for layer in FactorsResults.read(decomposition).modules),
        "decompose the model again without --max-keep (--name keeps both)",
    )
