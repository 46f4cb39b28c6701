"""``ara run``: the steps of the pipeline in their order, once per model or once per budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ara.config import (
    AllocateConfig,
    BudgetConfig,
    DecomposeConfig,
    EvalConfig,
    MaskTrainingOptions,
    RecoverConfig,
    StageConfig,
    TrainMasksConfig,
    TuningConfig,
)
from ara.evaluation.layer_times import LayerRunner
from ara.evaluation.task_folders import open_task_folders
from ara.evaluation.tasks import check_task, expand
from ara.models.placement import choose_placement
from ara.models.sources import resolve
from ara.pipeline import Stage, kind_named, steps
from ara.progress import SILENT
from ara.solver.stored_ranks import planned_ranks
from ara.stages.allocate import AUTO, allocate, refuse_layout, refuse_method
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.decompose_ahead import linears_to_store
from ara.stages.latency import LATENCY, check_settings, refuse_objective
from ara.stages.recover import check_levels, levels_with_ranks
from ara.stages.train_masks import train_masks
from ara.stages.trainings import covering_training
from ara.workspace.view import StageView


def run_pipeline(
    decompose_config: DecomposeConfig,
    budgets: Sequence[AllocateConfig],
    later: Mapping[str, StageConfig],
    run: Run,
    layers: LayerRunner | None = None,
) -> list[StageView]:
    """Factor the model once, then run the later steps for every budget; finished results are reused.

    One training covers all budgets of the method ``ara``. An existing training with these budgets is reused, even if
    its training options differ.

    Args:
        decompose_config: of the factors.
        budgets: one allocation each.
        later: stage name → config, for the steps after the allocation; other steps are skipped.
        run: workspace and reporter.
        layers: times layers for budgets of time, as for :func:`ara.stages.allocate.allocate`.

    Returns:
        All results in the order in which they were made.
    """
    _check_ahead(budgets, later, run)
    _check_stored_ranks(decompose_config, budgets, later)
    factors = decompose(decompose_config, run)
    training = _training(budgets, factors, run)
    views = [factors, *([training] if training else [])]
    for config in budgets:
        masks = training.key if training and config.method == "ara" else None
        ranks = allocate(config, run, factors=factors.key, masks=masks, layers=layers)
        made = {ranks.kind: ranks}
        views.append(ranks)
        for stage in steps():
            if stage.name in later:
                made[stage.produces] = _run(stage, later[stage.name], made, run)
                views.append(made[stage.produces])
    return views


def _run(stage: Stage, config: StageConfig, made: Mapping[str, StageView], run: Run) -> StageView:
    """Run one step on the result of its main input."""
    kind = kind_named(stage.consumes[0])
    view: StageView = stage.load()(config, run, **{kind.argument: made[kind.name].key})
    return view


def _training(budgets: Sequence[AllocateConfig], factors: StageView, run: Run) -> StageView | None:
    """Return a training that covers all budgets of the method ``ara``, existing or new; ``None`` if there are none."""
    learned = [config for config in budgets if config.method == "ara"]
    if not learned:
        return None
    wanted = training_for(learned)
    dtype = choose_placement(wanted.device, wanted.dtype).dtype
    # Options that ara run does not have, and the device.
    free = {*MaskTrainingOptions.model_fields, "batch_size", "device"}
    asked = wanted.model_copy(update={"dtype": dtype})
    found = None if run.force else covering_training(run.open(), factors, asked, ignoring=free)
    if found:
        run.report.fact(f"{found.key} covers these budgets and is reused")
    return found or train_masks(wanted, run, factors=factors.key)


def _check_ahead(budgets: Sequence[AllocateConfig], later: Mapping[str, StageConfig], run: Run) -> None:
    """Refuse names that a later stage would refuse, before the first one works for hours."""
    for budget in budgets:
        check_settings(budget)
        if budget.method != AUTO:
            refuse_layout(budget.method, budget.layout)
            refuse_objective(budget.method, budget.objective)
    for config in later.values():
        if isinstance(config, RecoverConfig):
            check_levels(config)
        if isinstance(config, EvalConfig):
            own = open_task_folders(config.include_path)
            for task in expand(config.tasks, own):
                check_task(task, run.report, own)


def _check_stored_ranks(
    config: DecomposeConfig, budgets: Sequence[AllocateConfig], later: Mapping[str, StageConfig]
) -> None:
    """Refuse what needs ranks that the decomposition will not store.

    Raises:
        UsageError: a budget, a method or a level needs them.
    """
    if config.max_keep is None:
        return
    source = resolve(config.model, revision=config.revision).with_experts(config.share_experts)
    specs = linears_to_store(source.empty_model(), config)
    stored = planned_ranks(f"decompose/{config.method}", specs, config.max_keep)
    for budget in budgets:
        if budget.method != AUTO:
            refuse_method(budget.method, stored)
        if budget.keep is not None and budget.objective != LATENCY:
            stored.check_keep([replace(spec, layout=budget.layout) for spec in specs], budget.keep, SILENT)
    for stage in later.values():
        if isinstance(stage, RecoverConfig):
            levels_with_ranks(check_levels(stage), stored, stage, SILENT, "--recover")


def training_for(configs: Sequence[AllocateConfig]) -> TrainMasksConfig:
    """Return the config of one training for these budgets: their limits, windows and seed; defaults for all else."""
    shared = {name: getattr(configs[0], name) for name in (*BudgetConfig.model_fields, *TuningConfig.model_fields)}
    return TrainMasksConfig(keep=tuple(config.keep for config in configs if config.keep is not None), **shared)
