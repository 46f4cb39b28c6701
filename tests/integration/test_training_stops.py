"""Trainings that end early, and what later commands make of a training."""

import shutil

import pytest

from ara.config import AllocateConfig, CompareConfig, TrainMasksConfig
from ara.errors import NumericalError, WorkspaceError
from ara.manifest import read_manifest
from ara.masks.model import MaskedModel
from ara.stage_writer import StageWriter
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.compare import compare
from ara.stages.learned import training_cost
from ara.stages.train_masks import train_masks
from tests.integration.test_learned import (  # noqa: F401
    TRAINING,
    TUNING,
    break_at,
    compare_config,
    invoke,
    learned,
    learned_base,
    train_words,
)
from tests.integration.test_resume import Heard


def test_an_interrupt_passes_through_a_library_call_which_then_goes_on(learned, monkeypatch):  # noqa: F811
    whole = read_manifest(learned / "train-masks" / "priced")
    shutil.rmtree(learned / "train-masks")
    config = TrainMasksConfig(**TRAINING)
    break_at(monkeypatch, 7, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        train_masks(config, Run(learned))
    assert not (learned / "train-masks" / "priced").exists()
    again = train_masks(config, Run(learned)).manifest
    assert again.files == whole.files and again.results["stopped"] is None
    assert (learned / "train-masks" / "priced" / "log.csv").read_text().count("\n") == 11


def test_run_stops_at_an_interrupt_and_goes_on(tmp_path, tiny_settings, monkeypatch):
    settings = {key.replace("_", "-"): value for key, value in tiny_settings.items() if key != "model"}
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    words = ["run", tiny_settings["model"], *words, "--method", "ara", "--keep", "0.8", "--no-eval", "-w", tmp_path]
    break_at(monkeypatch, 3, KeyboardInterrupt)
    first = invoke(*words)
    assert first.exit_code == 130 and not (tmp_path / "allocate").exists()
    second = invoke(*words)
    assert second.exit_code == 0, second.output
    assert read_manifest(tmp_path / "train-masks" / "priced").results["budgets"]["0.8"]["steps"] == 12


def test_divergence_at_a_later_budget_keeps_those_before(learned, monkeypatch):  # noqa: F811
    break_at(monkeypatch, 6, NumericalError("the loss is nan", "try --dtype float32"))
    result = invoke(*train_words(learned, "--name", "half"))
    assert result.exit_code == 0, result.output
    assert "keep 0.6 is left out: the loss is nan (try --dtype float32)" in " ".join(result.output.split())
    results = read_manifest(learned / "train-masks" / "half").results
    assert list(results["budgets"]) == ["0.8"] and "keep 0.6" in results["stopped"]
    again = invoke(*train_words(learned, "--name", "half"))
    assert "is not complete: at keep 0.6 the loss is nan" in " ".join(again.output.split())


def test_a_repeated_training_is_the_same_content(learned):  # noqa: F811
    first = read_manifest(learned / "train-masks" / "priced")
    train_masks(TrainMasksConfig(**TRAINING), Run(learned, force=True))
    assert read_manifest(learned / "train-masks" / "priced").files == first.files


@pytest.mark.parametrize("command", ["allocate", "compare"])
def test_what_a_training_learned_from_is_not_held_out(learned, tiny_text, command):  # noqa: F811
    heard = Heard()
    other = {**TUNING, "samples": 5, "held_out": 2}
    if command == "allocate":
        view = allocate(AllocateConfig(keep=0.8, method="ara", **other), Run(learned, report=heard))
    else:
        view = compare(compare_config(tiny_text, methods=("ara",), **other), Run(learned, report=heard))
    assert (view.manifest.config["samples"], view.manifest.config["held_out"]) == (8, 4)
    assert "8 windows to learn from, 4 held out, as in train-masks/priced" in heard.facts
    # Nothing was trained: the text of the command stays.
    plain = allocate(AllocateConfig(keep=0.8, method="sensitivity", **other), Run(learned))
    assert plain.manifest.config["samples"] == 5


def test_a_training_of_the_papers_form_does_not_serve_pivoted_layers(learned):  # noqa: F811
    shutil.rmtree(learned / "train-masks")
    train_masks(TrainMasksConfig(**{**TRAINING, "keep": (0.8,), "steps": 1}, objective="paper"), Run(learned))
    with pytest.raises(WorkspaceError, match="does not know what layout pivoted costs"):
        allocate(AllocateConfig(keep=0.8, method="ara", layout="pivoted", **TUNING), Run(learned))


def test_what_was_stopped_stays_so_when_storing_it_is_cut_off(learned, monkeypatch):  # noqa: F811
    real, calls = StageWriter._commit, []

    def cut_off(self):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(StageWriter, "_commit", cut_off)
    break_at(monkeypatch, 3, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        train_masks(TrainMasksConfig(**TRAINING), Run(learned), name="stopped", keep_on_interrupt=True)
    view = train_masks(TrainMasksConfig(**TRAINING), Run(learned), name="stopped")
    assert list(view.manifest.results["budgets"]) == ["0.8"]
    assert view.manifest.results["stopped"] == "interrupted after step 2 of 4 at keep 0.8"
    told = invoke("allocate", "--keep", "0.8", "--masks", "stopped", "-w", learned).output
    assert "train-masks/stopped is not complete: interrupted after step 2" in " ".join(told.split())


def test_force_trains_anew_what_was_stopped_and_cut_off(learned, monkeypatch):  # noqa: F811
    with monkeypatch.context() as during:

        def cut_off(self):
            raise KeyboardInterrupt

        during.setattr(StageWriter, "_commit", cut_off)
        break_at(during, 3, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            train_masks(TrainMasksConfig(**TRAINING), Run(learned), name="stopped", keep_on_interrupt=True)
    whole = read_manifest(learned / "train-masks" / "priced")
    view = train_masks(TrainMasksConfig(**TRAINING), Run(learned, force=True), name="stopped")
    assert view.manifest.results["stopped"] is None
    for keep, row in whole.results["budgets"].items():
        assert view.manifest.results["budgets"][keep]["ranks"] == row["ranks"]


@pytest.mark.parametrize("optimiser", ["newton", "adam"])
@pytest.mark.parametrize("winner", ["sensitivity", "learned"])
def test_a_later_budget_starts_at_the_better_of_two_places(learned, monkeypatch, winner, optimiser):  # noqa: F811
    real, places = MaskedModel.nll, []

    def judged(self, *args, **kwargs):
        losses = real(self, *args, **kwargs)
        if sum(layer.rank is not None for layer in self.layers.values()) and len(places) < 2 and wanted():
            places.append(float(losses.mean()))
            # The other one is far worse.
            return losses + (5.0 if ("sensitivity", "learned")[len(places) - 1] != winner else 0)
        return losses

    def wanted():
        return any("keep 0.8: best" in text for text in heard.facts)

    heard = Heard()
    monkeypatch.setattr(MaskedModel, "nll", judged)
    run = Run(learned, report=heard)
    view = train_masks(TrainMasksConfig(**TRAINING, optimiser=optimiser, atoms=8, learning_rate=3.0), run, name="two")
    budgets = view.manifest.results["budgets"]
    assert [row["start"] for row in budgets.values()] == ["sensitivity", winner]
    assert len(places) == 2 and places[0] != places[1]
    assert budgets["0.6"]["start_held_out"] == pytest.approx(places[winner == "learned"], rel=1e-6)
    before = budgets["0.8"]["backward_passes"] if winner == "learned" else 0
    assert training_cost(view, 0.6)["backward_passes"] == 8 + before + 12
    assert training_cost(view, 0.8)["backward_passes"] == 8 + 12


@pytest.mark.parametrize(("objective", "passes"), [("priced", 8 + 12 + 12), ("paper", 8 + 12)])
def test_the_cost_of_a_training_that_does_not_say_where_it_started(learned, objective, passes):  # noqa: F811
    view = Run(learned).open().require("train-masks")
    view.manifest.config["objective"] = objective
    for row in view.manifest.results["budgets"].values():
        del row["start"]
    assert training_cost(view, 0.6)["backward_passes"] == passes


def test_compare_counts_what_the_training_has_cost(learned, tiny_text):  # noqa: F811
    trained = Run(learned).open().require("train-masks").manifest.results
    config = CompareConfig(keep=0.61, methods=("ara",), tasks=(tiny_text,), eval_seq_len=64, max_windows=1, **TUNING)
    row = compare(config, Run(learned)).manifest.results["methods"]["ara"]
    # That of 0.8 counts where the training at 0.6 has gone on from it.
    later, before = trained["budgets"]["0.6"], trained["budgets"]["0.8"]
    led = [later, before] if later["start"] == "learned" else [later]
    assert row["backward_passes"] == trained["table_windows"] + sum(each["backward_passes"] for each in led)
    assert row["seconds"] >= trained["table_seconds"] + sum(each["seconds"] for each in led)
