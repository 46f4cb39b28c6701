"""What ``ara train-masks`` leaves in the workspace: names of its files, and the way back into memory."""

from __future__ import annotations

from dataclasses import replace

from safetensors.torch import load_file

from ara.allocation.base import DENSE, Allocation, Context
from ara.masks.learned import LearnedLosses
from ara.stage_view import StageView

TABLE_FILE = "sensitivity.safetensors"
LOG_FILE = "log.csv"


def masks_file(keep: float) -> str:
    """Name of the file with what was learned at one budget."""
    return f"masks-{keep:g}.safetensors"


def with_training(context: Context, trained: StageView | None) -> Context:
    """Return ``context`` with what a finished training has learned, and the table that it began with."""
    if trained is None:
        return context
    assert trained.manifest is not None
    table = load_file(trained.path / TABLE_FILE) if TABLE_FILE in trained.manifest.files else None
    return replace(context, learned=read_learned(trained), table=table)


def read_learned(view: StageView) -> list[LearnedLosses]:
    """Read what a finished training has learned, one entry per budget."""
    assert view.manifest is not None
    learned, priced = [], view.manifest.config["objective"] == "priced"
    for keep, result in view.manifest.results["budgets"].items():
        tables = load_file(view.path / masks_file(float(keep))) if priced else None
        ranks = Allocation({name: None if rank == DENSE else rank for name, rank in result["ranks"].items()})
        learned.append(LearnedLosses(float(keep), tables, ranks))
    return learned
