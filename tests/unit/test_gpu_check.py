"""``benchmarks/gpu_check``: every check on the CPU as stand-in, and what runs the checks and reports them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ara.errors import ModelError, UnavailableError
from ara.models.checkpoint import load
from ara.models.likelihood import nll_of_model
from ara.models.sources import resolve
from benchmarks.gpu_check import graphs, report, running, serving, speed, stages
from benchmarks.gpu_check.__main__ import main
from benchmarks.gpu_check.checks import BUDGET, CHECKS
from benchmarks.gpu_check.marked import run_tests
from benchmarks.gpu_check.outcome import Check, Notes, Outcome, outcome_of
from benchmarks.gpu_check.running import run_checks
from benchmarks.gpu_check.setting import REHEARSAL, Setting
from tests.gpu_checks import entry

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tiny_text: str, checkpoint: Callable[..., Any]) -> Setting:
    """Return the setting of a rehearsal on a tiny llama; the checks share its folder."""
    model = str(checkpoint("llama", None).folder)
    return Setting(device="cpu", model=model, text=tiny_text, workspace=tmp_path_factory.mktemp("gpu"), sizes=REHEARSAL)


def done(check: Check, setting: Setting) -> Outcome:
    """Run a check, which must pass."""
    outcome = outcome_of(check, setting, Notes())
    assert outcome.status == "passed", outcome.detail
    json.loads(outcome.model_dump_json())
    return outcome


# -- the checks ---------------------------------------------------------------------------------------------------


def test_stages_on_two_devices(setting: Setting) -> None:
    numbers = done(stages.stages, setting).numbers
    assert numbers["factorised layers"] == 21
    compared = {name: value for name, value in numbers.items() if isinstance(value, dict) and "tolerance" in value}
    differences = {name: value["difference"] for name, value in compared.items()}
    # Both devices are the CPU.
    assert differences and set(differences.values()) == {0}
    assert {"spectra", "trained ranks", "divergence after distill", "perplexity of dense"} <= differences.keys()


def changed(found: stages.Compressed, **changes: Any) -> stages.Compressed:
    return stages.Compressed(**{**vars(found), **changes})


def test_stages_that_differ() -> None:
    expected = stages.Compressed(
        {"x": torch.tensor([4.0, 1.0]), "y": torch.tensor([3.0])},
        {"x": 100},
        3.0,
        {"closed": (0.5, 0.4)},
        {"dense": 20.0},
    )
    one = expected.spectra["y"]
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("spectra", {"spectra": {"x": torch.tensor([4.0, 1.1]), "y": one}}),
        ("spectra", {"spectra": {"x": torch.tensor([4.0, math.nan]), "y": one}}),
        ("trained ranks", {"ranks": {"x": 97}}),
        ("loss of trained ranks", {"training_loss": 3.02}),
        ("divergence before closed", {"repaired": {"closed": (0.6, 0.4)}}),
        ("divergence after closed", {"repaired": {"closed": (0.5, 0.43)}}),
        ("perplexity of dense", {"perplexities": {"dense": math.nan}}),
    ]
    for name, changes in wrong:
        notes = Notes()
        stages.compare(changed(expected, **changes), expected, stages.Tolerance(), notes)
        assert [miss.partition(":")[0] for miss in notes.misses] == [name]
        assert notes.outcome(1.0).status == "failed"
        # Strict JSON, also with a NaN.
        assert "NaN" not in notes.outcome(1.0).model_dump_json()


def test_graphs(setting: Setting) -> None:
    numbers = done(graphs.parity, setting).numbers
    assert set(numbers) == set(graphs.FORMS)
    assert all(len(cases) == 4 for cases in numbers.values())
    assert done(graphs.binding, setting).numbers["devices of the caches"] == ["cpu"]


def test_graphs_that_differ(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph in another model's place is no match."""
    made = [graphs.graph_of(setting, form) for form in graphs.FORMS]
    dense = graphs.checkpoint_of(setting, "dense")
    monkeypatch.setattr(graphs, "checkpoint_of", lambda setting, form: dense)
    assert len(set(made)) == len(graphs.FORMS)
    outcome = outcome_of(graphs.parity, setting, Notes())
    assert outcome.status == "failed"
    assert "4 bits: prefill: largest difference" in outcome.detail and "dense" not in outcome.detail


def test_genai(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai (make setup installs it)")
    assert done(graphs.genai, setting).numbers["tokens"] > 0
    monkeypatch.setattr(graphs, "_continued_by_genai", lambda folder, read, new_tokens: [5, 6, 7])
    assert "below the most likely one" in outcome_of(graphs.genai, setting, Notes()).detail


def test_genai_of_the_wrong_build_is_not_run(setting: Setting) -> None:
    outcome = outcome_of(graphs.genai, setting.model_copy(update={"device": "cuda"}), Notes())
    assert outcome.status == "not run"
    assert "pip install --no-deps onnxruntime-genai-cuda" in outcome.detail


@pytest.mark.real_model
@pytest.mark.parametrize(("check", "runtime"), [(speed.in_torch, "torch"), (speed.in_onnx, "ONNX fp16")])
def test_speed(check: Check, runtime: str, setting: Setting) -> None:
    try:
        resolve("demo")
    except ModelError as error:
        pytest.skip(f"needs the demo model for its tokenizer: {error}")
    rows = done(check, setting).numbers["rows"]
    assert len(rows) == 2 * 5
    assert {row["runtime"] for row in rows} == {runtime}
    for row in rows:
        assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert row["model"] != "dense" or row["predicted"] == row["ratio"]["median"] == 1


class StandIn:
    """In place of ``VllmRuntime``: torch, with an error added to every loss."""

    def __init__(self, error: float = 0.0, device: str | None = "cpu") -> None:
        self.error, self._device = error, device

    def device(self) -> str:
        if self._device is None:
            raise UnavailableError("vLLM is not installed", "pip install it")
        return self._device

    @contextmanager
    def open(self, folder: Path, dtype: str) -> Iterator[Any]:
        model = load(folder, "cpu", "float32")
        yield SimpleNamespace(window_nlls=lambda windows: (nll_of_model(model, windows, 2) + self.error).tolist())


@pytest.mark.parametrize(
    ("runtime", "status", "words"),
    [
        (StandIn(), "passed", "2 comparisons within"),
        (StandIn(error=0.1), "failed", "loss of a window, factors: 0.1, allowed 0.02"),
        (StandIn(error=math.nan), "failed", "loss of a window, pivoted: nan"),
        (StandIn(device="cuda"), "not run", "this vLLM runs on cuda, and not on cpu"),
        (StandIn(device=None), "not run", "vLLM is not installed: docs/gpu.md says"),
    ],
    ids=["same", "differs", "nan", "other build", "missing"],
)
def test_vllm(runtime: StandIn, status: str, words: str, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "VllmRuntime", lambda: runtime)
    outcome = outcome_of(serving.vllm, setting, Notes())
    assert outcome.status == status and words in outcome.detail


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("assert True", "passed", "1 tests passed, 0 skipped"),
        ("assert False", "failed", "test_it failed"),
        ("pytest.skip('no such device')", "not run", "all 1 tests were skipped: no such device"),
        ("assert os.environ['ARA_TEST_DEVICE'] == 'cpu'", "passed", "1 tests passed"),
        ("def", "failed", "pytest ended with exit code 2"),
    ],
    ids=["passes", "fails", "skips", "gets the device", "cannot be read"],
)
def test_marked_tests(body: str, status: str, words: str, setting: Setting, tmp_path: Path) -> None:
    path = tmp_path / "test_one.py"
    path.write_text(f"import os\nimport pytest\n\n\n@pytest.mark.gpu\ndef test_it():\n    {body}\n")
    outcome = outcome_of(lambda setting, notes: run_tests(path, setting, notes), setting, Notes())
    assert outcome.status == status and words in outcome.detail


def test_every_test_marked_gpu_is_run() -> None:
    """The check runs tests/gpu alone, because collecting all others takes time that a lent GPU costs."""
    marked = [path for path in (REPOSITORY / "tests").rglob("*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    assert [path.name for path in marked if path.parent.name != "gpu"] == [Path(__file__).name]


# -- what runs them -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Return a function that runs stand-ins as ``make gpu-check`` does: exit code, results, what was printed."""

    def check(*names: str, seconds: float = 60, budget: float = 100) -> tuple[int, dict[str, Any], str]:
        file = tmp_path / "results" / "gpu.json"
        words = ["--device", "cpu", "--model", "tiny", "--seconds", str(budget), "--results", str(file)]
        code = main(words, [entry(name, seconds) for name in names])
        return code, json.loads(file.read_text()), capsys.readouterr().out

    return check


def test_all_outcomes_are_reported(run: Callable[..., Any]) -> None:
    code, results, out = run("passing", "failing", "raising", "missing", "dying")
    assert code == 1
    checks = results["checks"]
    assert {name: check["status"] for name, check in checks.items()} == {
        "passing": "passed",
        "failing": "failed",
        "raising": "failed",
        "missing": "not run",
        "dying": "failed",
    }
    assert checks["passing"]["numbers"] == {"difference": {"difference": 0.5, "tolerance": 1}, "device": "cpu"}
    assert checks["failing"]["detail"] == "difference: 2, allowed 1; layers: 3, expected 4"
    assert checks["raising"]["detail"] == "ValueError: the device"
    assert any("ValueError" in line for line in checks["raising"]["log"])
    assert checks["missing"]["detail"] == "no such package: pip install it"
    assert checks["dying"]["detail"] == "its process ended with exit code 3"
    assert checks["dying"]["numbers"] == {"before": 1}
    assert "1 passed, 3 failed, 1 not run" in out
    assert all(re.search(rf"^ *{name} +{checks[name]['status']} ", out, re.MULTILINE) for name in checks)
    assert results["rehearsal"] is True and results["gpu"] is None
    assert {"machine", "versions", "commit", "started", "seconds", "setting"} <= results.keys()
    assert all(check["seconds"] > 0 for check in checks.values())


def test_without_a_failure_the_exit_code_is_0(run: Callable[..., Any]) -> None:
    code, results, _ = run("passing", "missing")
    assert code == 0 and len(results["checks"]) == 2


def test_a_check_beyond_its_share_is_stopped(run: Callable[..., Any]) -> None:
    code, results, _ = run("hanging", seconds=4, budget=4)
    found = results["checks"]["hanging"]
    assert code == 1 and found["status"] == "failed"
    assert found["detail"] == "stopped after 4 s, its share of the time"
    # What it had found by then is kept.
    assert found["numbers"] == {"before": 1} and found["seconds"] < 60


def test_more_time_makes_every_share_longer(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def run_check(check: Any, setting: Setting, limit: float, python: str) -> Outcome:
        limits.append(limit)
        return Outcome(status="passed", detail="")

    monkeypatch.setattr(running, "run_check", run_check)
    for budget in (90, 180):
        list(run_checks([entry("passing", 30), entry("failing", 60)], setting, budget, clock=lambda: 0.0))
    assert limits == [30, 60, 60, 120]


def test_without_enough_time_a_check_is_not_started(setting: Setting) -> None:
    times = iter([0.0, 0.0, 80.0])
    (_, first), (_, second) = run_checks(
        [entry("passing", 60), entry("failing", 60)], setting, 100, clock=lambda: next(times)
    )
    assert first.status == "passed"
    assert second.status == "not run"
    assert second.detail == "20 of 100 s were left, and it may take 60 s"


def test_the_checks_fit_into_the_budget_and_leave_time_for_the_installation() -> None:
    *others, last = CHECKS
    assert sum(check.seconds for check in others) + last.seconds / 2 <= BUDGET <= 400
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        module, _, function = check.function.partition(":")
        assert f"def {function}(" in (REPOSITORY / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")


def test_vllm_runs_in_the_python_that_has_it(setting: Setting, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 7\n")
    python.chmod(0o755)
    (with_vllm,) = (check for check in CHECKS if check.with_vllm)
    ((_, outcome),) = run_checks([with_vllm], setting, BUDGET, str(python))
    assert outcome.detail == "its process ended with exit code 7"


def test_a_python_that_is_not_there_is_a_usage_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu", "--vllm-python", str(tmp_path / "none")], [entry("passing")])
    assert ended.value.code == 2
    assert f"--vllm-python {tmp_path / 'none'}: there is no such program" in capsys.readouterr().err


def test_without_a_gpu_one_line_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--results", str(tmp_path / "x.json")], [entry("passing")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: no check was run: device cuda was asked for") and "--device cpu" in err
    assert not (tmp_path / "x.json").exists()


def test_speeds_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    from ara_cli.console import Console

    values = {
        "case": {"batch": 2, "past": 0, "new": 64},
        "runtime": "torch",
        "model": "keep 0.8, factors",
        "seconds": 0.004,
        "ratio": {"median": 1.25, "low": 1.2, "high": 1.3},
        "predicted": 1.25,
    }
    outcome = Outcome(status="passed", detail="timed", seconds=3, numbers={"rows": [values]})
    report.summarise(Console(), [(entry("passing"), outcome)])
    out = capsys.readouterr().out
    assert "prefill 64, batch 2" in out and "1.25 (1.20 – 1.30)" in out
    assert "GPU check: 1 passed, 0 failed, 0 not run" in out
