"""``ara bench`` on tiny models: what is counted, what is left on the disk, what is refused; nothing of how fast."""

from __future__ import annotations

import json
import pickle
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ara.config import AllocateConfig, BenchConfig, DecomposeConfig, TruncateConfig
from ara.environment import machine
from ara.errors import UnavailableError
from ara.evaluation.cost import Case, count_model
from ara.evaluation.speed import TorchRunner
from ara.models.checkpoint import load
from ara.stages import bench as stage
from ara.stages.common import Run
from ara.stages.run import run_pipeline
from ara.workspace.store import Workspace
from export.onnx.runner import OnnxDecoder
from tests.commands import ara, done, refused
from tests.damage import contents, listing
from tests.tiny import tiny_model

NAME = "energy-0.70"
SHORT = ["--prefill", "7,19", "--decode", 23, "--batch", "1,3", "--rounds", 6]
CPU = ["--device", "cpu", "--dtype", "float32"]
PEAK = 123_456_789


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, list[Case]]]:
    """Save the time of further processes, and note what they would have got; it must survive being sent."""
    asked: list[tuple[Any, list[Case]]] = []

    def peak_memory(load: Any, cases: list[Case]) -> int:
        asked.append((pickle.loads(pickle.dumps(load)), cases))
        return PEAK

    monkeypatch.setattr(stage, "peak_memory", peak_memory)
    return asked


@pytest.fixture(scope="module")
def exported_base(checkpoint: Callable[..., Any], tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace whose checkpoint was exported; only to be read."""
    root = tmp_path_factory.mktemp("bench") / "ws"
    export_to(root, checkpoint("llama", None).folder, tiny_text, layout="pivoted")
    return root


def export_to(root: Path, model: Path, text: str, **settings: Any) -> None:
    calibration = {"text": text, "samples": 12, "seq_len": 48, "device": "cpu", "dtype": "float32"}
    run_pipeline(
        DecomposeConfig(model=str(model), **calibration),
        [AllocateConfig(keep=0.7, method="energy", **settings)],
        {"truncate": TruncateConfig()},
        Run(root),
    )
    done("export", "--execution-provider", "cpu", "--no-parity", "-w", root, "-q")


@pytest.fixture
def exported(exported_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported_base, tmp_path / "exported"))


def test_dense_and_chosen_are_measured_and_counted(copied: Path, peaks: list[tuple[Any, list[Case]]]) -> None:
    document = json.loads(done("bench", *SHORT, *CPU, "--threads", 1, "-w", copied, "--json").stdout)
    folder = copied / "bench" / f"{NAME}-torch"
    assert listing(folder) == {"manifest.json", "results.json"}
    results = document["results"]
    assert json.loads((folder / "results.json").read_text()) == results
    assert [parent["key"] for parent in document["parents"]] == [f"truncate/{NAME}", "decompose/two-sided"]
    assert document["config"]["device"] == "cpu" and document["config"]["threads"] == 1
    assert {key: results[key] for key in ("chosen", "backend", "device", "precision", "threads", "interleaved")} == {
        "chosen": NAME,
        "backend": "torch",
        "device": "cpu",
        "precision": "float32",
        "threads": 1,
        "interleaved": True,
    }
    assert results["machine"] == machine()
    made = Workspace.open(copied).view(f"truncate/{NAME}").manifest
    assert made is not None
    sizes, total = made.results, sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    assert results["models"] == {
        "dense": {
            "parameters": total,
            "weight_bytes": 4 * total,
            "disk_bytes": sizes["dense_weight_bytes"],
            "peak_memory_bytes": PEAK,
        },
        NAME: {
            "parameters": sizes["parameters"],
            "weight_bytes": sizes["weight_bytes"],
            "disk_bytes": sizes["disk_bytes"],
            "peak_memory_bytes": PEAK,
        },
    }
    assert list(results["models"]) == ["dense", NAME]
    cases = [Case(b, 0, n) for n in (7, 19) for b in (1, 3)] + [Case(b, 23, 1) for b in (1, 3)]
    assert [Case(c["batch"], c["past"], c["new"]) for c in results["cases"]] == cases
    models = {"dense": tiny_model("llama"), NAME: load(copied / "truncate" / NAME / "checkpoint", "cpu")}
    costs = {name: count_model(model, last_logits=True) for name, model in models.items()}
    for case, row in zip(cases, results["cases"], strict=True):
        assert row["kind"] == ("decode" if case.past else "prefill")
        for name, figures in row["models"].items():
            assert figures["macs"] == costs[name].macs(case)
            assert figures["bytes_read"] == costs[name].bytes_read(case)
            for key in ("seconds", "tokens_per_second"):
                assert 0 < figures[key]["p10"] <= figures[key]["median"] <= figures[key]["p90"]
            assert 0 < figures["ratio"]["low"] <= figures["ratio"]["median"] <= figures["ratio"]["high"]
        assert row["models"]["dense"]["predicted"] == 1 < row["models"][NAME]["predicted"]
    # What another process would load are these models, and it would run the largest prompts and the longest past.
    assert [cases for _, cases in peaks] == [[Case(3, 0, 19), Case(3, 23, 1)]] * 2
    assert [load_one().parameters for load_one, _ in peaks] == [total, sizes["parameters"]]


def test_figures_are_shown_and_measured_once(copied: Path, peaks: list[tuple[Any, list[Case]]]) -> None:
    words = ["bench", *SHORT, *CPU, "-w", copied]
    result = done(*words)
    for word in ("prefill 19, batch 3", "decode at 23, batch 1", NAME, "predicted", "peak memory (MiB)", "117.7"):
        assert word in result.stdout, word
    assert f"Saved in {copied}" in result.stderr
    first = contents(copied / "bench")
    again = done(*words)
    assert "is there already" in again.stderr and again.stdout == result.stdout
    assert contents(copied / "bench") == first
    done(*words, "--force")
    assert contents(copied / "bench") != first
    other = done(*words, "--rounds", 7)
    assert "warning: replacing bench/energy-0.70-torch, which was made with other settings (rounds)" in other.stderr
    row = next(line for line in done("status", "-w", copied).stdout.splitlines() if line.startswith(" bench"))
    assert "done" in row and "times as fast as dense (torch)" in row


def test_threads_are_as_before_afterwards(copied: Path, peaks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    before, during = torch.get_num_threads(), set()
    original = stage.interleaved_seconds

    def watched(*arguments: Any, **options: Any) -> Any:
        during.add(torch.get_num_threads())
        return original(*arguments, **options)

    monkeypatch.setattr(stage, "interleaved_seconds", watched)
    config = BenchConfig(prefill=(5,), decode=(), batch=(1,), rounds=6, threads=3, device="cpu", dtype="float32")
    stage.bench(config, Run(copied), name="three")
    assert during == {3}
    assert torch.get_num_threads() == before


def test_models_that_do_not_fit_together_are_alone_in_memory(
    copied: Path, peaks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[TorchRunner] = weakref.WeakSet()
    most = []
    original = stage.interleaved_seconds

    def watched(runners: Any, *arguments: Any, **options: Any) -> Any:
        alive.update(runners.values())
        most.append(len(alive))
        return original(runners, *arguments, **options)

    monkeypatch.setattr(stage, "interleaved_seconds", watched)
    monkeypatch.setattr("ara.stages.common.available_bytes", lambda device: 1)
    result = done("bench", *SHORT, *CPU, "-w", copied, "--json")
    assert "2 models do not fit into" in result.stderr
    results = json.loads(result.stdout)["results"]
    assert not results["interleaved"] and set(most) == {1}
    assert [list(case["models"]) for case in results["cases"]] == [["dense", NAME]] * 6
    # Rounds that were apart are no pairs.
    assert {row["ratio"] for case in results["cases"] for row in case["models"].values()} == {None}
    assert "prefill 19, batch 3" in done("bench", *SHORT, *CPU, "-w", copied).stdout
    assert "speeds that cannot be compared with dense (torch)" in done("status", "-w", copied).stdout


def test_memory_that_cannot_be_measured_is_told_and_left_out(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(load: Any, cases: list[Case]) -> int:
        raise UnavailableError("the peak memory cannot be measured: no reason")

    monkeypatch.setattr(stage, "peak_memory", unavailable)
    result = done("bench", *SHORT, *CPU, "-w", copied, "--json")
    assert result.stderr.count("the peak memory cannot be measured: no reason") == 2
    models = json.loads(result.stdout)["results"]["models"]
    assert [model["peak_memory_bytes"] for model in models.values()] == [None, None]
    assert done("bench", *SHORT, *CPU, "-w", copied).stdout.count(" - ") > 2


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        ([Case(4, 0, 512), Case(1, 0, 512), Case(4, 8192, 1)], [Case(4, 0, 512), Case(4, 8192, 1)]),
        ([Case(4, 0, 512), Case(8, 8192, 1), Case(1, 32768, 1)], [Case(4, 0, 512), Case(8, 8192, 1)]),
        ([Case(1, 0, 512), Case(4, 0, 2048), Case(1, 512, 1)], [Case(4, 0, 2048)]),
        ([Case(1, 64, 1), Case(8, 16, 1)], [Case(8, 16, 1)]),
    ],
)
def test_memory_is_that_of_the_longest_caches_and_of_the_largest_prompt(
    cases: list[Case], expected: list[Case]
) -> None:
    assert stage.largest(cases) == expected


def test_memory_is_measured_in_another_process(copied: Path) -> None:
    words = ["--prefill", 7, "--decode", "", "--batch", 1, "--rounds", 6]
    result = done("bench", *words, *CPU, "-w", copied, "--json")
    document = json.loads(result.stdout)
    assert "warning" not in result.stderr
    for model in document["results"]["models"].values():
        assert 50 * 2**20 < model["peak_memory_bytes"] < 2**31
    assert [case["kind"] for case in document["results"]["cases"]] == ["prefill"]


def test_nothing_stays_behind_a_failure(
    copied: Path, exported: Path, peaks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no luck")

    monkeypatch.setattr(stage, "interleaved_seconds", broken)
    monkeypatch.setenv("ARA_DEBUG", "1")
    for words in ([*CPU, "-w", copied], ["--backend", "onnx", "-w", exported]):
        assert isinstance(ara("bench", *SHORT, *words).exception, RuntimeError)
        assert not list(Path(words[-1], "bench").iterdir())


# -- exported graphs ------------------------------------------------------------------------------------------------


def test_graphs_are_compared_with_a_dense_graph_of_the_same_settings(exported: Path, peaks: Any) -> None:
    name = f"{NAME}-pivoted"
    document = json.loads(done("bench", "--backend", "onnx", *SHORT, "-w", exported, "--json").stdout)
    folder = exported / "bench" / f"{name}-fp32-onnx"
    assert listing(folder) == {"manifest.json", "results.json"}
    assert [parent["key"] for parent in document["parents"]] == [
        f"truncate/{name}",
        "decompose/two-sided",
        f"export/{name}-fp32",
    ]
    results = document["results"]
    assert (results["backend"], results["device"], results["precision"]) == ("onnx", "cpu", "fp32")
    assert not results["last_logits"]
    view = Workspace.open(exported).view(f"truncate/{name}")
    assert view.manifest is not None
    models = results["models"]
    assert list(models) == ["dense", name]
    assert models[name]["parameters"] == view.manifest.results["parameters"] < models["dense"]["parameters"]
    files = {path.name: path.stat().st_size for path in (exported / "export" / f"{name}-fp32").iterdir()}
    assert models[name]["weight_bytes"] == files["model.onnx.data"]
    assert models[name]["disk_bytes"] == files["model.onnx.data"] + files["model.onnx"] < models["dense"]["disk_bytes"]
    assert len(results["cases"]) == 6


def test_a_mixture_in_onnx_is_compared_with_its_dense_experts(
    checkpoint: Callable[..., Any], tiny_text: str, tmp_path: Path, peaks: list[tuple[Any, list[Case]]]
) -> None:
    folder = checkpoint("mixtral", None).folder
    export_to(tmp_path, folder, tiny_text)
    dense = load(folder, "cpu", "float32")
    results = json.loads(done("bench", "--backend", "onnx", *SHORT, "-w", tmp_path, "--json").stdout)["results"]
    counted = count_model(dense, last_logits=False)
    case = results["cases"][0]
    assert results["models"]["dense"]["parameters"] == sum(p.numel() for p in dense.parameters())
    # Two of the five experts of a block work for a token.
    assert case["models"]["dense"]["macs"] == counted.macs(Case(1, 0, 7)) and counted.expert_share == 0.4
    assert case["models"][NAME]["macs"] < case["models"]["dense"]["macs"]


def test_settings_of_the_export_are_those_of_its_dense_counterpart(
    exported: Path, peaks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = OnnxDecoder.__init__

    def watched(self: OnnxDecoder, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        seen.append(self.about)

    words = ["--execution-provider", "cpu", "--precision", "int8", "--last-logits", "--merge-shared-inputs"]
    done("export", *words, "--no-parity", "--name", "small", "-w", exported, "-q")
    monkeypatch.setattr(OnnxDecoder, "__init__", watched)
    words = ["--backend", "onnx", "--export", "small", "--threads", 1]
    results = json.loads(done("bench", *words, *SHORT, "-w", exported, "--json").stdout)["results"]
    assert [(about.precision, about.last_logits, about.merge_shared_inputs) for about in seen] == [
        ("int8", True, True)
    ] * 2
    assert [bool(about.ranks) for about in seen] == [False, True]
    assert results["last_logits"] and results["precision"] == "int8" and results["threads"] == 1


def test_a_graph_of_another_exporter_has_no_dense_counterpart(
    exported: Path, checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    source = checkpoint("llama", None).folder
    shared = ["--execution-provider", "cpu", "--no-parity", "-q"]
    done("export", *shared, "--source", source, "--output", tmp_path / "dense")
    done("export", *shared, "--rewrite", tmp_path / "dense" / "model.onnx", "-w", exported)
    refused(ara("bench", "--backend", "onnx", *SHORT, "-w", exported, "-q"), 1, "was made with --rewrite")


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["--batch", "0"], 2, "batch.0: "),
        (["--batch", " "], 2, "batch: "),
        (["--batch", "two"], 2, "--batch 'two': expected whole numbers"),
        (["--prefill", "-3", "--rounds", "5"], 2, "rounds: "),
        (["--threads", "0"], 2, "threads: "),
        (["--threads", "65536"], 2, "--threads 65536 is more than the "),
        (["--prefill", "257"], 2, "--prefill 257 is more than the 256 positions of the model"),
        (["--decode", "256"], 2, "--decode 256 leaves no room for one more token in the 256 positions"),
        (["--prefill", "", "--decode", " , "], 2, "there is nothing to measure"),
        (["--device", "gpu"], 2, "unknown device 'gpu'"),
        (["--dtype", "int3"], 2, "dtype: "),
        (["--backend", "tensorrt"], 2, "backend: "),
        (["--backend", "onnx", "--device", "cpu"], 2, "--device cpu cannot be combined with --backend onnx"),
        (["--export", "x"], 2, "--export x is given, and --backend is torch"),
        (["--backend", "onnx"], 1, f"truncate/{NAME} was not exported"),
        (["--backend", "onnx", "--export", "x"], 1, "no export/x"),
        (["--checkpoint", "energy-0.07"], 1, f"did you mean {NAME}?"),
        (["--name", "../outside"], 2, "cannot be the name of a result"),
    ],
)
def test_what_cannot_be_measured(copied: Path, words: list[str], code: int, expected: str) -> None:
    before = contents(copied)
    usual = {"--prefill": "5", "--decode": "9"}
    usual |= dict(zip(words[::2], words[1::2], strict=True))
    result = ara("bench", *(word for pair in usual.items() for word in pair), "-w", copied, "-q")
    refused(result, code, expected, hint=False)
    after = contents(copied)
    after.pop(".lock-owner.json", None)
    assert after == before


def test_without_workspace_or_checkpoint(copied: Path, tmp_path: Path) -> None:
    refused(ara("bench", "-w", tmp_path / "none", "-q"), 1, "there is no workspace at")
    shutil.rmtree(copied / "truncate")
    refused(ara("bench", "-w", copied, "-q"), 1, "no result of ara truncate yet")
