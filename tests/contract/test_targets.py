"""What every registered export target must do; a new one is tested by being registered."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ara.config import AllocateConfig, DecomposeConfig, GenerateConfig, TruncateConfig
from ara.errors import AraError, ModelError, NumericalError, UsageError, WorkspaceError
from ara.evaluation.cost import Case
from ara.evaluation.layer_times import layer_seconds
from ara.layout_names import LAYOUT_NAMES, LayoutName
from ara.models.weights import LinearSpec
from ara.progress import SILENT
from ara.stages.common import Run
from ara.stages.run import run_pipeline
from ara.workspace.store import Workspace
from ara.workspace.view import StageView
from export.answering import Answerer
from export.base import REPORT_FILE, Target
from export.config import ExportConfig
from export.find import find_for_bench, find_for_eval, latest_export
from export.stage import export, export_folder
from export.targets import TARGETS, backends, load_target, target_of
from tests.damage import contents, listing

NAMES = TARGETS.names()
LAYOUTS = [None, "factors", "pivoted"]


def config_of(name: str, **changes: Any) -> ExportConfig:
    return ExportConfig(**{"target": name, "execution_provider": "cpu", **changes})


@pytest.fixture(scope="module", params=NAMES)
def target(request: pytest.FixtureRequest) -> Target:
    return load_target(request.param)


@pytest.fixture(scope="module")
def exported(
    target: Target, checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[Any, tuple[Any, Path, Any]]:
    """Return layout → checkpoint, folder of its export, report; only to be read."""
    found = {}
    for layout in LAYOUTS:
        made, folder = checkpoint("llama", layout), tmp_path_factory.mktemp("export") / "out"
        report = export_folder(config_of(target.name), Run(folder.parent), made.folder, folder)
        found[layout] = (made, folder, report)
    return found


@pytest.fixture(scope="module")
def workspace(
    target: Target, checkpoint: Callable[..., Any], tiny_text: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Workspace, StageView, StageView]:
    """Return a workspace with two checkpoints, the first of them, and its export; only to be read."""
    root = tmp_path_factory.mktemp("targets") / "ws"
    settings = {"text": tiny_text, "samples": 12, "seq_len": 48, "device": "cpu", "dtype": "float32"}
    run_pipeline(
        DecomposeConfig(model=str(checkpoint("llama", None).folder), **settings),
        [AllocateConfig(keep=keep, method="uniform") for keep in (0.7, 0.6)],
        {"truncate": TruncateConfig()},
        Run(root),
    )
    view = export(config_of(target.name), Run(root), checkpoint="uniform-0.70")
    opened = Workspace.open(root)
    return opened, opened.view("truncate/uniform-0.70"), view


# -- the registry ---------------------------------------------------------------------------------------------------


def test_a_target_describes_itself(target: Target) -> None:
    assert TARGETS.entry(target.name).title and target.title
    assert target.command.startswith("ara export")
    assert target_of(target.name).name == target.name and target.name in backends()  # type: ignore[union-attr]


def test_listing_targets_and_naming_one_imports_no_runtime() -> None:
    code = (
        "import sys; from export.targets import TARGETS, load_target; [load_target(name) for name in TARGETS.names()]; "
        "print(sorted({'torch', 'transformers', 'onnxruntime', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_unknown_names_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"unknown export target 'no': known are {', '.join(NAMES)}"):
        export_folder(config_of("no"), Run(tmp_path), tmp_path / "in", tmp_path / "out")
    with pytest.raises(AraError, match=f"backend: input should be 'torch'.* or '{NAMES[-1]}', got 'no'"):
        target_of("no")
    assert target_of("torch") is None


# -- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_is_proven_and_says_so(target: Target, exported: dict[Any, Any], layout: str | None) -> None:
    _, folder, report = exported[layout]
    assert report.parity is not None
    assert bool(report.ranks) is (layout is not None)
    assert report.layout == (layout or "factors")
    assert report.files and all((folder / name).stat().st_size == file.bytes for name, file in report.files.items())
    weights = target.weight_files(folder)
    assert weights and {path.name for path in weights} <= set(report.files)


def test_the_report_survives_writing_and_reading(target: Target, exported: dict[Any, Any]) -> None:
    for _, folder, report in exported.values():
        assert target.read_report(folder) == report
        assert json.loads((folder / REPORT_FILE).read_text()) == report.model_dump(mode="json")


def test_same_checkpoint_same_bytes(target: Target, exported: dict[Any, Any], tmp_path: Path) -> None:
    made, folder, _ = exported["factors"]
    export_folder(config_of(target.name), Run(tmp_path), made.folder, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_resolving_is_final_and_goes_into_the_manifest(target: Target) -> None:
    resolved = target.resolve(config_of(target.name))
    assert target.resolve(resolved) == resolved
    assert target.inputs(resolved) == []
    recorded = target.recorded(resolved)
    assert recorded["target"] == target.name
    assert {**recorded, **resolved.model_dump(mode="json")} == recorded


def test_nothing_is_left_of_an_export_that_fails(
    target: Target, exported: dict[Any, Any], workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, truncated, _ = workspace
    original = type(target).write

    def wrong(self: Target, source: Path, folder: Path, *rest: Any) -> Any:
        original(self, source, folder, *rest)
        raise NumericalError("it differs from torch")

    before = listing(opened.root / "export")
    monkeypatch.setattr(type(target), "write", wrong)
    with pytest.raises(NumericalError):
        export(config_of(target.name, parity=False), Run(opened.root), checkpoint=truncated.name, name="wrong")
    assert listing(opened.root / "export") == before
    with pytest.raises(NumericalError):
        export_folder(config_of(target.name), Run(tmp_path), exported["factors"][0].folder, tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_what_is_no_checkpoint_is_refused_and_nothing_is_written(target: Target, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in ("empty", "nowhere"):
        with pytest.raises(ModelError, match=r"is not a checkpoint folder \(no config.json\)"):
            export_folder(config_of(target.name), Run(tmp_path), tmp_path / source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


# -- running --------------------------------------------------------------------------------------------------------


def test_what_is_no_export_is_refused(target: Target, exported: dict[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "nonsense").mkdir()
    (tmp_path / "nonsense" / REPORT_FILE).write_text("{}")
    for folder in (tmp_path / "nowhere", tmp_path, tmp_path / "nonsense", exported["factors"][0].folder):
        for read in (target.read_report, target.for_generate):
            with pytest.raises(ModelError):
                read(folder)


def test_a_file_that_was_cut_is_found(target: Target, exported: dict[Any, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported["factors"][1], tmp_path / "cut"))
    for path in target.weight_files(folder):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"has [\d,]+ bytes; ara_export.json says"):
        target.read_report(folder)


def test_an_export_of_the_workspace_is_found_again(target: Target, workspace: Any) -> None:
    opened, truncated, view = workspace
    assert view.state == "done" and view.name == target.result_name(
        truncated.name, target.resolve(config_of(target.name))
    )
    for name in (None, view.name):
        assert latest_export(target, opened, truncated, name).key == view.key
    other = opened.view("truncate/uniform-0.60")
    with pytest.raises(WorkspaceError, match=f"has no export that can be run: {view.key} is one of {truncated.key}"):
        latest_export(target, opened, other)
    with pytest.raises(WorkspaceError, match=f"{view.key} is not an export of {other.key}"):
        latest_export(target, opened, other, view.name)


def test_an_export_for_another_runtime_is_not_taken(target: Target, workspace: Any) -> None:
    opened, truncated, view = workspace

    class Other(type(target)):  # type: ignore[misc]
        name, command = "other", "ara export --target other"

    with pytest.raises(WorkspaceError, match=f"{view.key} is for {target.name}") as caught:
        latest_export(Other(), opened, truncated)
    assert caught.value.hint == f"make one: ara export --target other --checkpoint {truncated.name}"
    with pytest.raises(WorkspaceError, match=f"{view.key} was not made for --backend other"):
        latest_export(Other(), opened, truncated, view.name)


def test_eval_gets_the_logits_of_the_checkpoint(target: Target, workspace: Any) -> None:
    from ara.models.checkpoint import load

    opened, truncated, view = workspace
    find = find_for_eval(target.name)
    assert find is not None
    found = find(opened, truncated)
    assert found.view.key == view.key
    assert found.weight_bytes == sum(path.stat().st_size for path in target.weight_files(view.path)) > 0
    ids = torch.arange(4, 44)[None]
    with torch.inference_mode():
        expected = load(truncated.path / "checkpoint", "cpu", "float32")(input_ids=ids).logits
        ours = found.load()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(ours.float(), expected, rtol=0, atol=1e-3)


def test_eval_refuses_an_export_of_the_last_logits(target: Target, workspace: Any, tmp_path: Path) -> None:
    opened, truncated, view = workspace
    manifest = view.manifest.model_copy(update={"results": {**view.manifest.results, "last_logits": True}})
    find = find_for_eval(target.name)
    assert find is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.find.latest_export", lambda *arguments: replace(view, manifest=manifest))
        with pytest.raises(WorkspaceError, match=f"{view.key} gives the logits of the last position only"):
            find(opened, truncated)


def test_bench_gets_the_export_and_a_dense_one_of_the_same_settings(
    target: Target, workspace: Any, checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    opened, truncated, view = workspace
    find = find_for_bench(target.name, view.name)
    assert find is not None
    found = find(opened, truncated)
    assert found.view.key == view.key and found.device == "cpu" and found.precision
    source = checkpoint("llama", None).folder
    chosen = found.chosen("chosen", truncated.path / "checkpoint", 1)
    dense = found.dense("dense", source, tmp_path / "dense", 1)
    assert 0 < chosen.disk_bytes < dense.disk_bytes
    report = target.read_report(tmp_path / "dense")
    assert not report.ranks and report.precision == found.precision
    runners = [model.load() for model in (chosen, dense)]
    assert 0 < runners[0].parameters < runners[1].parameters
    for runner in runners:
        assert runner.cost.macs(Case(2, 5, 1)) > 0
        runner.prepare(Case(2, 5, 1)).run()


def answer(config: GenerateConfig, run: Run, **which: Any) -> str:
    """Return the whole answer to a prompt."""
    model = Answerer(config, run, **which)
    return "".join(model.answer(model.prompt_ids("the river", config.chat)))


def test_generate_gives_the_text_of_torch(target: Target, exported: dict[Any, Any], tmp_path: Path) -> None:
    made, folder, _ = exported["factors"]
    settings = {"max_new_tokens": 12, "device": "cpu", "dtype": "float32", "chat": False}
    for drawn in ({}, {"temperature": 0.7, "top_p": 0.95, "seed": 3}):
        texts = [
            answer(GenerateConfig(backend=backend, **settings, **drawn), Run(tmp_path), source=source)
            for backend, source in (("torch", made.folder), (target.name, folder))
        ]
        assert texts[0] == texts[1] and len(texts[0]) > 3
    decoder = target.for_generate(folder)
    assert decoder.context == 200 and decoder.vocabulary == made.model.config.vocab_size
    with pytest.raises(ModelError, match=f"is a checkpoint, --backend {target.name} runs exports") as caught:
        answer(GenerateConfig(backend=target.name), Run(tmp_path), source=made.folder)
    assert target.command in str(caught.value.hint)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("rank", [None, 9])
def test_latency_times_single_layers(target: Target, layout: LayoutName, rank: int | None) -> None:
    layers = target.for_latency(None, 1)
    assert (layers.runtime.backend, layers.runtime.threads) == (target.name, 1)
    (seconds,) = layer_seconds(layers, [(LinearSpec("b.0", 0, "l", 48, 30, layout), rank)], 7, 3)
    assert seconds > 0
    with pytest.raises(UsageError, match="cannot be timed in int3"):
        target.for_latency("int3", 1)


def test_generate_finds_the_export_of_the_workspace(target: Target, workspace: Any) -> None:
    opened, truncated, view = workspace
    config = GenerateConfig(backend=target.name, max_new_tokens=5, chat=False)
    run = Run(opened.root, report=SILENT)
    texts = [answer(config, run, checkpoint=truncated.name, export=name) for name in (None, view.name)]
    assert texts[0] == texts[1] != ""
