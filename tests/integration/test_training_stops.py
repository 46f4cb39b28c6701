"""Trainings that end early, and what later commands make of a training."""

import shutil

import pytest

from ara.config import AllocateConfig, CompareConfig, TrainMasksConfig
from ara.errors import NumericalError, WorkspaceError
from ara.manifest import read_manifest
from ara.masks.model import MaskedModel
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.compare import compare
from ara.stages.train_masks import train_masks
from tests.integration.test_learned import (  # noqa: F401
    TRAINING,
    TUNING,
    compare_config,
    invoke,
    learned,
    learned_base,
    train_words,
)
from tests.integration.test_resume import Heard


def break_at(monkeypatch, call, error):
    """Let the training step number ``call`` of this process raise ``error``."""
    real, calls = MaskedModel.gradients, []

    def gradients(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MaskedModel, "gradients", gradients)


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


def test_compare_counts_what_the_training_has_cost(learned, tiny_text):  # noqa: F811
    trained = Run(learned).open().require("train-masks").manifest.results
    config = CompareConfig(keep=0.61, methods=("ara",), tasks=(tiny_text,), eval_seq_len=64, max_windows=1, **TUNING)
    row = compare(config, Run(learned)).manifest.results["methods"]["ara"]
    # At 0.6 the training has gone on from what it learned at 0.8.
    budgets = trained["budgets"].values()
    assert row["backward_passes"] == trained["table_windows"] + sum(each["backward_passes"] for each in budgets)
    assert row["seconds"] >= trained["table_seconds"] + sum(each["seconds"] for each in budgets)
