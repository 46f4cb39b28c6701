"""What ``ara train-masks`` leaves in the workspace, read back."""

from __future__ import annotations

from safetensors.torch import load_file

from ara.allocation.base import DENSE, Allocation
from ara.masks.learned import LearnedLosses
from ara.stage_view import StageView


def masks_file(keep: float) -> str:
    """Name of the file with what was learned at one budget."""
    return f"masks-{keep:g}.safetensors"


def read_learned(view: StageView) -> list[LearnedLosses]:
    """Read what a finished training has learned, one entry per budget."""
    assert view.manifest is not None
    learned, priced = [], view.manifest.config["objective"] == "priced"
    for keep, result in view.manifest.results["budgets"].items():
        tables = load_file(view.path / masks_file(float(keep))) if priced else None
        ranks = Allocation({name: None if rank == DENSE else rank for name, rank in result["ranks"].items()})
        learned.append(LearnedLosses(float(keep), tables, ranks))
    return learned
