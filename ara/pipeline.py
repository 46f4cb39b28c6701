"""START HERE: the stages in their order, what each reads and what it writes.

::

    model + text ──decompose──▶ factors ──(train-masks)──▶ masks
                                   │                         │
                                   ├──────allocate ◀─────────┘
                                   ▼          │
                                truncate ◀── ranks
                                   │
                              checkpoint ──▶ eval, export

The README's tree, ``ara --help`` and the folders of a workspace show the same order; a test holds them together.
Every stage is a function ``stage(config, run, ...)`` in :mod:`ara.stages` that returns the folder it wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ara.config import AllocateConfig, DecomposeConfig, EvalConfig, TrainMasksConfig, TruncateConfig
    from ara.stage_view import StageView
    from ara.stages.common import Run


@dataclass(frozen=True)
class Stage:
    """One line of the pipeline.

    Attributes:
        name: of the command and of the workspace folder.
        title: one line for ``ara --help``.
        reads: what it is made from.
        writes: what its folder holds.
        after: the stage that it builds on, ``None`` for the first.
        optional: whether the pipeline is complete without it.
    """

    name: str
    title: str
    reads: str
    writes: str
    after: str | None
    optional: bool = False


STAGES: tuple[Stage, ...] = (
    Stage("decompose", "Factor every linear layer once", "model, text", "factors", None),
    Stage("train-masks", "Learn which ranks matter", "factors, text", "masks", "decompose", optional=True),
    Stage("allocate", "Give every layer a rank under one budget", "factors, text", "ranks", "decompose"),
    Stage("truncate", "Write the compressed checkpoint", "factors, ranks, model", "checkpoint", "allocate"),
    Stage("eval", "Measure dense, uniform and chosen side by side", "checkpoint, text", "results", "truncate"),
    Stage("export", "Write the model for another runtime", "checkpoint", "ONNX graph", "truncate", optional=True),
)

# Stage → the stages whose results its own may be made from. Nothing is made from itself, so a result that says
# otherwise is not ours; a test holds that.
MADE_FROM: dict[str, tuple[str, ...]] = {
    "decompose": (),
    "train-masks": ("decompose",),
    "allocate": ("decompose", "train-masks"),
    "truncate": ("allocate", "decompose"),
    "export": ("truncate",),
    "eval": ("truncate", "decompose", "export"),
    "compare": ("decompose", "train-masks"),
    "bench": ("truncate", "decompose", "export"),
    "report": ("decompose", "train-masks", "allocate", "truncate", "export", "eval", "compare", "bench"),
}


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
    from ara.config import MaskTrainingOptions
    from ara.models.placement import choose_placement
    from ara.stages.allocate import allocate
    from ara.stages.decompose import decompose
    from ara.stages.evaluate import evaluate
    from ara.stages.learned import covering_training
    from ara.stages.train_masks import train_masks
    from ara.stages.truncate import truncate

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
    from ara.calibration.texts import check_text_spec
    from ara.evaluation.tasks import check_task, expand, is_text
    from ara.stages.allocate import AUTO, refuse_layout

    for config in allocate_configs:
        if config.method != AUTO:
            refuse_layout(config.method, config.layout)
    for task in expand(eval_config.tasks) if eval_config else ():
        check_text_spec(task) if is_text(task) else check_task(task, run.report)


def training_for(configs: Sequence[AllocateConfig]) -> TrainMasksConfig:
    """Return the training that serves these budgets: their floors, text and seed, all else by default."""
    from ara.config import BudgetConfig, TrainMasksConfig, TuningConfig

    shared = {name: getattr(configs[0], name) for name in (*BudgetConfig.model_fields, *TuningConfig.model_fields)}
    return TrainMasksConfig(keep=tuple(config.keep for config in configs if config.keep is not None), **shared)
