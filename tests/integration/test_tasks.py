"""``ara eval`` on tasks of lm-eval: a table of three models, answers kept, resumed after NaN and kill, exports too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ara.stages.measure as measure
from ara.config import EvalConfig
from ara.errors import NumericalError
from ara.evaluation.paired import mcnemar
from ara.names import check_name
from ara.stages.common import Run
from ara.stages.evaluate import evaluate, result_name
from ara.workspace.store import Workspace
from tests.commands import ara, done
from tests.questions import write_questions
from tests.tiny import story

NAME = "energy-0.70"
CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
TASKS = ("piqa", "arc_easy")


@pytest.fixture(autouse=True)
def questions(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path_factory.mktemp("local")
    monkeypatch.setenv("ARA_CACHE_DIR", str(root / "cache"))
    monkeypatch.setenv("ARA_DATA_DIR", str(write_questions(root / "data")))
    return root / "data"


def _config(tiny_text: str, **changes: Any) -> EvalConfig:
    values = {"tasks": (tiny_text, *TASKS), "seq_len": 64, "max_windows": 2, "limit": 16, "max_new_tokens": 3}
    return EvalConfig(**{**values, **CPU, **changes})


def test_tasks_stand_beside_texts(copied: Path, tiny_text: str) -> None:
    results = evaluate(_config(tiny_text), Run(copied)).manifest.results  # type: ignore[union-attr]
    models = ["dense", "uniform", NAME]
    assert list(results["variants"]) == models and list(results["tasks"]) == [tiny_text, *TASKS]
    text = results["tasks"][tiny_text]
    assert text["models"]["dense"]["divergence"] is None
    for name in models[1:]:
        assert (
            text["models"][name]["divergence"]["kl"] > 0 and 0 <= text["models"][name]["divergence"]["agreement"] <= 1
        )
    for name in TASKS:
        task = results["tasks"][name]
        assert (task["kind"], task["metric"], task["examples"], task["of"]) == ("harness", "acc", 16, 24)
        folder = copied / "eval" / f"{NAME}-{story()}-piqa-arc_easy-limit-16"
        answers = {
            model: json.loads(next(folder.glob(f"*-{name}.{row}-{model}.json")).read_text())["answers"]
            for row, model in enumerate(models)
        }
        right = {model: [answer["metrics"]["acc"] for answer in answers[model]] for model in models}
        assert len({tuple(answer["digest"] for answer in rows) for rows in answers.values()}) == 1
        for model in models:
            row = task["models"][model]
            assert row["value"] == pytest.approx(sum(right[model]) / 16)
            dense = sum(right["dense"])
            assert row["retained"] == (pytest.approx(sum(right[model]) / dense) if dense else None)
        found = mcnemar(right[NAME], right["uniform"])
        assert task["compared"]["uniform"] == {"difference": found.difference, "p": found.p, "test": found.test}
    mean = results["zero_shot"]
    assert mean["tasks"] == list(TASKS)
    for model in models:
        both = [results["tasks"][name]["models"][model]["value"] for name in TASKS]
        assert mean["models"][model]["mean"] == pytest.approx(sum(both) / 2)
    assert set(mean["compared"]) == {"dense", "uniform"}


def test_a_limit_never_replaces_the_whole() -> None:
    assert result_name("ara-0.80", ("zero-shot",), {}, None) == "ara-0.80-zero-shot"
    assert result_name("ara-0.80", ("zero-shot",), {}, 10) == "ara-0.80-zero-shot-limit-10"
    assert result_name("ara-0.80", ("piqa", "c4"), {}, 400) == "ara-0.80-piqa-c4-limit-400"


def test_the_table_marks_what_is_noise(copied: Path) -> None:
    words = ["--tasks", "piqa,arc_easy", "--limit", "12", "--device", "cpu", "--dtype", "float32"]
    result = done("eval", *words, "-w", str(copied))
    for word in ("Tasks of lm-eval", "12 of 24", "mean", "≈: may be chance", "±"):
        assert word in result.output
    again = ara("eval", *words, "-w", str(copied))
    assert "is there already" in again.output
    unknown = ara("eval", "--tasks", "piqa,arc_hard", "-w", str(copied), "-q")
    assert unknown.exit_code == 1 and "there is no text or lm-eval task 'arc_hard'" in unknown.output
    missing = ara("eval", "--tasks", "zero-shot", "-w", str(copied), "-q")
    assert missing.exit_code == 1 and "task 'hellaswag': no file" in missing.output


def test_finished_tasks_survive_nan_and_are_not_asked_again(
    copied: Path, tiny_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    original = measure.ask

    def watched(model: Any, tokenizer: Any, task: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(options["label"])
        if options["label"] == broken:
            model = type(model)(model.config)
            with torch.no_grad():
                model.lm_head.weight.fill_(float("nan"))
        return original(model, tokenizer, task, *arguments, **options)

    monkeypatch.setattr(measure, "ask", watched)
    broken = "arc_easy, uniform"
    with pytest.raises(NumericalError, match="arc_easy, uniform: the model gives logits of nan, expected finite"):
        evaluate(_config(tiny_text), Run(copied))
    assert asked == ["piqa, dense", "piqa, uniform", f"piqa, {NAME}", "arc_easy, dense", "arc_easy, uniform"]
    asked.clear()
    broken = ""
    readings: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(measure, "interleaved_perplexity", lambda *arguments, **options: readings.append(arguments))
        view = evaluate(_config(tiny_text), Run(copied))
    assert asked == ["arc_easy, uniform", f"arc_easy, {NAME}"] and readings == []
    whole = evaluate(_config(tiny_text), Run(copied, force=True), name="again")
    assert view.manifest is not None and whole.manifest is not None
    for name in TASKS:
        assert view.manifest.results["tasks"][name] == whole.manifest.results["tasks"][name]
    assert Workspace.open(copied).view("eval/again").state == "done"


_OWN = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}/piqa/validation.jsonl}}, cache_dir: {data}/cache}}
output_type: multiple_choice
validation_split: validation
doc_to_text: !function code.prompt
doc_to_choice: ["{{{{sol1}}}}", "{{{{sol2}}}}"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


def test_tasks_of_the_user_and_files_with_commas(copied: Path, tiny_text: str, tmp_path: Path, questions: Path) -> None:
    """One run: a task whose code counts as a setting, and a text whose name holds a comma."""
    folder, text = tmp_path / "own tasks", tmp_path / ("a,b" + "c" * 200 + ".jsonl")
    folder.mkdir()
    (folder / "mine.yaml").write_text(_OWN.format(data=questions))
    (folder / "code.py").write_text("def prompt(doc):\n    return doc['goal']\n")
    text.write_bytes(Path(tiny_text.removeprefix("file:")).read_bytes().replace(b'"text"', b'"content"'))
    words = ["--tasks", f"file:{text}#content,mine", "--max-windows", "2", "--seq-len", "64", "--continuations", "0"]
    words += ["--limit", "6", "--device", "cpu", "--dtype", "float32", "-w", str(copied)]

    def measured(path: Path) -> Any:
        result = done("eval", *words, "--include-path", str(path))
        return result

    first = measured(folder)
    (view,) = [found for found in Workspace.open(copied).views("evaluation") if found.manifest.config["include_path"]]
    found = view.manifest.results["tasks"]
    assert list(found) == [f"file:{text}#content", "mine"]
    assert found["mine"]["models"]["dense"]["metrics"].keys() == {"acc"} and found["mine"]["examples"] == 6
    assert "is there already" in measured(folder.rename(tmp_path / "moved")).output
    assert "is there already" not in first.output
    (tmp_path / "moved" / "code.py").write_text("def prompt(doc):\n    return doc['goal'].upper()\n")
    changed = measured(tmp_path / "moved")
    assert "made with other settings (task_files_sha256)" in changed.output.replace("-", "_")
    broken = ara("eval", *words, "--include-path", str(tmp_path / "none"), "-q")
    assert broken.exit_code == 1 and "none does not exist" in broken.output
    compared = ara("compare", "--tasks", f"file:{text}", "-w", str(copied), "-q")
    assert compared.exit_code == 1 and "file:PATH#content" in compared.output


def test_the_pipeline_takes_tasks_of_the_user(
    tiny_llama: Path, tiny_text: str, tmp_path: Path, questions: Path
) -> None:
    """A task that the folder does not define is refused before the first stage."""
    folder, workspace = tmp_path / "own", tmp_path / "ws"
    folder.mkdir()
    (folder / "mine.yaml").write_text(_OWN.format(data=questions))
    (folder / "code.py").write_text("def prompt(doc):\n    return doc['goal']\n")
    words = ["run", str(tiny_llama), "--text", tiny_text, "--samples", "4", "--seq-len", "48", "--method", "energy"]
    words += ["--limit", "4", "--device", "cpu", "--dtype", "float32", "-w", str(workspace), "-q"]
    for refused in (
        ["mine"],
        ["yours", "--include-path", str(folder)],
        ["mine", "--include-path", str(tmp_path / "no")],
    ):
        result = ara(*words, "--tasks", *refused)
        assert result.exit_code == 1 and not workspace.exists(), result.output
    result = done(*words, "--tasks", "mine", "--include-path", str(folder))
    (view,) = Workspace.open(workspace).views("evaluation")
    assert view.manifest is not None and list(view.manifest.results["tasks"]) == ["mine"]
    assert view.manifest.config["include_path"] == [str(folder)]


def test_names_of_many_tasks_stay_short() -> None:
    tasks = tuple(f"a_task_with_a_long_name_{number}" for number in range(30))
    names = {result_name("ara-0.80", tasks[:count], {}, 5) for count in (29, 30)}
    assert len(names) == 2
    for name in names:
        assert check_name(name) == name and name.startswith("ara-0.80-") and name.endswith("-limit-5")
    assert result_name("ara-0.80", ("my task/1",), {}, None) == "ara-0.80-my_task_1"
