"""Trainings that end early, and what later commands make of a training."""

import shlex
import shutil

import pytest

from ara.artifacts.training import training_cost
from ara.config import AllocateConfig, CompareConfig, DecomposeConfig, TrainMasksConfig, TruncateConfig
from ara.errors import NumericalError, WorkspaceError
from ara.masks.model import MaskedModel
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.compare import compare
from ara.stages.decompose import decompose
from ara.stages.train_masks import train_masks
from ara.stages.truncate import truncate
from ara.workspace.following import next_command
from ara.workspace.manifest import read_manifest, verify_files
from ara.workspace.writer import StageWriter
from tests.commands import ara, done
from tests.recorder import Recorder
from tests.training import NAME, TRAINING, TUNING, break_at, compare_config, train_words


def raising(error):
    """Return a function that takes anything and raises ``error``."""

    def function(*args, **kwargs):
        raise error

    return function


def counting(real, calls):
    """Return ``real`` with its calls counted in ``calls``."""

    def function(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    return function


def interrupted_at(call, real):
    """Return ``real``, but its call number ``call`` ends in Ctrl+C."""
    calls = []

    def function(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    return function


def test_an_interrupt_passes_through_a_library_call_which_then_goes_on(learned, monkeypatch):
    whole = read_manifest(learned / "train-masks" / NAME)
    shutil.rmtree(learned / "train-masks")
    config = TrainMasksConfig(**TRAINING)
    break_at(monkeypatch, 7, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        train_masks(config, Run(learned))
    assert not (learned / "train-masks" / NAME).exists()
    again = train_masks(config, Run(learned)).manifest
    assert again.files == whole.files and again.results["stopped"] is None
    assert (learned / "train-masks" / NAME / "log.csv").read_text().count("\n") == 11


def test_run_stops_at_an_interrupt_and_goes_on(tmp_path, tiny_settings, monkeypatch):
    settings = {key.replace("_", "-"): value for key, value in tiny_settings.items() if key != "model"}
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    words = ["run", tiny_settings["model"], *words, "--method", "ara", "--keep", "0.8", "--no-eval", "-w", tmp_path]
    break_at(monkeypatch, 3, KeyboardInterrupt)
    first = ara(*words)
    assert first.exit_code == 130 and not (tmp_path / "allocate").exists()
    done(*words)
    assert read_manifest(tmp_path / "train-masks" / "priced-0.80").results["budgets"]["0.8"]["steps"] == 12


def test_divergence_at_a_later_budget_keeps_those_before(learned, monkeypatch):
    break_at(monkeypatch, 6, NumericalError("the loss is nan", "try --dtype float32"))
    result = done(*train_words(learned, "--name", "half"))
    assert "no result at keep 0.6: the loss is nan (try --dtype float32)" in " ".join(result.output.split())
    results = read_manifest(learned / "train-masks" / "half").results
    assert list(results["budgets"]) == ["0.8"] and "keep 0.6" in results["stopped"]
    again = ara(*train_words(learned, "--name", "half"))
    assert "is not complete: at keep 0.6 the loss is nan" in " ".join(again.output.split())


def test_a_repeated_training_is_the_same_content(learned):
    first = read_manifest(learned / "train-masks" / NAME)
    train_masks(TrainMasksConfig(**TRAINING), Run(learned, force=True))
    assert read_manifest(learned / "train-masks" / NAME).files == first.files


@pytest.mark.parametrize("command", ["allocate", "compare"])
def test_what_a_training_learned_from_is_not_held_out(learned, tiny_text, command):
    heard = Recorder()
    other = {**TUNING, "samples": 5, "held_out": 2}
    if command == "allocate":
        view = allocate(AllocateConfig(keep=0.8, method="ara", **other), Run(learned, report=heard))
    else:
        view = compare(compare_config(tiny_text, methods=("ara",), **other), Run(learned, report=heard))
    assert (view.manifest.config["samples"], view.manifest.config["held_out"]) == (8, 4)
    assert f"8 windows to learn from, 4 held out, as in train-masks/{NAME}" in heard.facts
    # Nothing was trained: the text of the command stays.
    plain = allocate(AllocateConfig(keep=0.8, method="sensitivity", **other), Run(learned))
    assert plain.manifest.config["samples"] == 5


def test_a_training_of_the_papers_form_does_not_serve_pivoted_layers(learned):
    shutil.rmtree(learned / "train-masks")
    train_masks(TrainMasksConfig(**{**TRAINING, "keep": (0.8,), "steps": 1}, objective="paper"), Run(learned))
    with pytest.raises(WorkspaceError, match="does not support layout pivoted"):
        allocate(AllocateConfig(keep=0.8, method="ara", layout="pivoted", **TUNING), Run(learned))


def same_training(view, learned):
    """Hold a training against the one of the fixture, which was never interrupted."""
    whole, made = read_manifest(learned / "train-masks" / NAME), view.manifest
    assert made.files == whole.files and made.results["stopped"] is None
    for keep, row in whole.results["budgets"].items():
        assert made.results["budgets"][keep]["ranks"] == row["ranks"]
        assert [r["loss"] for r in made.results["log"][keep]] == [r["loss"] for r in whole.results["log"][keep]]
    assert not [path for path in (learned / "train-masks").iterdir() if path.name.startswith(".")]


# Steps 1 to 4 are those of the first budget.
@pytest.mark.parametrize("step", [1, 3, 5, 7])
@pytest.mark.parametrize("cut_off", [False, True], ids=["", "and cut off while it is stored"])
def test_what_ctrl_c_has_stopped_goes_on_from_there(learned, monkeypatch, step, cut_off):
    config, name = TrainMasksConfig(**TRAINING), "stopped"
    with monkeypatch.context() as during:
        break_at(during, step, KeyboardInterrupt)
        if cut_off:
            during.setattr(StageWriter, "_commit", raising(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                train_masks(config, Run(learned), name=name, keep_on_interrupt=True)
        else:
            view = train_masks(config, Run(learned), name=name, keep_on_interrupt=True)
            done = (step - 1) % 4
            told = f"interrupted after step {done} of 4 at keep {0.8 if step < 5 else 0.6}"
            assert view.state == "done" and view.manifest.results["stopped"] == told
            verify_files(view.path, view.manifest)
    counted = []
    monkeypatch.setattr(MaskedModel, "gradients", counting(MaskedModel.gradients, counted))
    same_training(train_masks(config, Run(learned), name=name), learned)
    assert len(counted) == 9 - step, "no step is taken twice"


def test_ctrl_c_between_two_budgets_keeps_the_first(learned, monkeypatch):
    import ara.stages.train_masks as stage

    with monkeypatch.context() as during:
        during.setattr(stage._Training, "_best_start", interrupted_at(2, stage._Training._best_start))
        config = TrainMasksConfig(**TRAINING)
        view = train_masks(config, Run(learned), name="stopped", keep_on_interrupt=True)
    assert view.manifest.results["stopped"] == "interrupted at keep 0.6"
    assert list(view.manifest.results["budgets"]) == ["0.8"]
    same_training(train_masks(TrainMasksConfig(**TRAINING), Run(learned), name="stopped"), learned)


def test_ctrl_c_while_the_last_step_is_checked_leaves_that_step_to_be_taken(learned, monkeypatch):
    config = TrainMasksConfig(**{**TRAINING, "check_every": 9})
    whole = train_masks(config, Run(learned), name="whole")
    with monkeypatch.context() as during:
        # Of the first budget: the start, and the end.
        during.setattr(MaskedModel, "nll", interrupted_at(2, MaskedModel.nll))
        view = train_masks(config, Run(learned), name="stopped", keep_on_interrupt=True)
    assert view.manifest.results["stopped"] == "interrupted after step 3 of 4 at keep 0.8"
    view = train_masks(config, Run(learned), name="stopped")
    assert view.manifest.files == whole.manifest.files and view.manifest.results["stopped"] is None


def test_ctrl_c_while_a_budget_is_stored_leaves_none_without_its_file(learned, monkeypatch):
    config = TrainMasksConfig(**TRAINING)
    with monkeypatch.context() as during:
        # The table, and the two budgets.
        during.setattr(StageWriter, "tensors", interrupted_at(3, StageWriter.tensors))
        view = train_masks(config, Run(learned), name="stopped", keep_on_interrupt=True)
    assert view.manifest.results["stopped"] == "interrupted at keep 0.6"
    assert list(view.manifest.results["budgets"]) == ["0.8"] and "masks-0.6.safetensors" not in view.manifest.files
    allocate(AllocateConfig(keep=0.8, method="ara", guard=False, **TUNING), Run(learned), masks="stopped")
    same_training(train_masks(config, Run(learned), name="stopped"), learned)


@pytest.mark.parametrize("place", ["ara.workspace.writer:shutil.copytree", "ara.workspace.writer:write_text"])
def test_what_ctrl_c_stopped_goes_on_though_storing_it_failed(learned, monkeypatch, place):
    with monkeypatch.context() as during:
        break_at(during, 3, KeyboardInterrupt)
        during.setattr(place.replace(":", "."), raising(OSError("the disk is full")))
        with pytest.raises(OSError, match="the disk is full"):
            train_masks(TrainMasksConfig(**TRAINING), Run(learned), name="stopped", keep_on_interrupt=True)
    same_training(train_masks(TrainMasksConfig(**TRAINING), Run(learned), name="stopped"), learned)


def test_a_report_on_a_training_that_can_go_on(learned, monkeypatch, tiny_text):
    with monkeypatch.context() as during:
        break_at(during, 3, KeyboardInterrupt)
        train_masks(TrainMasksConfig(**TRAINING), Run(learned), name="stopped", keep_on_interrupt=True)
    allocate(AllocateConfig(keep=0.8, method="ara", guard=False, **TUNING), Run(learned), masks="stopped")
    truncate(TruncateConfig(), Run(learned))
    done("report", "-w", learned)


def test_ctrl_c_does_not_replace_a_complete_training(learned, monkeypatch):
    before = read_manifest(learned / "train-masks" / NAME)
    words = train_words(learned, "--name", NAME, "--steps", "9")
    with monkeypatch.context() as during:
        break_at(during, 7, KeyboardInterrupt)
        result = ara(*words)
    assert result.exit_code == 130 and "the same command continues from there" in result.output
    assert read_manifest(learned / "train-masks" / NAME) == before
    # Nor does it stand in the way of what was begun.
    result = ara(*words)
    assert result.exit_code == 0 and "resuming after step 6 of 9" in " ".join(result.output.split())
    assert read_manifest(learned / "train-masks" / NAME).results["budgets"]["0.8"]["steps"] == 9


def test_other_settings_than_those_of_an_unfinished_training_are_told(learned, monkeypatch):
    with monkeypatch.context() as during:
        break_at(during, 3, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            train_masks(TrainMasksConfig(**TRAINING), Run(learned), name="x")
    heard = Recorder()
    other = {**TRAINING, "steps": 1}
    train_masks(TrainMasksConfig(**other), Run(learned, report=heard), name="x")
    assert "an unfinished train-masks/x was begun with other settings: its work is thrown away" in heard.warnings
    again = Recorder()
    train_masks(TrainMasksConfig(**other), Run(learned, report=again), name="x")
    assert not [text for text in again.warnings if "unfinished" in text]


@pytest.mark.parametrize("cut_off", [False, True], ids=["", "and cut off while it is stored"])
def test_force_trains_anew_what_was_stopped(learned, monkeypatch, cut_off):
    config = TrainMasksConfig(**TRAINING)
    with monkeypatch.context() as during:
        break_at(during, 7, KeyboardInterrupt)
        if cut_off:
            during.setattr(StageWriter, "_commit", raising(KeyboardInterrupt))
        try:
            train_masks(config, Run(learned), name="stopped", keep_on_interrupt=True)
        except KeyboardInterrupt:
            assert cut_off
    counted = []
    monkeypatch.setattr(MaskedModel, "gradients", counting(MaskedModel.gradients, counted))
    same_training(train_masks(config, Run(learned, force=True), name="stopped"), learned)
    assert len(counted) == 8


def test_budgets_that_a_training_has_are_not_trained_again(learned, monkeypatch):
    monkeypatch.setattr(MaskedModel, "gradients", raising(AssertionError))
    for keep in [(0.6,), (0.8,), (0.6, 0.8), (0.8, 0.6, 0.8)]:
        assert train_masks(TrainMasksConfig(**{**TRAINING, "keep": keep}), Run(learned)).name == NAME
    for other in ({"keep": (0.7,)}, {"steps": 3}, {"seed": 1}, {"layout": "pivoted"}):
        with pytest.raises(AssertionError):
            train_masks(TrainMasksConfig(**{**TRAINING, **other}), Run(learned))


def test_a_training_at_the_budget_is_preferred_to_a_later_one(learned):
    train_masks(TrainMasksConfig(**{**TRAINING, "keep": (0.75,), "steps": 1}), Run(learned))

    def used(keep):
        view = allocate(AllocateConfig(keep=keep, method="ara", guard=False, **TUNING), Run(learned))
        return next(parent.key for parent in view.manifest.parents if parent.key.startswith("train-masks/"))

    assert used(0.8) == used(0.62) == f"train-masks/{NAME}"
    assert used(0.75) == used(0.72) == "train-masks/priced-0.75"


def test_run_takes_a_training_that_was_made_otherwise(tmp_path, tiny_settings, monkeypatch):
    settings = {key.replace("_", "-"): value for key, value in tiny_settings.items() if key != "model"}
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    words = ["run", tiny_settings["model"], *words, "--method", "ara", "--keep", "0.8", "--no-eval", "-w", tmp_path]
    decompose(DecomposeConfig(**tiny_settings), Run(tmp_path))
    longer = train_masks(
        TrainMasksConfig(keep=(0.8, 0.7), steps=13, check_every=13, dtype=tiny_settings["dtype"]),
        Run(tmp_path),
        name="mine",
    )
    monkeypatch.setattr(MaskedModel, "gradients", raising(AssertionError))
    assert ara(*words).exit_code == 0
    (ranks,) = Run(tmp_path).open().views("ranks")
    assert longer.key in [parent.key for parent in ranks.manifest.parents]


@pytest.mark.parametrize(("layout", "words"), [("factors", []), ("pivoted", ["--layout", "pivoted"])])
def test_the_next_command_goes_with_the_training(learned, layout, words):
    shutil.rmtree(learned / "train-masks")
    train_masks(TrainMasksConfig(**{**TRAINING, "keep": (0.75,), "steps": 1}, layout=layout), Run(learned))
    assert shlex.split(next_command(Run(learned).open()))[:-2] == ["ara", "allocate", "--keep", "0.75", *words]


@pytest.mark.parametrize("optimiser", ["newton", "adam"])
@pytest.mark.parametrize("winner", ["sensitivity", "learned"])
def test_a_later_budget_starts_at_the_better_of_two_places(learned, monkeypatch, winner, optimiser):
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

    heard = Recorder()
    monkeypatch.setattr(MaskedModel, "nll", judged)
    run = Run(learned, report=heard)
    view = train_masks(TrainMasksConfig(**TRAINING, optimiser=optimiser, atoms=8, learning_rate=3.0), run, name="two")
    budgets = view.manifest.results["budgets"]
    assert [row["start"] for row in budgets.values()] == ["sensitivity", winner]
    assert len(places) == 2 and places[0] != places[1]
    assert budgets["0.6"]["start_held_out"] == pytest.approx(places[winner == "learned"], rel=1e-6)
    before = budgets["0.8"]["backward_passes"] if winner == "learned" else 0
    assert training_cost(view, 0.6).backward_passes == 8 + before + 12
    assert training_cost(view, 0.8).backward_passes == 8 + 12


@pytest.mark.parametrize(("objective", "passes"), [("priced", 8 + 12 + 12), ("paper", 8 + 12)])
def test_the_cost_of_a_training_that_does_not_say_where_it_started(learned, objective, passes):
    view = Run(learned).open().require("training")
    view.manifest.config["objective"] = objective
    for row in view.manifest.results["budgets"].values():
        del row["start"]
    assert training_cost(view, 0.6).backward_passes == passes


def test_compare_counts_what_the_training_has_cost(learned, tiny_text):
    trained = Run(learned).open().require("training").manifest.results
    config = CompareConfig(keep=0.61, methods=("ara",), tasks=(tiny_text,), eval_seq_len=64, max_windows=1, **TUNING)
    row = compare(config, Run(learned)).manifest.results["methods"]["ara"]
    # That of 0.8 counts where the training at 0.6 has gone on from it.
    later, before = trained["budgets"]["0.6"], trained["budgets"]["0.8"]
    led = [later, before] if later["start"] == "learned" else [later]
    assert row["backward_passes"] == trained["table_windows"] + sum(each["backward_passes"] for each in led)
    assert row["seconds"] >= trained["table_seconds"] + sum(each["seconds"] for each in led)
