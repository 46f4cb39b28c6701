"""Scores of tasks, and their mean."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ara.artifacts.evaluation import AnswerPiece, TaskFigures, TaskPiece, TaskResults
from ara.evaluation.task_folders import open_task_folders
from ara.evaluation.tasks import ZERO_SHOT, load_tasks, mean_label
from ara.stages.scores import mean_accuracy, task_results

MODELS = ("dense", "mine")


def piece(metric: str, mean: float, values: list[float]) -> TaskPiece:
    """Return one model's answers."""
    return TaskPiece({metric: mean}, {metric: 0.1}, metric, tuple(AnswerPiece({metric: value}) for value in values))


def asked(names: tuple[str, ...]) -> tuple[dict[str, TaskResults], dict[str, dict[str, TaskPiece]]]:
    """Return figures and answers: the later a task, the more of 16 questions are right; ``mine`` has one less."""
    tasks, answers = {}, {}
    for number, name in enumerate(names):
        right = {"dense": number + 2, "mine": number + 1}
        metric = "word_perplexity" if name == "wikitext" else "acc"
        rows = {model: TaskFigures(right[model] / 16, 0.1, None, {}, {}) for model in MODELS}
        tasks[name] = TaskResults("harness", name, metric, 16, 16, 0, rows, {})
        answers[name] = {m: piece("acc", right[m] / 16, [float(i < right[m]) for i in range(16)]) for m in MODELS}
    return tasks, answers


@pytest.mark.parametrize(
    ("names", "over", "label"),
    [
        (("lambada_openai", *ZERO_SHOT, "boolq"), ZERO_SHOT, "mean of zero-shot"),
        (tuple(reversed(ZERO_SHOT)), ZERO_SHOT, "mean of zero-shot"),
        ((*ZERO_SHOT[1:], "boolq", "wikitext"), (*ZERO_SHOT[1:], "boolq"), "mean of 7 tasks"),
        (("piqa", "copa"), ("piqa", "copa"), "mean of 2 tasks"),
    ],
)
def test_the_mean_is_over_the_seven_if_all_were_asked(
    names: tuple[str, ...], over: tuple[str, ...], label: str
) -> None:
    tasks, answers = asked(names)
    found = mean_accuracy(tasks, answers, MODELS, "mine")
    assert found is not None
    assert found.tasks == over and mean_label(found.tasks) == label
    for model in MODELS:
        row, values = found.models[model], [tasks[name].models[model].value for name in over]
        assert row.mean == pytest.approx(sum(values) / len(over))
        assert row.stderr == pytest.approx(0.1 / math.sqrt(len(over)))
    assert found.compared["dense"].difference == pytest.approx(-1 / 16)


def test_one_task_has_no_mean() -> None:
    assert mean_accuracy(*asked(("piqa", "wikitext")), MODELS, "mine") is None


_TASK = """
task: made
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}, cache_dir: {folder}/cache}}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: ["yes", "no"]
doc_to_target: label
metric_list: [{{metric: acc, higher_is_better: {higher}}}]
"""


@pytest.mark.parametrize(
    ("metric", "higher", "kept"), [("acc", "true", 0.5), ("of its own", "true", 0.5), ("acc", "false", None)]
)
def test_a_share_of_dense_is_kept_only_where_more_is_better(
    tmp_path: Path, metric: str, higher: str, kept: float | None
) -> None:
    (tmp_path / "questions.jsonl").write_text('{"question": "Is it?", "label": 0}\n{"question": "No?", "label": 1}\n')
    (tmp_path / "made.yaml").write_text(_TASK.format(folder=tmp_path, higher=higher))
    (task,) = load_tasks("made", own=open_task_folders([str(tmp_path)]))
    rows = {model: piece(metric, mean, [0.0, 1.0]) for model, mean in (("dense", 0.6), ("mine", 0.3))}
    assert task_results(task, rows, "mine", seed=0).models["mine"].retained == kept
