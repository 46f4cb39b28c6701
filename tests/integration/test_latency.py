"""``ara allocate --objective latency``: ranks for a share of the layers' time; only made-up times are looked at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ara.artifacts.comparison import ComparisonResults
from ara.artifacts.factors import specs_of
from ara.artifacts.ranks import RanksResults, read_allocation
from ara.config import AllocateConfig, CompareConfig, DecomposeConfig, TruncateConfig
from ara.errors import UsageError
from ara.models.weights import LinearSpec
from ara.stages import latency
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.compare import compare
from ara.stages.run import run_pipeline
from ara.workspace.store import Workspace
from ara.workspace.view import StageView
from tests.commands import ara, done, refused
from tests.layer_times import FakeLayers, by_parameters
from tests.recorder import Recorder

FEW = {"samples": 6, "held_out": 4, "device": "cpu", "dtype": "float32"}
CPU = ("--samples", 6, "--held-out", 4, "--device", "cpu", "--dtype", "float32")
# (92, 60) and (60, 92) are the wide layers of the tiny model.
SLOW = (60, 92)


def slow_down(spec: LinearSpec, rank: int | None) -> float:
    """Return times with which low rank never pays in one shape."""
    return 2e-5 if (spec.m, spec.n) == SLOW and rank is not None else by_parameters(spec, rank)


def chosen(root: Path, layers: FakeLayers, *, run: Run | None = None, **settings: Any) -> StageView:
    config = AllocateConfig(**{**FEW, "objective": "latency", "keep": 0.7, "method": "sensitivity", **settings})
    return allocate(config, run or Run(root), layers=layers)


def figures(view: StageView) -> tuple[RanksResults, Any]:
    results = RanksResults.read(view)
    assert results.latency is not None
    return results, results.latency


@pytest.mark.parametrize("method", ["sensitivity", "uniform"])
def test_the_predicted_time_is_within_the_share_and_slow_layers_stay_dense(method: str, copied: Path) -> None:
    view = chosen(copied, FakeLayers(slow_down), method=method)
    results, times = figures(view)
    assert view.name == f"{method}-latency-0.70"
    specs = specs_of(Workspace.open(copied).view("decompose/two-sided"), "factors")
    ranks = read_allocation(view, specs).ranks
    assert all(ranks[spec.name] is None for spec in specs if (spec.m, spec.n) == SLOW)
    assert any(rank is not None for rank in ranks.values())
    # What was made up is linear in the rank, so the prediction is exact but for whole nanoseconds.
    assert times.dense_ns == pytest.approx(1e9 * sum(slow_down(spec, None) for spec in specs), abs=len(specs))
    predicted = 1e9 * sum(slow_down(spec, ranks[spec.name]) for spec in specs)
    assert times.predicted_ns == pytest.approx(predicted, abs=len(specs))
    assert 0.67 * times.dense_ns < times.predicted_ns <= times.limit_ns == int(0.7 * times.dense_ns + 1e-6)
    assert results.linear_keep == read_allocation(view, specs).keep(specs)
    assert json.loads((view.path / "ranks.json").read_text())["about"]["method"] == method


def test_the_guard_compares_with_uniform_ranks_of_the_same_time(copied: Path) -> None:
    results, _ = figures(chosen(copied, FakeLayers(by_parameters)))
    assert results.guard is not None and set(results.guard.held_out) == {"dense", "sensitivity", "uniform"}


def test_everything_is_dense_at_keep_1(copied: Path) -> None:
    results, times = figures(chosen(copied, FakeLayers(by_parameters), keep=1.0))
    assert results.linear_keep == 1 and times.share == 1


def test_ranks_for_a_share_of_parameters_take_more_than_this_share_of_time(copied: Path) -> None:
    layers = FakeLayers(slow_down)
    _, times = figures(chosen(copied, layers, guard=False))
    plain = allocate(AllocateConfig(**FEW, keep=0.7, method="sensitivity", guard=False), Run(copied))
    specs = specs_of(Workspace.open(copied).view("decompose/two-sided"), "factors")
    other = 1e9 * sum(slow_down(spec, rank) for spec, rank in zip(specs, _ranks(plain, specs), strict=True))
    assert times.predicted_ns <= 0.7 * times.dense_ns < other


def _ranks(view: StageView, specs: list[LinearSpec]) -> list[int | None]:
    return [read_allocation(view, specs).ranks[spec.name] for spec in specs]


def test_measured_times_are_kept_for_the_same_machine_and_settings(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = FakeLayers(by_parameters)
    view = chosen(copied, first)
    shapes = len(figures(view)[1].shapes)
    assert len(first.asked) == len(set(first.asked)) > 5 * shapes and {tokens for *_, tokens in first.asked} == {128}
    # The same settings: nothing is done. Another budget: the ranks are new, the times are not.
    again = FakeLayers(slow_down)
    assert chosen(copied, again).manifest == view.manifest
    report = Recorder()
    other = chosen(copied, again, keep=0.8, run=Run(copied, report=report))
    assert again.asked == [] and figures(other)[1].shapes == figures(view)[1].shapes
    assert any(text.startswith("table of times read from") for text in report.facts)
    for changed in ({"latency_tokens": 1}, {"rank_multiple": 4}, {"layout": "pivoted"}):
        new = FakeLayers(by_parameters)
        chosen(copied, new, **changed)
        assert new.asked
    # --force measures again, and what it has measured is kept from then on.
    forced = FakeLayers(slow_down)
    chosen(copied, forced, run=Run(copied, force=True))
    assert forced.asked
    later = FakeLayers(by_parameters)
    assert figures(chosen(copied, later, keep=0.9))[1].shapes != figures(view)[1].shapes and later.asked == []
    # Another library, or another machine.
    newer = FakeLayers(by_parameters, "fake 2.0")
    assert chosen(copied, newer).manifest != view.manifest and newer.asked
    about = {**latency.machine(), "processor": "another one"}
    monkeypatch.setattr(latency, "machine", lambda: about)
    moved = FakeLayers(by_parameters, "fake 2.0")
    found = chosen(copied, moved)
    assert moved.asked and found.manifest is not None
    assert found.manifest.config["latency_machine"] == f"another one, {about['cores']} cores; fake 2.0"


def test_a_damaged_table_is_replaced(copied: Path) -> None:
    chosen(copied, FakeLayers(by_parameters), method="uniform")
    (path,) = (copied / "cache" / "tables").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    report, layers = Recorder(), FakeLayers(by_parameters)
    chosen(copied, layers, method="uniform", keep=0.8, run=Run(copied, report=report))
    assert layers.asked and any("discarding the damaged table of times" in text for text in report.warnings)


def test_learned_losses_are_priced_in_time(learned: Path) -> None:
    view = chosen(learned, FakeLayers(slow_down), method="auto", keep=0.75)
    results, times = figures(view)
    assert view.name == "ara-latency-0.75"
    assert times.predicted_ns <= times.limit_ns and results.guard is not None
    assert results.kinds["mlp.down_proj"].dense == results.kinds["mlp.down_proj"].layers


@pytest.mark.parametrize(
    "backend", [(), ("--latency-backend", "onnx"), ("--latency-backend", "onnx", "--latency-precision", "int8")]
)
def test_layers_are_timed_on_this_machine(
    backend: tuple[str, ...], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "_ROUNDS", 2)
    monkeypatch.setattr(latency, "_RANKS", 3)
    words = (
        "--objective",
        "latency",
        "--latency-tokens",
        3,
        "--method",
        "uniform",
        "--keep",
        1,
        *backend,
        "-w",
        copied,
    )
    result = done("allocate", *CPU, *words)
    assert "predicted time of these layers: 100.00% of dense" in result.stdout
    name = "-".join(
        ["uniform-latency", *(["onnx", backend[-1]] if len(backend) > 2 else ["onnx", "fp32"] if backend else [])]
    )
    _, times = figures(Workspace.open(copied).view(f"allocate/{name}-3tokens-1.00"))
    assert (times.backend, times.tokens) == ("onnx" if backend else "torch", 3)
    done("truncate", "-w", copied)


def reported(root: Path) -> tuple[dict[str, Any], str]:
    """Return the document and the page of a new report."""
    done("report", "-w", root)
    (folder,) = (root / "report").glob("*/")
    return json.loads((folder / "report.json").read_text()), (folder / "report.html").read_text()


def test_a_report_tells_a_share_of_time_from_one_of_parameters(copied: Path) -> None:
    results, times = figures(chosen(copied, FakeLayers(by_parameters)))
    done("truncate", "-w", copied)
    document, page = reported(copied)
    ranks = document["allocation"]
    assert ranks["keep"] is None and ranks["linear_keep"] == results.linear_keep
    assert ranks["latency"]["predicted_ns"] == times.predicted_ns and "shapes" not in ranks["latency"]
    assert "predicted time of the factorised layers, ms (128 tokens; fake" in page


def test_allocators_are_compared_at_equal_time(copied: Path) -> None:
    config = CompareConfig(**FEW, objective="latency", keep=0.7, tasks=("python-docs",), max_windows=2, eval_seq_len=32)
    view = compare(config, Run(copied), layers=FakeLayers(slow_down))
    methods = ComparisonResults.read(view).methods
    assert view.name == "latency-0.70" and set(methods) == {"dense", "ara", "sensitivity", "uniform"}
    shares = {name: row.time_keep for name, row in methods.items()}
    assert shares.pop("dense") is None
    assert all(share is not None and 0.67 < share <= 0.7 for share in shares.values()), shares
    specs = specs_of(Workspace.open(copied).view("decompose/two-sided"), "factors")
    slow = [spec.name for spec in specs if (spec.m, spec.n) == SLOW]
    for name in shares:
        ranks = methods[name].ranks
        assert ranks is not None and {ranks[layer] for layer in slow} == {"dense"}
    done("truncate", "-w", copied)
    document, page = reported(copied)
    (compared,) = document["comparisons"]
    assert compared["objective"] == "latency" and compared["methods"]["uniform"]["time_keep"] == shares["uniform"]
    assert "latency-0.70: keep 0.7 of the time" in page and "predicted time" in page


def test_a_comparison_of_parameters_has_no_settings_of_time(copied: Path) -> None:
    texts: dict[str, Any] = {"tasks": ("python-docs",), "max_windows": 1, "eval_seq_len": 32}
    view = compare(CompareConfig(**FEW, **texts, methods=("uniform",)), Run(copied))
    assert view.manifest is not None
    assert not [key for key in view.manifest.config if key == "objective" or key.startswith("latency")]
    assert all(row.time_keep is None for row in ComparisonResults.read(view).methods.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "energy"), "--method energy does not support --objective latency"),
        (("--size", "60KB"), "--size and --objective are given together"),
    ],
)
def test_a_comparison_in_time_of_what_has_none_is_refused(words: Any, message: str, finished: Path) -> None:
    result = ara("compare", "-q", *CPU, "--objective", "latency", *words, "-w", finished)
    refused(result, 2, message, hint=False)


def test_the_whole_pipeline_takes_a_budget_of_time(tiny_llama: Path, tmp_path: Path) -> None:
    shared = {"device": "cpu", "dtype": "float32"}
    factors = DecomposeConfig(model=str(tiny_llama), text="python-docs", samples=4, seq_len=32, **shared)
    budgets = [AllocateConfig(**FEW, objective="latency", method="uniform", keep=keep) for keep in (0.7, 0.9)]
    layers = FakeLayers(by_parameters)
    views = run_pipeline(factors, budgets, {"truncate": TruncateConfig()}, Run(tmp_path / "ws"), layers)
    assert [view.key for view in views] == [
        "decompose/two-sided",
        *(f"{stage}/uniform-latency-{keep}" for keep in ("0.70", "0.90") for stage in ("allocate", "truncate")),
    ]


def test_run_refuses_a_budget_of_time_before_it_decomposes(tiny_llama: Path, tmp_path: Path) -> None:
    words = ("--objective", "latency", "--method", "energy", "--no-eval", "-w", tmp_path / "ws")
    refused(ara("run", "-q", tiny_llama, *words), 2, "--method energy does not support --objective latency")
    assert not list((tmp_path / "ws" / "decompose").glob("*"))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--latency-tokens", 1), 2, "--latency-tokens 1 is given without --objective latency"),
        (("--latency-backend", "onnx"), 2, "--latency-backend onnx is given without --objective latency"),
        (("--objective", "latency", "--size", "60KB"), 2, "--objective latency and --size 60KB are given together"),
        (("--objective", "latency", "--method", "energy"), 2, "--method energy does not support --objective latency"),
        (("--objective", "latency", "--method", "gumbel"), 2, "--method gumbel does not support --objective latency"),
        (
            ("--objective", "latency", "--latency-backend", "tvm"),
            2,
            "latency-backend: input should be 'torch' or 'onnx'",
        ),
        (("--objective", "latency", "--latency-precision", "int8"), 2, "--latency-backend is torch"),
        (("--objective", "latency", "--latency-threads", 65536), 2, "--latency-threads 65536 is more than the"),
        (("--objective", "latency", "--device", "mps"), 2, "device mps was asked for"),
        (("--objective", "latency", "--method", "uniform", "--device", "cuda:99"), 2, "device cuda:99 was asked for"),
        (("--objective", "speed"), 2, "objective"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(words: Any, code: int, message: str, finished: Path) -> None:
    refused(ara("allocate", "-q", *CPU, *words, "-w", finished), code, message, hint=False)


def test_a_ranks_file_gives_every_rank(finished: Path) -> None:
    path = finished / "allocate" / "energy-0.70" / "ranks.json"
    result = ara("allocate", "-q", "--ranks", path, "--objective", "latency", "-w", finished)
    refused(result, 2, "--ranks FILE and --objective are both given")


def test_a_share_that_no_rank_reaches_is_refused(copied: Path) -> None:
    before = sorted(path.name for path in (copied / "allocate").iterdir())
    with pytest.raises(UsageError, match=r"keep 0\.7 allows .* nanoseconds, but the fastest choices"):
        chosen(copied, FakeLayers(lambda spec, rank: 1e-5 if rank is None else 2e-5))
    assert sorted(path.name for path in (copied / "allocate").iterdir()) == before


def test_a_training_of_the_papers_form_is_refused(learned_base: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(learned_base, tmp_path / "ws"))
    done("train-masks", "--objective", "paper", "--name", "paper", "--keep", 0.7, *CPU, "--steps", 1, "-w", root)
    with pytest.raises(UsageError, match="the paper's form has no losses of ranks"):
        config = AllocateConfig(**FEW, objective="latency", keep=0.7, method="ara")
        allocate(config, Run(root), layers=FakeLayers(by_parameters), masks="paper")
