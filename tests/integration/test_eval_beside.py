"""``ara eval --beside``: further checkpoints in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ara.artifacts.evaluation import EvaluationResults
from ara.config import AllocateConfig, EvalConfig, TruncateConfig
from ara.errors import UsageError, WorkspaceError
from ara.names import check_name
from ara.reporting.document import Report
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.evaluate import evaluate, result_name
from ara.stages.truncate import truncate
from ara.workspace.store import Workspace
from tests.commands import ara, done, refused
from tests.questions import write_questions
from tests.tiny import story

NAME, OTHER = "energy-0.70", "energy-0.50"
CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32"}


@pytest.fixture
def two(copied: Path) -> Path:
    """Return a workspace with a further checkpoint at keep 0.5."""
    run = Run(copied)
    ranks = allocate(AllocateConfig(keep=0.5, method="energy", **CPU), run)
    truncate(TruncateConfig(), run, allocation=ranks.name)
    return copied


def _config(*tasks: str) -> EvalConfig:
    return EvalConfig(tasks=tasks, seq_len=64, max_windows=2, limit=16, max_new_tokens=3, continuations=1, **CPU)


def test_its_figures_are_those_of_its_own_evaluation(two: Path, tiny_text: str) -> None:
    run = Run(two)
    view = evaluate(_config(tiny_text), run, checkpoint=NAME, beside=[f"truncate/{OTHER}"])
    assert view.name == f"{NAME}-{story()}-beside-truncate_{OTHER}"
    alone = EvaluationResults.read(evaluate(_config(tiny_text), run, checkpoint=OTHER))
    both = EvaluationResults.read(view)
    assert both.chosen == NAME and list(both.variants) == ["dense", "uniform", NAME, OTHER]
    assert both.variants[OTHER] == alone.variants[OTHER] != both.variants[NAME]
    (ours,), (expected,) = both.texts.values(), alone.texts.values()
    assert ours.models[OTHER].perplexity == expected.models[OTHER].perplexity
    assert ours.models[OTHER].divergence == expected.models[OTHER].divergence


def test_tasks_compare_the_chosen_one_with_it(
    two: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("local")
    monkeypatch.setenv("ARA_CACHE_DIR", str(root / "cache"))
    monkeypatch.setenv("ARA_DATA_DIR", str(write_questions(root / "data")))
    words = ["--tasks", "piqa", "--limit", "8", "--from", f"truncate/{NAME}", "--beside", f"truncate/{OTHER}"]
    result = done("eval", *words, "--device", "cpu", "--dtype", "float32", "-w", two)
    assert f"Δ {OTHER} (p)" in " ".join(result.output.split())
    (view,) = (one for one in Workspace.open(two).views("evaluation") if "beside" in one.name)
    (task,) = EvaluationResults.read(view).harness.values()
    assert set(task.compared) == {"dense", "uniform", OTHER}


def test_only_the_report_of_the_chosen_one_shows_the_result(two: Path, tiny_text: str) -> None:
    view = evaluate(_config(tiny_text), Run(two), checkpoint=NAME, beside=[f"truncate/{OTHER}"])
    shown = {}
    for name in (NAME, OTHER):
        done("report", "--checkpoint", name, "-w", two)
        text = (two / "report" / name / "report.json").read_text(encoding="utf-8")
        shown[name] = [one.name for one in Report.model_validate_json(text).evaluations]
    assert view.name in shown[NAME] and shown[OTHER] == []


def test_a_checkpoint_is_measured_once(two: Path, tiny_text: str) -> None:
    for beside in ([f"truncate/{NAME}"], [f"truncate/{OTHER}", OTHER]):
        with pytest.raises(UsageError, match="is measured already"):
            evaluate(_config(tiny_text), Run(two), checkpoint=NAME, beside=beside)
    with pytest.raises(WorkspaceError, match="nothing"):
        evaluate(_config(tiny_text), Run(two), checkpoint=NAME, beside=["truncate/nothing"])
    refused(ara("eval", "--beside", OTHER, "-w", two), 2, f"--beside '{OTHER}': expected STAGE/NAME")


def test_a_checkpoint_of_the_same_name_is_called_by_its_key(two: Path, tiny_text: str) -> None:
    ranks = Workspace.open(two).ancestor(Workspace.open(two).view(f"truncate/{OTHER}"), "ranks").name
    truncate(TruncateConfig(), Run(two), allocation=ranks, name="uniform")
    view = evaluate(_config(tiny_text), Run(two), checkpoint=NAME, beside=["truncate/uniform"])
    assert list(EvaluationResults.read(view).variants) == ["dense", "uniform", NAME, "truncate/uniform"]


def test_names_with_many_checkpoints_stay_short() -> None:
    keys = [f"truncate/a-checkpoint-with-a-long-name-{number}" for number in range(20)]
    names = {result_name("ara-0.80", ("c4",), {}, None, keys[:count]) for count in (18, 19)}
    assert len(names) == 2 and all(check_name(name) == name for name in names)
