"""What ``ara eval`` makes of its pieces."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ara.evaluation.tasks import ZERO_SHOT, mean_label
from ara.stages.measure import mean_accuracy

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
