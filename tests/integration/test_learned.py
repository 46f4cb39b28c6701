"""Learned ranks through the stages and the command line, on a tiny model."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ara.masks.sensitivity_table as sensitivity
from ara import load
from ara.allocation import ALLOCATORS
from ara.artifacts.factors import factor_files, specs_of
from ara.config import (
    AllocateConfig,
    CompareConfig,
    DecomposeConfig,
    EvalConfig,
    MaskTrainingOptions,
    TrainMasksConfig,
    TruncateConfig,
)
from ara.errors import DataError, ProblemsError, UsageError, WorkspaceError
from ara.layouts.modeling_ara import PivotedLinear
from ara.masks.ara_family import ara_family
from ara.models.accounting import parameter_count
from ara.models.low_rank import apply_factors
from ara.models.weights import LinearSpec
from ara.solver.problem import Budget, Module
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.compare import compare, methods_for
from ara.stages.decompose import decompose
from ara.stages.evaluate import evaluate
from ara.stages.train_masks import train_masks
from ara.stages.truncate import truncate
from ara.workspace.manifest import read_manifest
from tests.commands import ara, done
from tests.recorder import Recorder
from tests.training import NAME, TRAINING, TUNING, break_at, compare_config, train_words


def test_training_stores_losses_ranks_and_a_log(learned):
    view = Run(learned).open().require("training")
    budgets = view.manifest.results["budgets"]
    assert view.name == NAME and list(budgets) == ["0.8", "0.6"]
    assert all(row["held_out"] <= row["start_held_out"] for row in budgets.values())
    assert set(view.manifest.files) == {
        "masks-0.6.safetensors",
        "masks-0.8.safetensors",
        "sensitivity.safetensors",
    }
    with (view.path / "log.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["budget"], row["step"]) for row in rows] == [(k, str(i)) for k in ("0.8", "0.6") for i in range(5)]
    assert rows[0]["loss"] == "" and float(rows[1]["loss"]) > 0


@pytest.mark.parametrize("keep", [0.8, 0.7, 0.55])
def test_any_budget_is_met_with_one_training(learned, keep):
    view = allocate(AllocateConfig(keep=keep, method="ara", **TUNING), Run(learned))
    results = view.manifest.results
    assert keep - 0.01 < results["linear_keep"] <= keep
    guard = results["guard"]
    assert set(guard["held_out"]) == {"dense", "ara", "sensitivity", "uniform"}
    assert guard["held_out"][guard["winner"]] == min(guard["held_out"][n] for n in ("ara", "sensitivity", "uniform"))


def test_the_trained_budget_gives_the_trained_ranks(learned):
    trained = Run(learned).open().require("training").manifest.results["budgets"]["0.6"]["ranks"]
    view = allocate(AllocateConfig(keep=0.6, method="ara", guard=False, **TUNING), Run(learned))
    assert json.loads((view.path / "ranks.json").read_text())["ranks"] == trained


def test_the_guard_hands_out_what_is_best_on_held_out_text(learned, monkeypatch):
    from ara.allocation.ara import Ara
    from ara.solver.problem import Allocation

    def bad(self, modules, budget, context=None):
        specs = [module.spec for module in modules]
        return Allocation.of_ranks(specs, dict.fromkeys((spec.name for spec in specs), 1))

    monkeypatch.setattr(Ara, "allocate", bad)
    view = allocate(AllocateConfig(keep=0.8, method="ara", **TUNING), Run(learned))
    guard = view.manifest.results["guard"]
    assert guard["winner"] == "uniform" and guard["held_out"]["ara"] > guard["held_out"]["uniform"]
    assert view.manifest.results["linear_keep"] > 0.75
    unguarded = allocate(AllocateConfig(keep=0.8, method="ara", guard=False, **TUNING), Run(learned), name="raw")
    assert unguarded.manifest.results["guard"] is None
    assert unguarded.manifest.results["linear_keep"] < 0.2


def test_a_candidate_without_a_finite_loss_is_told_as_such(learned, monkeypatch):
    from ara.allocation.guard import Verdict

    losses = {"dense": 1.0, "ara": 2.0, "sensitivity": 3.0, "uniform": float("nan")}
    verdict = Verdict("ara", losses, {"ara": 0.0, "sensitivity": 0.02, "uniform": float("nan")})
    monkeypatch.setattr("ara.stages.allocate.compare_candidates", lambda *_: verdict)
    tuning = [word for key, value in TUNING.items() for word in (f"--{key.replace('_', '-')}", value)]
    result = done("allocate", "--keep", "0.8", *tuning, "-w", learned)
    assert "ara 2.0000, sensitivity 3.0000 (+1.0000 ± 0.0200), uniform not finite; ara won" in " ".join(
        result.output.split()
    )


def test_run_trains_for_all_its_budgets_at_once(tmp_path, tiny_settings):
    root = tmp_path / "ws"
    settings = {key.replace("_", "-"): value for key, value in tiny_settings.items() if key != "model"}
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    budgets = ["--method", "ara", "--keep", "0.6", "--keep", "0.8", "--no-eval"]
    done("run", tiny_settings["model"], *words, *budgets, "-w", root)
    assert list(Run(root).open().require("training").manifest.results["budgets"]) == ["0.8", "0.6"]
    names = {view.key for view in Run(root).open().views("checkpoint")}
    budgets = ("0.60", "0.80")
    assert names == {f"truncate/ara-{keep}" for keep in budgets} | {f"recover/ara-{keep}-closed" for keep in budgets}


def test_ara_without_a_training_says_how_to_get_one(finished):
    with pytest.raises(WorkspaceError, match="no trained masks") as caught:
        allocate(AllocateConfig(keep=0.8, method="ara"), Run(finished))
    assert caught.value.hint == "run first: ara train-masks --keep 0.8"


def test_auto_is_ara_where_masks_are_trained_and_else_sensitivity(learned, tiny_settings):
    first = allocate(AllocateConfig(keep=0.8, **TUNING), Run(learned))
    assert first.name == "ara-0.80" and first.manifest.config["method"] == "ara"
    decompose(DecomposeConfig(**tiny_settings, method="plain"), Run(learned))
    other = allocate(AllocateConfig(keep=0.8, **TUNING), Run(learned), factors="plain")
    assert other.name == "plain-sensitivity-0.80" and other.manifest.config["method"] == "sensitivity"
    # Masks of these factors are found behind a later training on others.
    train_masks(TrainMasksConfig(**{**TRAINING, "steps": 1}), Run(learned), factors="plain")
    again = allocate(AllocateConfig(keep=0.7, **TUNING), Run(learned), factors="two-sided")
    assert again.manifest.config["method"] == "ara"


def test_a_training_on_other_factors_is_refused(learned, tiny_settings):
    decompose(DecomposeConfig(**tiny_settings, method="plain"), Run(learned))
    with pytest.raises(WorkspaceError, match="trained on other factors than decompose/plain"):
        allocate(AllocateConfig(keep=0.8, method="ara", **TUNING), Run(learned), factors="plain")


def test_masks_with_another_method_are_refused(learned):
    with pytest.raises(UsageError, match="--masks x and --method energy"):
        allocate(AllocateConfig(keep=0.8, method="energy"), Run(learned), masks="x")
    with pytest.raises(UsageError, match="--ranks FILE and --masks x"):
        allocate(AllocateConfig(), Run(learned), masks="x", ranks=Path("ranks.json"))


def test_a_budget_that_was_not_trained_is_told(learned):
    told = ara("allocate", "--keep", "0.69", "--samples", "6", "--held-out", "3", "-w", learned).output
    assert "there is no training at keep 0.69: the one at 0.6 is used" in told
    told = ara("allocate", "--keep", "0.6", "--samples", "6", "--held-out", "3", "-w", learned).output
    assert "there is no training" not in told


def test_excluded_layers_stay_dense_and_floors_hold(learned):
    config = AllocateConfig(keep=0.8, method="energy", exclude=("*.down_proj",), min_keep=0.3)
    ranks = json.loads((allocate(config, Run(learned)).path / "ranks.json").read_text())["ranks"]
    modules = Run(learned).open().require("factors").manifest.results["modules"]
    assert all(rank == "dense" for name, rank in ranks.items() if name.endswith("down_proj"))
    for module in modules:
        rank = ranks[module["name"]]
        if rank != "dense":
            assert rank * (module["m"] + module["n"]) >= 0.3 * module["m"] * module["n"]
    with pytest.raises(UsageError, match=r"'\*\.nothing' matches no linear layer"):
        allocate(AllocateConfig(keep=0.8, exclude=("*.nothing",)), Run(learned))


@pytest.mark.parametrize("form", [{"objective": "paper"}, {"optimiser": "adam"}, {"start": "uniform", "loss": "ce"}])
def test_every_form_runs_through_the_stages(learned, form):
    settings = {**TRAINING, "keep": (0.7,), "steps": 2, "atoms": 8}
    train_masks(TrainMasksConfig(**settings, **form), Run(learned), name="form")
    for keep in (0.7, 0.6):
        view = allocate(AllocateConfig(keep=keep, method="ara", **TUNING), Run(learned), masks="form")
        assert view.manifest.results["linear_keep"] <= keep


@pytest.mark.parametrize(
    ("place", "count"),
    [
        ("ara.masks.model:MaskedModel.gradients", 3),  # within the first budget
        ("ara.masks.model:MaskedModel.gradients", 6),  # within the second
        ("ara.workspace.writer:StageWriter.save_checkpoint", 2),  # before a checkpoint is written
        ("ara.workspace.writer:StageWriter.tensors", 2),  # before the first budget is stored
    ],
)
def test_a_killed_training_ends_in_the_same_bytes(killed, learned, place, count):
    whole = read_manifest(learned / "train-masks" / NAME)
    shutil.rmtree(learned / "train-masks")
    killed(place, count, "before", *train_words(learned))
    done(*train_words(learned))
    again = read_manifest(learned / "train-masks" / NAME)
    for name in ("masks-0.8.safetensors", "masks-0.6.safetensors", "sensitivity.safetensors"):
        assert again.files[name] == whole.files[name], name
    for keep, row in whole.results["budgets"].items():
        assert again.results["budgets"][keep]["ranks"] == row["ranks"]
        assert [r["loss"] for r in again.results["log"][keep]] == [r["loss"] for r in whole.results["log"][keep]]
    assert not list((learned / "train-masks").glob("*/.*")), os.listdir(learned / "train-masks")


def test_ctrl_c_keeps_the_best_and_says_so(learned, monkeypatch):
    break_at(monkeypatch, 3, KeyboardInterrupt)
    result = done(*train_words(learned, "--name", "stopped"))
    told = " ".join(result.output.split())
    assert (
        "interrupted after step 2 of 4 at keep 0.8: the best so far is stored; the same command resumes the training"
        in told
    )
    budgets = read_manifest(learned / "train-masks" / "stopped").results["budgets"]
    assert list(budgets) == ["0.8"]
    assert budgets["0.8"]["steps"] == 2 and len(budgets["0.8"]["ranks"]) == 21
    told = ara("allocate", "--keep", "0.8", "--masks", "stopped", "-w", learned).output
    assert "train-masks/stopped is not complete: interrupted after step 2" in " ".join(told.split())


def test_divergence_is_one_line(learned, monkeypatch):
    from ara.errors import NumericalError
    from ara.masks.model import MaskedModel

    def broken(self, *args, **kwargs):
        raise NumericalError("the loss is nan", "try --dtype float32")

    monkeypatch.setattr(MaskedModel, "gradients", broken)
    result = ara(*train_words(learned, "--name", "broken"))
    assert result.exit_code == 1 and "error: the loss is nan" in result.output
    assert not (learned / "train-masks" / "broken").exists()


def test_tensorboard_without_its_package_says_what_to_do(learned, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = ara(*train_words(learned, "--tensorboard", "--name", "t"))
    assert result.exit_code == 1 and "pip install tensorboard" in result.output


def test_compare_puts_all_side_by_side(learned, tiny_text):
    view = compare(compare_config(tiny_text, methods=("uniform", "energy", "sensitivity", "ara")), Run(learned))
    results = json.loads((view.path / "results.json").read_text())
    rows = results["methods"]
    assert list(rows) == ["dense", "uniform", "energy", "sensitivity", "ara"]
    assert results["training"] == NAME
    for name, row in rows.items():
        figures = row["tasks"][tiny_text]
        assert figures["perplexity"] > 1 and len(figures["window_nlls"]) == 3
        if name != "dense":
            assert row["linear_keep"] <= 0.7 and row["seconds"] >= 0 and len(row["ranks"]) == 21
    assert rows["uniform"]["tasks"][tiny_text]["gap_closed"] in (0, None)
    assert rows["uniform"]["backward_passes"] == 0 and rows["sensitivity"]["backward_passes"] == 8
    picture = (view.path / "ranks.svg").read_text()
    assert picture.lstrip().startswith("<?xml") and "sensitivity" in picture and "q" in picture


def test_an_interrupted_comparison_keeps_what_it_has(learned, tiny_text, monkeypatch):
    from ara.allocation.energy import Energy

    real = Energy.allocate

    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    config = compare_config(tiny_text, methods=("uniform", "energy"))
    monkeypatch.setattr(Energy, "allocate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(config, Run(learned))
    monkeypatch.setattr(Energy, "allocate", real)
    from ara.allocation.uniform import Uniform

    monkeypatch.setattr(Uniform, "allocate", interrupted)  # must not be asked again
    view = compare(config, Run(learned))
    assert list(view.manifest.results["methods"]) == ["dense", "uniform", "energy"]


def test_compare_from_the_command_line(learned, tiny_text):
    words = ["--tasks", tiny_text, "--eval-seq-len", "64", "--max-windows", "2", "--samples", "6", "--held-out", "3"]
    result = done("compare", "--keep", "0.7", "--methods", "uniform,energy", *words, "-w", learned)
    assert "gap closed" in result.output and "energy" in result.output
    status = ara("status", "-w", learned)
    assert "best on held-out text:" in status.output and "nats gained" in status.output
    as_json = ara("compare", "--keep", "0.7", "--methods", "uniform,energy", *words, "-w", learned, "--json", "-q")
    assert json.loads(as_json.stdout)["results"]["methods"]["energy"]["dense_layers"] >= 0


def test_unknown_methods_of_compare_are_refused_before_any_work(learned):
    result = ara("compare", "--methods", "uniform,enrgy", "-w", learned)
    assert result.exit_code == 2 and "did you mean energy" in result.output


def test_every_allocator_is_offered():
    wanted = {"uniform", "energy", "sensitivity", "ara", "strs", "dp-kl", "gumbel", "tanh"}
    assert set(ALLOCATORS.names()) == wanted


@pytest.mark.parametrize("samples", [5000, 3])
def test_text_that_is_too_short_is_shared_out(learned, samples):
    heard = Recorder()
    config = AllocateConfig(keep=0.8, method="sensitivity", **{**TUNING, "samples": samples, "held_out": 4000})
    allocate(config, Run(learned, report=heard))
    told = next(text for text in heard.warnings if "are needed:" in text)
    made = Run(learned).open().require("factors").manifest.config["samples"]
    total, held = (int(word) for word in re.match(r"the text has (\d+) .* needed: (\d+) are", told).groups())
    assert ("so do the held-out windows" in told) == (made > total - held)
    assert ("those that the factors were fitted to" in told) == (made > max(0, total - held - 1 - samples))


# -- pivoted layers ---------------------------------------------------------------------------------------------


def test_pivoted_layers_through_all_stages(learned, tiny_text):
    train_masks(TrainMasksConfig(**TRAINING, layout="pivoted"), Run(learned))
    ranks = allocate(AllocateConfig(keep=0.6, method="ara", layout="pivoted", **TUNING), Run(learned))
    assert ranks.name == "ara-0.60-pivoted"
    checkpoint = truncate(TruncateConfig(), Run(learned))
    card = (checkpoint.path / "checkpoint" / "README.md").read_text()
    assert "stored as some of their rows, the others as combinations of those" in card
    evaluate(EvalConfig(tasks=(tiny_text,), seq_len=48, device="cpu", dtype="float32"), Run(learned))

    results = read_manifest(checkpoint.path).results
    planned = read_manifest(ranks.path).results
    assert results["parameters"] == planned["model_parameters"]
    assert 0.59 < planned["linear_keep"] <= 0.6
    model = load(checkpoint.path / "checkpoint", device="cpu")
    layers = [module for module in model.modules() if isinstance(module, PivotedLinear)]
    assert len(layers) == results["low_rank_layers"] > 0
    # The same ranks as two factors are the same function, and more parameters.
    kept = {name: rank for name, rank in json.loads((ranks.path / "ranks.json").read_text())["ranks"].items()}
    other = AutoModelForCausalLM.from_pretrained(read_manifest(ranks.path).model["location"], dtype=torch.float32)
    decomposition = Run(learned).open().require("factors")
    files = factor_files(decomposition, specs_of(decomposition))
    apply_factors(other, {name: rank for name, rank in kept.items() if rank != "dense"}, files)
    ids = torch.arange(3, 3 + 2 * 37).view(2, 37)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-3, atol=1e-3)
    assert parameter_count(model) == parameter_count(other) - sum(layer.rank**2 for layer in layers)


def test_ranks_from_a_file_are_counted_in_the_layout_asked_for(learned, tmp_path):
    ranks = allocate(AllocateConfig(keep=0.9, method="sensitivity", layout="pivoted", **TUNING), Run(learned))
    file = Path(shutil.copy(ranks.path / "ranks.json", tmp_path / "mine.json"))
    again = allocate(AllocateConfig(keep=None), Run(learned), ranks=file)
    assert again.manifest.config["layout"] == "pivoted"
    assert again.manifest.results["linear_keep"] == ranks.manifest.results["linear_keep"]
    truncate(TruncateConfig(), Run(learned), allocation="mine")
    assert "(`from a file`)" in (learned / "truncate" / "mine" / "checkpoint" / "README.md").read_text()
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "layout": "factors"}))
    with pytest.raises(ProblemsError, match=r"costs as much as the dense weight"):
        allocate(AllocateConfig(keep=None), Run(learned), ranks=file)
    with pytest.raises(UsageError, match="names the layout factors, but --layout pivoted is given"):
        allocate(AllocateConfig(keep=None, layout="pivoted"), Run(learned), ranks=file)
    file.write_text(json.dumps({**document, "layout": "columns"}))
    with pytest.raises(DataError, match="has layout 'columns', known are factors, pivoted"):
        allocate(AllocateConfig(keep=None), Run(learned), ranks=file)


def test_a_training_of_the_same_layout_is_preferred_and_the_papers_serves_only_its_own(learned):
    pivoted = AllocateConfig(keep=0.8, layout="pivoted", **TUNING)

    def used(config, name):
        view = allocate(config, Run(learned), name=name)
        return next(
            (p.key for p in view.manifest.parents if p.key.startswith("train-masks/")), view.manifest.config["method"]
        )

    assert used(pivoted, "a") == f"train-masks/{NAME}"  # rank losses hold for any layout
    train_masks(TrainMasksConfig(**{**TRAINING, "steps": 1}, layout="pivoted"), Run(learned))
    train_masks(TrainMasksConfig(**{**TRAINING, "steps": 1}, objective="paper"), Run(learned))
    assert used(pivoted, "b") == f"train-masks/{NAME}-pivoted"
    assert used(AllocateConfig(keep=0.8, **TUNING), "c") == "train-masks/paper-0.80-0.60"
    with pytest.raises(WorkspaceError, match="paper's form, which does not support layout pivoted"):
        allocate(pivoted, Run(learned), masks="paper-0.80-0.60")
    for name in (NAME, f"{NAME}-pivoted"):
        shutil.rmtree(learned / "train-masks" / name)
    assert used(pivoted, "d") == "sensitivity"


def test_options_need_a_method_that_takes_them(learned):
    config = {"keep": 0.8, "options": {"sums": "window"}, **TUNING}
    with pytest.raises(UsageError, match="-O sums=… is given without a method"):
        allocate(AllocateConfig(**config), Run(learned))
    with pytest.raises(UsageError, match="--method ara takes no options here, got sums"):
        allocate(AllocateConfig(**config, method="ara"), Run(learned))
    assert allocate(AllocateConfig(**config, method="sensitivity"), Run(learned)).manifest is not None


def test_one_sensitivity_table_serves_all_commands_but_compare(learned, tiny_text, monkeypatch):
    made = []
    original = sensitivity.sensitivity_tables

    def counted(*arguments, **options):
        made.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(sensitivity, "sensitivity_tables", counted)
    allocate(AllocateConfig(keep=0.8, method="sensitivity", **TUNING), Run(learned))
    train_masks(TrainMasksConfig(**{**TRAINING, "steps": 1}, layout="pivoted"), Run(learned))
    assert made == []  # the training of the fixture has made it
    allocate(AllocateConfig(keep=0.8, method="sensitivity", **TUNING), Run(learned, force=True))
    assert made == [1]
    config = {"tasks": (tiny_text,), "eval_seq_len": 48, "max_windows": 2, "methods": ("sensitivity",)}
    compare(CompareConfig(**config, **TUNING), Run(learned))
    assert made == [1, 1]


def test_run_trains_and_allocates_in_the_layout_asked_for(tmp_path, tiny_settings):
    root = tmp_path / "ws"
    settings = {key.replace("_", "-"): value for key, value in tiny_settings.items() if key != "model"}
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    for layout in ("pivoted", "factors", "pivoted"):
        asked = ["--method", "ara", "--keep", "0.8", "--layout", layout, "--no-eval"]
        result = done("run", tiny_settings["model"], *words, *asked, "-w", root)
    parents = {view.name: [p.key for p in view.manifest.parents] for view in Run(root).open().views("ranks")}
    assert "train-masks/priced-0.80-pivoted" in parents["ara-0.80-pivoted"]
    assert "train-masks/priced-0.80" in parents["ara-0.80"]
    assert "replacing" not in result.stderr


def test_what_knows_only_factors_refuses_pivoted_layers(learned):
    with pytest.raises(UsageError, match="--method tanh does not support --layout pivoted"):
        allocate(AllocateConfig(keep=0.8, method="tanh", layout="pivoted", **TUNING), Run(learned))
    with pytest.raises(UsageError, match="--objective paper and --layout pivoted are both given"):
        train_masks(TrainMasksConfig(**TRAINING, objective="paper", layout="pivoted"), Run(learned))
    asked = {"objective": "paper"}
    with pytest.raises(UsageError, match="--objective paper and --layout pivoted are both given"):
        ara_family(MaskTrainingOptions(**asked), [module("pivoted")], Budget(100), None)


def module(layout):
    return Module(LinearSpec("x", 0, "x", 20, 30, layout), torch.ones(20))


def test_compare_leaves_out_what_does_not_know_the_layout(learned, tiny_text):
    config = {"tasks": (tiny_text,), "eval_seq_len": 48, "max_windows": 2, "layout": "pivoted", "keep": 0.7}
    quick = ("uniform", "energy", "sensitivity")
    view = compare(CompareConfig(**config, methods=quick, **TUNING), Run(learned))
    assert view.name == "0.70-pivoted"
    rows = view.manifest.results["methods"]
    assert all(0.69 < rows[name]["linear_keep"] <= 0.7 for name in quick)
    with pytest.raises(UsageError, match="--method tanh does not support"):
        compare(CompareConfig(**config, methods=("tanh",), **TUNING), Run(learned))
    assert methods_for("pivoted") == tuple(name for name in ALLOCATORS.names() if name not in ("gumbel", "tanh"))
