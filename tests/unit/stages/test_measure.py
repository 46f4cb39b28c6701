"""What ``ara eval`` makes of its pieces."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from ara.evaluation.tasks import ZERO_SHOT, Task, mean_label
from ara.stages.measure import Measurement, mean_accuracy

MODELS = ("dense", "mine")


def asked(names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return figures and answers: the later a task, the more of 16 questions are right; ``mine`` has one less."""
    tasks, answers = {}, {}
    for number, name in enumerate(names):
        right = {"dense": number + 2, "mine": number + 1}
        rows = {model: {"value": right[model] / 16, "stderr": 0.1} for model in MODELS}
        tasks[name] = {"metric": "word_perplexity" if name == "wikitext" else "acc", "models": rows}
        answers[name] = {m: {"answers": [{"metrics": {"acc": float(i < right[m])}} for i in range(16)]} for m in MODELS}
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
    assert found["tasks"] == list(over) and mean_label(found["tasks"]) == label
    for model in MODELS:
        row, values = found["models"][model], [tasks[name]["models"][model]["value"] for name in over]
        assert row["mean"] == pytest.approx(sum(values) / len(over))
        assert row["stderr"] == pytest.approx(0.1 / math.sqrt(len(over)))
    assert found["compared"]["dense"]["difference"] == pytest.approx(-1 / 16)


def test_one_task_has_no_mean() -> None:
    assert mean_accuracy(*asked(("piqa", "wikitext")), MODELS, "mine") is None


@pytest.mark.parametrize(("higher", "kept"), [(True, 0.5), (None, 0.5), (False, None)])
def test_a_share_of_dense_is_kept_only_where_more_is_better(higher: bool | None, kept: float | None) -> None:
    answers = [{"metrics": {"ter": value}} for value in (0.0, 1.0)]
    rows = {m: {"headline": "ter", "metrics": {"ter": v}, "stderrs": {"ter": 0.1}} for m, v in (("dense", 0.6),)}
    rows["mine"] = {**rows["dense"], "metrics": {"ter": 0.3}}
    rows = {model: {**row, "answers": answers} for model, row in rows.items()}
    definition = SimpleNamespace(higher_is_better=lambda: {} if higher is None else {"ter": higher})
    measurement = SimpleNamespace(chosen="mine", config=SimpleNamespace(seed=0))
    found = Measurement._task(measurement, Task("made", definition, 2, "made", ""), rows)  # type: ignore[arg-type]
    assert found["models"]["mine"]["retained"] == kept
