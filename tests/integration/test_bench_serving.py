"""``ara bench --backend vllm`` with a fake runtime: requests, figures, results. tests/vllm has vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ara.artifacts.benchmark import BenchmarkResults, Percentiles
from ara.config import BenchConfig
from ara.errors import UsageError
from ara.evaluation.runtime import ServiceSize, Timing
from ara.models.checkpoint import read_config
from ara.reporting.document import Report
from ara.stages.bench import bench
from ara.stages.bench_serving import bench_serving
from ara.stages.common import Run
from tests.commands import done

NAME = "energy-0.70"
SETTINGS: dict[str, Any] = {"prompt_tokens": 20, "new_tokens": 10, "concurrency": (1, 3), "rounds": 6}


class Clockwork:
    """A runtime without models: the first one takes twice as long as the others.

    Attributes:
        prompts: per model, what it was asked.
        running: number of models that run; ``most`` is its maximum.
    """

    title = "Clockwork"

    def __init__(self, together: bool = True) -> None:
        self.together, self.running, self.most = together, 0, 0
        self.prompts: list[list[Sequence[Sequence[int]]]] = []
        self.sizes: list[ServiceSize] = []
        self.folders: list[Path] = []

    def device(self) -> str:
        return "cpu"

    def several_at_once(self, device: str) -> bool:
        return self.together

    @contextmanager
    def serve(self, folder: Path, dtype: str, size: ServiceSize) -> Iterator[Any]:
        assert read_config(folder) and dtype == "float32"
        self.folders.append(folder)
        self.sizes.append(size)
        self.prompts.append([])
        self.running += 1
        self.most = max(self.most, self.running)
        yield Served(self.prompts[-1], 4.0 if len(self.prompts) == 1 else 2.0)
        self.running -= 1


class Served:
    """A model of :class:`Clockwork`."""

    threads = 3

    def __init__(self, prompts: list[Sequence[Sequence[int]]], seconds: float) -> None:
        self.prompts, self.seconds = prompts, seconds

    def answer(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        assert new_tokens == SETTINGS["new_tokens"]
        self.prompts.append(prompts)
        return Timing(self.seconds, tuple(0.1 * (number + 1) for number in range(len(prompts))))

    def peak_memory(self) -> int:
        return 1 << 20


def _config(**changes: Any) -> BenchConfig:
    return BenchConfig(**{**SETTINGS, "dtype": "float32", "backend": "vllm", **changes})


def test_figures(copied: Path) -> None:
    runtime = Clockwork()
    view = bench_serving(_config(), Run(copied), runtime)
    results = BenchmarkResults.read(view)
    assert view.name == f"{NAME}-vllm" and not [path for path in view.path.iterdir() if path.is_dir()]
    assert (results.backend, results.device, results.threads, results.interleaved) == ("vllm", "cpu", 3, True)
    assert list(results.models) == ["dense", NAME] and results.cases == () and results.serving is not None
    assert results.models["dense"].parameters > results.models[NAME].parameters
    assert {row.peak_memory_bytes for row in results.models.values()} == {1 << 20}
    alone, three = results.serving
    assert (alone.requests, three.requests, three.prompt, three.new) == (1, 3, 20, 10)
    for case, (dense, chosen) in ((alone, (2.5, 5.0)), (three, (7.5, 15.0))):
        for name, speed in ("dense", dense), (NAME, chosen):
            assert case.models[name].output_tokens_per_second == Percentiles(speed, speed, speed)
        ratio = case.models[NAME].ratio
        assert ratio is not None and (ratio.low, ratio.median, ratio.high) == (2, 2, 2)
    assert three.models[NAME].first_token_seconds.median == pytest.approx(0.2)


def test_all_models_answer_the_same_prompts_and_each_round_has_its_own(copied: Path) -> None:
    runtime = Clockwork()
    bench_serving(_config(), Run(copied), runtime)
    dense, chosen = runtime.prompts
    assert dense == chosen and len(dense) == 2 * (6 + 1)
    assert [len(prompts) for prompts in dense] == [1] * 7 + [3] * 7
    every = [tuple(prompt) for prompts in dense for prompt in prompts]
    assert {len(prompt) for prompt in every} == {20} and len(set(every)) == len(every)
    config = read_config(copied / "truncate" / NAME / "checkpoint")
    (size, _again) = runtime.sizes
    numbers = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    assert size == ServiceSize(3, 30, 4 * numbers * 3 * 30)


def test_one_after_the_other_gives_no_ratio(copied: Path) -> None:
    runtime = Clockwork(together=False)
    results = BenchmarkResults.read(bench_serving(_config(), Run(copied), runtime))
    assert runtime.most == 1 and not results.interleaved and results.serving is not None
    assert all(row.ratio is None for case in results.serving for row in case.models.values())


def test_tables(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.targets.runtime_of", lambda backend: Clockwork())
    words = ["--backend", "vllm", "--concurrency", "1,3", "--prompt-tokens", 20, "--new-tokens", 10, "--rounds", 6]
    shown = done("bench", *words, "--dtype", "float32", "-w", copied).output
    assert "Requests: prompts of 20 tokens, answers of 10; models in turn, medians of 6 rounds" in shown
    assert "15.0 (15.0 – 15.0)" in shown and "2.00 (2.00 – 2.00)" in shown
    assert "2.00 to 2.00 times as fast as dense (vllm)" in done("status", "-w", copied).output
    done("report", "-w", copied)
    (folder,) = (copied / "report").iterdir()
    report = Report.model_validate_json((folder / "report.json").read_text(encoding="utf-8"))
    (found,) = [one for one in report.benches if one.backend == "vllm"]
    assert [case.requests for case in found.serving] == [1, 3]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Requests with prompts of 20 tokens and answers of 10" in page and "200.0 (200.0 – 200.0)" in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode": (64,), "threads": 1}, "--decode, --threads cannot be combined with --backend vllm"),
        ({"device": "cuda"}, "--device cuda is given, and Clockwork runs on cpu"),
        ({"prompt_tokens": 9_000}, r"--prompt-tokens plus --new-tokens 9010 is more than the \d+ positions"),
    ],
)
def test_what_is_refused(copied: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench_serving(_config(**changes), Run(copied), Clockwork())


def test_other_backends_refuse_the_options_of_requests(copied: Path) -> None:
    with pytest.raises(UsageError, match="--new-tokens cannot be combined with --backend torch"):
        bench(BenchConfig(new_tokens=7), Run(copied))
