"""Finds exports of a checkpoint, or what runs single layers, for the commands that run them with ``--backend``."""

from __future__ import annotations

import shlex

from ara.artifacts.checkpoint import CHECKPOINT
from ara.artifacts.graph import GraphResults, GraphSettings
from ara.config.latency import LatencyConfig
from ara.errors import WorkspaceError
from ara.evaluation.layer_times import LayerRunner
from ara.pipeline import naming_words
from ara.stages import bench_models, evaluate
from ara.workspace.store import Workspace
from ara.workspace.view import StageView, parent_of
from export.base import Target
from export.targets import RUNTIMES, measuring_backends, target_of


def find_for_eval(backend: str, export: str | None = None) -> evaluate.FindExport | None:
    """Return a function that finds the export that ``ara eval`` measures; ``None`` if it measures none.

    Args:
        backend: torch, or the name of a target or of a runtime.
        export: name of the export; the latest of the checkpoint by default.

    Raises:
        AraError: as :func:`export.targets.target_of`. The returned function raises as :func:`latest_export`.
    """
    if (target := _measured_target(backend)) is None:
        return None

    def find(workspace: Workspace, truncated: StageView) -> evaluate.RunnableExport:
        view = latest_export(target, workspace, truncated, export)
        if GraphResults.read(view).last_logits:
            raise WorkspaceError(
                f"{view.key} gives the logits of the last position only", "export without --last-logits to evaluate"
            )
        load = target.for_eval(view, truncated.path / CHECKPOINT)
        size = sum(path.stat().st_size for path in target.weight_files(view.path))
        return evaluate.RunnableExport(view, load, size)

    return find


def find_for_bench(backend: str, export: str | None = None) -> bench_models.FindExport | None:
    """Return a function that finds the export that ``ara bench`` measures; arguments as for :func:`find_for_eval`."""
    if (target := _measured_target(backend)) is None:
        return None
    return lambda workspace, truncated: target.for_bench(latest_export(target, workspace, truncated, export))


def layers_in(config: LatencyConfig) -> LayerRunner | None:
    """Return what times layers for ``ara allocate --objective latency``; ``None`` for torch, or without need.

    Raises:
        AraError: as :func:`export.targets.target_of`, or the target cannot run this.
    """
    target = target_of(config.latency_backend, option="latency-backend")
    if target is None or config.objective != "latency":
        return None
    return target.for_latency(config.latency_precision, config.latency_threads)


def latest_export(target: Target, workspace: Workspace, truncated: StageView, name: str | None = None) -> StageView:
    """Return the export called ``name``, or the latest finished one of a checkpoint for a target, verified.

    Raises:
        WorkspaceError: there is none, it belongs to another checkpoint or target, or its manifest cannot be read.
    """
    if name is not None:
        view = workspace.require("graph", name)
        if view.manifest is None or parent_of(truncated) not in view.manifest.parents:
            raise WorkspaceError(
                f"{view.key} is not an export of {truncated.key}", "name its checkpoint with --checkpoint"
            )
        if not _is_for(target, view):
            raise WorkspaceError(
                f"{view.key} was not made for --backend {target.name}", f"make another export: {target.command}"
            )
        return view
    views = workspace.views("graph")
    for view in views:
        if view.state == "damaged":
            # It may be the latest one. This raises the error that says what is damaged.
            workspace.require("graph", view.key)
    fitting = [
        view
        for view in views
        if view.state == "done"
        and view.manifest
        and parent_of(truncated) in view.manifest.parents
        and _is_for(target, view)
    ]
    if fitting:
        return workspace.require("graph", fitting[-1].key)
    there = "; ".join(_why_not(view, truncated) for view in views)
    raise WorkspaceError(
        f"{truncated.key} has no export that can be run: {there}" if there else f"{truncated.key} was not exported",
        f"make one: {target.command} {shlex.join(naming_words(truncated.stage, truncated.name))}",
    )


def _measured_target(backend: str) -> Target | None:
    """Return the target whose exports a backend of ``ara eval`` and ``ara bench`` runs; ``None`` if it runs none."""
    return None if backend in RUNTIMES else target_of(backend, measuring_backends())


def _is_for(target: Target, view: StageView) -> bool:
    return view.manifest is not None and GraphSettings.read(view).target == target.name


def _why_not(view: StageView, truncated: StageView) -> str:
    """Return why an export does not fit."""
    if view.state != "done" or view.manifest is None:
        return f"{view.key} is {view.state}{f' ({view.why})' if view.why else ''}"
    if parent_of(truncated) in view.manifest.parents:
        return f"{view.key} is for {GraphSettings.read(view).target}"
    return f"{view.key} is one of {view.manifest.parents[0].key if view.manifest.parents else 'something else'}"
