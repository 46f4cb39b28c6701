"""``ara eval --backend vllm``: the same windows, questions and answers as in torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ara.artifacts.evaluation import EvaluationResults
from ara.config import EvalConfig
from ara.errors import ModelError
from ara.stages.common import Run
from ara.stages.evaluate import evaluate
from ara.workspace.store import Workspace
from tests.commands import done
from tests.questions import write_questions

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
pytestmark = pytest.mark.timeout(900)
CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
# Chosen by likelihood, and perplexity of whole documents.
TASKS = ("piqa", "wikitext")


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path_factory.mktemp("local")
    monkeypatch.setenv("ARA_CACHE_DIR", str(root / "cache"))
    monkeypatch.setenv("ARA_DATA_DIR", str(write_questions(root / "data")))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def test_figures_are_those_of_torch(root: Path, tiny_text: str) -> None:
    asked = {"seq_len": 64, "max_windows": 3, "limit": 6, "continuations": 1, "max_new_tokens": 8}
    expected = EvaluationResults.read(
        evaluate(EvalConfig(tasks=(tiny_text, *TASKS), **asked, **CPU), Run(root))  # type: ignore[arg-type]
    )
    words = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", value)]
    said = done(
        "eval", "--tasks", ",".join((tiny_text, *TASKS)), *words, "--dtype", "float32", "--backend", "vllm", "-w", root
    )
    assert "one after the other" in said.output
    (view,) = [view for view in Workspace(root).views("evaluation") if view.name.endswith("-vllm")]
    found = EvaluationResults.read(view)
    assert found.continuations == expected.continuations
    for name in expected.variants:
        ours, theirs = found.variants[name], expected.variants[name]
        assert (ours.parameters, ours.weight_bytes) == (theirs.parameters, theirs.weight_bytes)
        assert found.texts[tiny_text].models[name].window_nlls == pytest.approx(
            expected.texts[tiny_text].models[name].window_nlls, abs=1e-5
        )
        for task in TASKS:
            row, other = found.harness[task].models[name], expected.harness[task].models[name]
            assert row.metrics == pytest.approx(other.metrics, rel=1e-4)
    assert found.harness["piqa"].compared.keys() == {"dense", "uniform"}
    assert likelihoods(root, "-vllm") == pytest.approx(likelihoods(root, "-limit-6"), abs=1e-4)


def likelihoods(root: Path, end: str) -> list[float]:
    """Return the log-likelihoods of all choices of piqa, of all models."""
    (folder,) = (root / "eval").glob(f"*{end}")
    answers = [json.loads(path.read_text())["answers"] for path in sorted(folder.glob("*-piqa.*.json"))]
    return [value for rows in answers for row in rows for value, _greedy in row["responses"]]


def test_a_model_that_vllm_cannot_run_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.vllm.runtime import VllmRuntime

    folder = next((root / "truncate").iterdir()) / "checkpoint"
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    runtime = VllmRuntime()
    with (
        pytest.raises(ModelError, match=f"vLLM cannot run {folder}: .*has ARA format 99"),
        runtime.open(folder, "float32"),
    ):
        pass
