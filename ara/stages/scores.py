"""Scores of all models on tasks of lm-eval: accuracy, what is retained of the dense model's, paired comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from ara.artifacts.evaluation import (
    DENSE,
    MeanFigures,
    MeanResults,
    PairedDifference,
    TaskFigures,
    TaskPiece,
    TaskResults,
)
from ara.evaluation.paired import Difference, bootstrap_pairs, compare_pairs
from ara.evaluation.tasks import ZERO_SHOT, Task


def task_results(task: Task, rows: Mapping[str, TaskPiece], chosen: str, seed: int) -> TaskResults:
    """Return one task's figures, and how the chosen model compares with all others.

    Args:
        task: of lm-eval.
        rows: model → its answers.
        chosen: name of the compressed model.
        seed: random seed with which the questions were drawn.
    """
    metric = next(iter(rows.values())).headline
    higher = task.definition.higher_is_better().get(metric) is not False
    dense = rows[DENSE].metrics[metric] if DENSE in rows and higher else None
    models = {
        name: TaskFigures(
            value=row.metrics[metric],
            stderr=row.stderrs[metric],
            # Only for a mean over questions where more is better: a share of a perplexity or error says nothing.
            retained=row.metrics[metric] / dense if dense and row.stderrs[metric] is not None else None,
            metrics=row.metrics,
            stderrs=row.stderrs,
        )
        for name, row in rows.items()
    }
    compared = {}
    if all(row.stderrs[metric] is not None for row in rows.values()):
        ours = rows[chosen].values(metric)
        compared = {
            name: _difference(compare_pairs(ours, row.values(metric))) for name, row in rows.items() if name != chosen
        }
    return TaskResults(
        kind="harness",
        text=task.origin,
        metric=metric,
        examples=len(rows[chosen].answers),
        of=task.documents,
        seed=seed,
        models=models,
        compared=compared,
    )


def mean_accuracy(
    tasks: Mapping[str, TaskResults],
    answers: Mapping[str, Mapping[str, TaskPiece]],
    models: Sequence[str],
    chosen: str,
) -> MeanResults | None:
    """Return the unweighted mean accuracy over tasks, or ``None`` if fewer than two tasks have an accuracy.

    If all of :data:`ZERO_SHOT` are among the tasks, the mean is over these only, as in the papers.

    Args:
        tasks: task → its figures.
        answers: task → model → its answers.
        models: names of the models.
        chosen: the model to compare with all others.
    """
    names = [
        name
        for name, task in tasks.items()
        if task.metric == "acc" and all(row.stderr is not None for row in task.models.values())
    ]
    if set(ZERO_SHOT) <= set(names):
        names = list(ZERO_SHOT)
    if len(names) < 2:
        return None

    def mean(model: str) -> float:
        return sum(tasks[name].models[model].value for name in names) / len(names)

    def stderr(model: str) -> float:
        return math.hypot(*(tasks[name].models[model].stderr or 0.0 for name in names)) / len(names)

    def pairs(other: str) -> dict[str, tuple[list[float], list[float]]]:
        return {name: (answers[name][chosen].values("acc"), answers[name][other].values("acc")) for name in names}

    dense = mean(DENSE) if DENSE in models else None
    return MeanResults(
        tasks=tuple(names),
        models={
            model: MeanFigures(mean(model), stderr(model), retained=mean(model) / dense if dense else None)
            for model in models
        },
        compared={other: _difference(bootstrap_pairs(pairs(other))) for other in models if other != chosen},
    )


def _difference(found: Difference) -> PairedDifference:
    return PairedDifference(**asdict(found))
