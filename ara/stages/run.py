"""``ara run``: decompose once, then train, allocate, truncate and evaluate for every budget."""

from __future__ import annotations

from collections.abc import Sequence

from ara.artifacts.training import covering_training
from ara.config import (
    AllocateConfig,
    BudgetConfig,
    DecomposeConfig,
    EvalConfig,
    MaskTrainingOptions,
    TrainMasksConfig,
    TruncateConfig,
    TuningConfig,
)
from ara.data.texts import check_text_spec
from ara.evaluation.task_folders import open_task_folders
from ara.evaluation.tasks import check_task, expand, is_text
from ara.models.placement import choose_placement
from ara.stages.allocate import AUTO, allocate, refuse_layout
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.evaluate import evaluate
from ara.stages.train_masks import train_masks
from ara.stages.truncate import truncate
from ara.workspace.view import StageView


def run_pipeline(
    decompose_config: DecomposeConfig,
    allocate_configs: Sequence[AllocateConfig],
    truncate_config: TruncateConfig,
    eval_config: EvalConfig | None,
    run: Run,
) -> list[StageView]:
    """Run decompose, then allocate, truncate and eval for each budget; what is done already is not done again.

    For budgets that the method ``ara`` shall meet, masks are trained in between, all in one training, unless there is
    one that has them: also one that was trained longer, or by another form.

    Returns:
        All results in the order in which they were reached.
    """

    _check_ahead(allocate_configs, eval_config, run)
    factors = decompose(decompose_config, run)
    views = [factors]
    learned = [config for config in allocate_configs if config.method == "ara"]
    training = None
    if learned:
        wanted = training_for(learned)
        dtype = choose_placement(wanted.device, wanted.dtype).dtype
        # Those that ara run has no option for, and where it was trained.
        free = {*MaskTrainingOptions.model_fields, "batch_size", "device"}
        asked = wanted.model_copy(update={"dtype": dtype})
        found = None if run.force else covering_training(run.open(), factors, asked, ignoring=free)
        if found:
            run.report.fact(f"{found.key} has these budgets and is used, however it was trained")
        training = found or train_masks(wanted, run, factors=factors.name)
        views.append(training)
    for config in allocate_configs:
        masks = training.name if training and config.method == "ara" else None
        ranks = allocate(config, run, factors=factors.name, masks=masks)
        checkpoint = truncate(truncate_config, run, allocation=ranks.name)
        views += [ranks, checkpoint]
        if eval_config is not None:
            views.append(evaluate(eval_config, run, checkpoint=checkpoint.name))
    return views


def _check_ahead(allocate_configs: Sequence[AllocateConfig], eval_config: EvalConfig | None, run: Run) -> None:
    """Refuse names that a later stage does not know before the first one has worked for hours."""

    for config in allocate_configs:
        if config.method != AUTO:
            refuse_layout(config.method, config.layout)
    if eval_config is not None:
        own = open_task_folders(eval_config.include_path)
        for task in expand(eval_config.tasks, own):
            check_text_spec(task) if is_text(task) else check_task(task, run.report, own)


def training_for(configs: Sequence[AllocateConfig]) -> TrainMasksConfig:
    """Return the config of one training for these budgets: their floors, windows and seed, defaults for all else."""
    shared = {name: getattr(configs[0], name) for name in (*BudgetConfig.model_fields, *TuningConfig.model_fields)}
    return TrainMasksConfig(keep=tuple(config.keep for config in configs if config.keep is not None), **shared)
