"""``ara eval`` in a runtime that reads checkpoint folders: the figures of torch, resumed, refusals in one line.

The runtime of these tests is torch; tests/vllm measures with vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ara.artifacts.evaluation import EvaluationResults
from ara.config import EvalConfig
from ara.distributed.group import ALONE
from ara.errors import ModelError, NumericalError, UsageError
from ara.evaluation import harness
from ara.evaluation.generation import greedy_tokens, stop_tokens
from ara.models.checkpoint import load, load_tokenizer
from ara.models.likelihood import window_nll
from ara.stages.common import Run
from ara.stages.evaluate import evaluate
from tests.commands import ara, refused
from tests.questions import write_questions
from tests.tiny import story

NAME = "energy-0.70"
MODELS = ["dense", "uniform", NAME]


class InTorch:
    """A runtime that loads folders in torch.

    Args:
        broken: number of the model that cannot be loaded.
    """

    title, spare_positions = "Torch", 1

    def __init__(self, broken: int | None = None) -> None:
        self.broken, self.opened = broken, list[Path]()

    def device(self) -> str:
        return "cpu"

    @contextmanager
    def open(self, folder: Path, dtype: str) -> Iterator[Any]:
        self.opened.append(folder)
        if len(self.opened) == self.broken:
            raise ModelError("it does not like this one")
        yield Running(folder, dtype)


class Running:
    """A model of :class:`InTorch`."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.model, self.tokenizer = load(folder, "cpu", dtype), load_tokenizer(folder)

    def window_nlls(self, windows: torch.Tensor) -> list[float]:
        with torch.no_grad():
            found: list[float] = window_nll(self.model(input_ids=windows).logits, windows).tolist()
        return found

    def continuation(self, ids: list[int], max_new_tokens: int) -> list[int]:
        return list(greedy_tokens(self.model, torch.tensor(ids), max_new_tokens, stop_tokens(self.model)))

    def harness(self, report: Any, label: str) -> Any:
        return harness._wrapped(self.model, self.tokenizer, 1, report, label, ALONE)


@pytest.fixture(autouse=True)
def questions(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path_factory.mktemp("local")
    monkeypatch.setenv("ARA_CACHE_DIR", str(root / "cache"))
    monkeypatch.setenv("ARA_DATA_DIR", str(write_questions(root / "data")))


def _config(tiny_text: str, backend: str = "vllm", **changes: Any) -> EvalConfig:
    values = {"tasks": (tiny_text, "piqa"), "seq_len": 64, "max_windows": 3, "limit": 8, "max_new_tokens": 3}
    return EvalConfig(**{**values, "dtype": "float32", "backend": backend, **changes})


def test_figures_are_those_of_torch(copied: Path, tiny_text: str) -> None:
    expected = EvaluationResults.read(evaluate(_config(tiny_text, "torch", device="cpu"), Run(copied)))
    runtime = InTorch()
    view = evaluate(_config(tiny_text), Run(copied), runtime=runtime)
    found = EvaluationResults.read(view)
    assert list(found.variants) == MODELS and len(runtime.opened) == 3
    assert found.variants == expected.variants
    assert found.continuations == expected.continuations
    assert found.harness == expected.harness and found.zero_shot == expected.zero_shot
    for name in MODELS:
        ours, theirs = found.texts[tiny_text].models[name], expected.texts[tiny_text].models[name]
        assert ours.window_nlls == pytest.approx(theirs.window_nlls, rel=1e-6)
        assert ours.divergence is None
    assert not found.interleaved and (found.runtime, expected.runtime) == ("Torch", None)
    assert view.name == f"{NAME}-{story()}-piqa-limit-8-vllm"
    # Dense and uniform were written for the measurement only.
    assert not [path for path in view.path.iterdir() if path.is_dir()]
    assert not any(folder.exists() for folder in runtime.opened[:2]) and runtime.opened[2].is_dir()


def test_finished_models_are_not_measured_again(copied: Path, tiny_text: str) -> None:
    with pytest.raises(ModelError, match="does not like"):
        evaluate(_config(tiny_text), Run(copied), runtime=InTorch(broken=2))
    runtime = InTorch()
    evaluate(_config(tiny_text), Run(copied), runtime=runtime)
    assert len(runtime.opened) == 2


def test_nan_names_the_model(copied: Path, tiny_text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Running, "window_nlls", lambda self, windows: [float("nan")] * len(windows))
    with pytest.raises(NumericalError, match="model 'dense' gives a negative log-likelihood of nan on window 0"):
        evaluate(_config(tiny_text), Run(copied), runtime=InTorch())


def test_a_window_leaves_the_position_that_the_runtime_needs(copied: Path, tiny_text: str) -> None:
    config = json.loads((copied / "truncate" / NAME / "checkpoint" / "config.json").read_text())
    limit = config["max_position_embeddings"]
    with pytest.raises(UsageError, match=f"{limit} positions of the model, of which 1 must stay free") as caught:
        evaluate(_config(tiny_text, seq_len=limit), Run(copied), runtime=InTorch())
    assert caught.value.hint == f"use at most {limit - 1}"
    view = evaluate(_config(tiny_text, seq_len=None, tasks=(tiny_text,)), Run(copied), runtime=InTorch())
    assert EvaluationResults.read(view).texts[tiny_text].seq_len == limit - 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("piqa", "chat:said.jsonl")}, "measures texts and tasks of lm-eval; chat:said.jsonl are"),
        ({"device": "cuda:1"}, "--device cuda:1 is given, and Torch runs on cpu"),
    ],
)
def test_what_a_runtime_cannot_do(
    copied: Path, tiny_text: str, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copied)
    Path("said.jsonl").write_text('{"prompt": "Hello"}\n')
    with pytest.raises(UsageError, match=message):
        evaluate(_config(tiny_text, **changes), Run(copied), runtime=InTorch())


def test_a_runtime_loads_weights_itself(copied: Path, tiny_text: str) -> None:
    with pytest.raises(UsageError, match="--offload disk is given, and Torch loads the whole model itself"):
        evaluate(_config(tiny_text), Run(copied, offload="disk"), runtime=InTorch())


def test_without_vllm_one_line_says_what_to_install(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.vllm.runtime.find_spec", lambda name: None)
    result = ara("eval", "--tasks", "piqa", "--backend", "vllm", "-w", str(copied), "-q")
    said = refused(result, 1, "--backend vllm needs vLLM, which is not installed")
    assert "pip install 'ara-svd[vllm]'" in said


def test_an_export_is_no_matter_of_a_runtime(copied: Path) -> None:
    result = ara("eval", "--export", "mine", "--backend", "vllm", "-w", str(copied), "-q")
    refused(result, 2, "--export mine is given, and --backend is vllm")
    refused(
        ara("eval", "--backend", "vlm", "-w", str(copied), "-q"), 2, "'torch', 'onnx' or 'vllm', got 'vlm'", hint=False
    )
