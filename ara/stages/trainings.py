"""Training runs in the workspace: finding the one that a stage uses, and reading its results."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from safetensors.torch import load_file

from ara.artifacts.ranks_file import from_table
from ara.artifacts.training import TABLE_FILE, TrainingResults, TrainingSettings, masks_file, stopped_early
from ara.config import TrainMasksConfig, TuningConfig
from ara.errors import CorruptedError, WorkspaceError
from ara.layout_names import LayoutName
from ara.masks.context import TuningContext
from ara.masks.rank_losses import LearnedLosses
from ara.models.weights import LinearSpec
from ara.progress import Reporter
from ara.solver.problem import DENSE
from ara.workspace.manifest import essence, remake
from ara.workspace.store import Workspace
from ara.workspace.view import StageView, parent_of

C = TypeVar("C", bound=TuningConfig)


def fits(training: StageView, decomposition: StageView) -> bool:
    """Tell whether a training used these factors."""
    return training.manifest is not None and parent_of(decomposition) in training.manifest.parents


def require_training(workspace: Workspace, decomposition: StageView, name: str | None) -> StageView:
    """Return the training called ``name``, or the latest one; it must be finished.

    Raises:
        WorkspaceError: there is none, or it used other factors.
    """
    view = workspace.require("training", name)
    if not fits(view, decomposition):
        raise WorkspaceError(
            f"{view.key} was trained on other factors than {decomposition.key}",
            "name matching ones with --masks and --factors, or run ara train-masks again",
        )
    return view


def find_training(
    workspace: Workspace,
    decomposition: StageView,
    layout: LayoutName,
    keep: float | None,
    report: Reporter,
    name: str | None = None,
) -> StageView | None:
    """Return the training called ``name``, or the finished one that fits best, or ``None``.

    It must have used these factors. Preferred are, in this order, the same layout, a budget near ``keep``, a complete
    training, the latest one. Rank losses do not depend on the layout; a mismatch is reported. A training of the paper's
    form learns shares of k(m + n), so it fits only its own layout.

    Raises:
        WorkspaceError: there is none of that name, it used other factors, or it does not fit the layout.
    """
    if name is not None:
        view = require_training(workspace, decomposition, name)
        if not _supports(view, layout):
            raise WorkspaceError(
                f"{view.key} was trained by the paper's form, which does not support layout {layout}",
                f"train with --objective priced, or allocate with --layout {_layout(view)}",
            )
        return _reported(view, layout, report)
    fitting = [
        view
        for view in workspace.views("training")
        if view.state == "done" and fits(view, decomposition) and _supports(view, layout)
    ]
    # The sort is stable: of equally good ones the latest is last.
    fitting.sort(key=lambda view: (_layout(view) == layout, -_distance(view, keep), not stopped_early(view)))
    return _reported(workspace.require("training", fitting[-1].key), layout, report) if fitting else None


def _reported(training: StageView, layout: LayoutName, report: Reporter) -> StageView:
    if _layout(training) != layout:
        report.fact(
            f"{training.key} was trained for layout {_layout(training)}; its rank losses also hold for {layout}"
        )
    return training


def _distance(training: StageView, keep: float | None) -> float:
    """Return the distance of ``keep`` from the nearest budget of a training."""
    budgets = [float(budget) for budget in TrainingResults.read(training).budgets]
    return 0.0 if keep is None else round(min(abs(budget - keep) for budget in budgets), 4)


def covering_training(
    workspace: Workspace, decomposition: StageView, config: TrainMasksConfig, ignoring: Collection[str] = ()
) -> StageView | None:
    """Return the latest complete training on these factors that covers all budgets of ``config``.

    Its other settings must be the same, except those named in ``ignoring`` and those that do not change the result.
    """
    assert decomposition.manifest is not None
    decisive = essence("train-masks", config, decomposition.manifest.model, ())["config"]
    wanted = {name: value for name, value in decisive.items() if name not in {"keep", *ignoring}}
    for view in reversed(workspace.views("training")):
        if view.state != "done" or not fits(view, decomposition) or stopped_early(view):
            continue
        assert view.manifest is not None
        made = view.manifest.config
        if set(config.keep) <= set(made["keep"]) and all(made.get(name) == value for name, value in wanted.items()):
            return workspace.require("training", view.key)
    return None


def _layout(training: StageView) -> LayoutName:
    return TrainingSettings.read(training).layout


def _supports(training: StageView, layout: LayoutName) -> bool:
    return TrainingSettings.read(training).objective == "priced" or _layout(training) == layout


def with_text_of(config: C, trained: StageView | None, report: Reporter) -> C:
    """Return ``config`` with the calibration windows of a training, so that none it learned from is held out here."""
    if trained is None:
        return config
    settings = TrainingSettings.read(trained)
    made = {"samples": settings.samples, "held_out": settings.held_out}
    if made != {name: getattr(config, name) for name in made}:
        report.fact(f"{made['samples']} windows to learn from, {made['held_out']} held out, as in {trained.key}")
    return config.model_copy(update=made)


def with_training(context: TuningContext, trained: StageView | None) -> TuningContext:
    """Return ``context`` with the results of a finished training and its sensitivity table."""
    if trained is None:
        return context
    assert trained.manifest is not None
    if stopped := stopped_early(trained):
        context.report.warn(f"{trained.key} is not complete: {stopped}")
    learned = read_learned(trained, context.model.specs)
    table = load_file(trained.path / TABLE_FILE) if TABLE_FILE in trained.manifest.files else None
    for tables in (table, *(losses.tables for losses in learned)):
        _check_tables(trained, tables, context.model.specs)
    return replace(context, learned=learned, table=table)


def _check_tables(trained: StageView, tables: Mapping[str, torch.Tensor] | None, specs: Sequence[LinearSpec]) -> None:
    """Check that the losses are those of these layers, from rank 0 to full rank."""
    found = None if tables is None else {name: tuple(table.shape) for name, table in tables.items()}
    if found is not None and found != {spec.name: (spec.full_rank + 1,) for spec in specs}:
        raise CorruptedError(f"{trained.key} holds losses of other layers than the factors have", _again(trained))


def _check_ranks(trained: StageView, ranks: Mapping[str, int | str], specs: Sequence[LinearSpec]) -> None:
    """Check that the ranks are those of these layers."""
    full = {spec.name: spec.full_rank for spec in specs}
    if set(ranks) != set(full) or any(rank != DENSE and int(rank) > full[name] for name, rank in ranks.items()):
        raise CorruptedError(f"{trained.key} holds ranks of other layers than the factors have", _again(trained))


def _again(trained: StageView) -> str:
    assert trained.manifest is not None
    return remake(trained.manifest, True)


def read_learned(view: StageView, specs: Sequence[LinearSpec]) -> list[LearnedLosses]:
    """Read the results of a finished training, one per budget."""
    assert view.manifest is not None
    learned, priced = [], TrainingSettings.read(view).objective == "priced"
    for keep, result in TrainingResults.read(view).budgets.items():
        name = masks_file(float(keep))
        if priced and name not in view.manifest.files:
            raise CorruptedError(f"{view.key} has a budget {keep} and no {name}", _again(view))
        tables = load_file(view.path / name) if priced else None
        _check_ranks(view, result.ranks, specs)
        learned.append(LearnedLosses(float(keep), tables, from_table(result.ranks, specs)))
    return learned
