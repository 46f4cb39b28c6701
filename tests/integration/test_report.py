"""``ara report`` from the command line, on a tiny workspace."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from ara.config import AllocateConfig, CompareConfig, EvalConfig, TrainMasksConfig, TruncateConfig
from ara.reporting.document import Report
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.compare import compare
from ara.stages.evaluate import evaluate
from ara.stages.train_masks import train_masks
from ara.stages.truncate import truncate
from ara.workspace.manifest import file_record
from ara.workspace.store import Workspace
from tests.commands import ara, done, refused
from tests.damage import contents, flip, listing
from tests.tiny import story

NAME = "energy-0.70"


def document(root, name=NAME):
    return Report.model_validate_json((root / "report" / name / "report.json").read_text(encoding="utf-8"))


@pytest.fixture
def two_budgets(copied, tiny_text):
    """Return a workspace with a second checkpoint that has read the same windows; the first one is the latest."""
    run = Run(copied)
    config = EvalConfig(tasks=(tiny_text,), seq_len=64, max_windows=4, device="cpu", dtype="float32", prompt="a <b> &")
    for keep in (0.5, 0.7):
        ranks = allocate(AllocateConfig(keep=keep, method="energy"), run)
        evaluate(config, run, checkpoint=truncate(TruncateConfig(), run, allocation=ranks.name).name)
    return copied


def test_a_report_is_written_and_listed(copied):
    card = f"{NAME}/checkpoint/README.md"
    sealed = contents(copied / "truncate")
    result = done("report", "-w", copied)
    page, report = copied / "report" / NAME / "report.html", document(copied)
    assert f"Saved in {page}" in result.stderr
    assert report.verdict in result.stdout
    assert "without speed and memory: ara bench" in result.stderr
    assert listing(page.parent) == {"manifest.json", "report.html", "report.json"}
    measured = Workspace.open(copied).view(f"eval/{NAME}-{story()}").manifest.results
    (text,) = measured["tasks"].values()
    assert report.evaluations[0].texts[0].models[NAME].perplexity == text["models"][NAME]["perplexity"]
    assert report.verdict in page.read_text(encoding="utf-8")
    view = Workspace.open(copied).view(f"report/{NAME}")
    assert [parent.key for parent in view.manifest.parents] == [
        f"truncate/{NAME}", f"allocate/{NAME}", "decompose/two-sided", f"eval/{NAME}-{story()}"
    ]  # fmt: skip
    assert f"of truncate/{NAME}, report.html" in done("status", "-w", copied).stdout
    # Of what was there, the card alone has changed.
    after = contents(copied / "truncate")
    assert after.pop(card) != sealed.pop(card)
    assert after == sealed


def test_ranks_and_spectra_are_those_of_the_files(copied):
    done("report", "-w", copied)
    ranks = json.loads((copied / "allocate" / NAME / "ranks.json").read_text())["ranks"]
    for layer in document(copied).layers:
        assert ranks[layer.name] == (layer.rank or "dense")
        with safe_open(copied / "decompose" / "two-sided" / f"layer-{layer.layer:03d}.safetensors", "pt") as file:
            spectrum = file.get_tensor(f"{layer.name}.spectrum")
        cut = len(spectrum) if layer.rank is None else layer.rank
        assert layer.left == pytest.approx(float(spectrum[cut:].sum() / spectrum.sum()))


def test_nothing_new_means_nothing_to_do(copied, tiny_text):
    done("report", "-w", copied)
    before = contents(copied / "report")
    assert "is there already" in done("report", "-w", copied).stderr
    assert contents(copied / "report") == before
    config = EvalConfig(tasks=(tiny_text,), seq_len=48, max_windows=2, device="cpu", dtype="float32")
    evaluate(config, Run(copied), name="more")
    done("report", "-w", copied)
    assert [found.name for found in document(copied).evaluations] == [f"{NAME}-{story()}", "more"]


def test_a_changed_result_makes_the_report_stale(copied, tiny_text):
    done("report", "-w", copied)
    config = EvalConfig(tasks=(tiny_text,), seq_len=48, max_windows=2, device="cpu", dtype="float32")
    evaluate(config, Run(copied))
    view = Workspace.open(copied).view(f"report/{NAME}")
    assert (view.state, view.why) == ("stale", f"eval/{NAME}-{story()} has changed since")
    done("report", "-w", copied)
    assert Workspace.open(copied).view(f"report/{NAME}").state == "done"


def test_stale_results_are_left_out_and_named(copied):
    truncate(TruncateConfig(densify=True), Run(copied), name=NAME)
    done("report", "-w", copied)
    report = document(copied)
    assert report.evaluations == ()
    assert f"eval/{NAME}-{story()} is stale and left out" in [item.what for item in report.missing]
    assert "its quality was not measured" in report.verdict


def test_fronts_over_two_budgets(two_budgets):
    done("report", "-w", two_budgets, "--checkpoint", NAME)
    report = document(two_budgets)
    (front,) = report.fronts
    chosen = {point.checkpoint: point for point in front.points if point.series == "energy"}
    assert set(chosen) == {NAME, "energy-0.50"}
    assert chosen["energy-0.50"].linear_keep < chosen[NAME].linear_keep
    assert [name for name, point in chosen.items() if point.current] == [NAME]
    page = (two_budgets / "report" / NAME / "report.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt; &amp;…" in page and "a <b>" not in page


def test_training_guard_and_comparison_of_real_stages(copied, tiny_text):
    small = {"samples": 8, "held_out": 4, "device": "cpu", "dtype": "float32"}
    run = Run(copied)
    train_masks(TrainMasksConfig(keep=(0.7,), steps=2, batch=3, check_every=1, **small), run)
    allocate(AllocateConfig(keep=0.7, method="ara", **small), run)
    truncate(TruncateConfig(), run)
    tasks = {"tasks": (tiny_text,), "eval_seq_len": 64, "max_windows": 2, "methods": ("uniform", "energy")}
    compare(CompareConfig(keep=0.7, **tasks, **small), run)
    done("report", "-w", copied)
    report = document(copied, "ara-0.70")
    assert not [item.what for item in report.missing if "another form" in item.what]
    (curve,) = report.training.curves
    log = Workspace.open(copied).view("train-masks/priced-0.70").manifest.results["log"]["0.7"]
    assert [(step.step, step.loss, step.held_out) for step in curve.log] == [
        (row["step"], row["loss"], row["held_out"]) for row in log
    ]
    assert report.allocation.guard.winner in report.allocation.guard.held_out
    assert set(report.comparisons[0].methods) == {"dense", "uniform", "energy"}
    page = (copied / "report" / "ara-0.70" / "report.html").read_text(encoding="utf-8")
    assert "Allocators compared" in page and "held-out loss (ring: kept)" in page


def test_json_is_the_manifest(copied):
    found = json.loads(done("report", "-w", copied, "--json").stdout)
    assert found["path"] == str(copied / "report" / NAME)
    assert found["results"]["verdict"] == document(copied).verdict


def test_a_copy_of_the_page(copied, tmp_path):
    output = tmp_path / "out" / "page.html"
    refused(ara("report", "-w", copied, "--output", output), 1, "there is no folder")
    assert not (copied / "report").exists()  # refused before any work
    output.parent.mkdir()
    result = done("report", "-w", copied, "--output", output)
    assert f"Saved in {output}" in result.stderr
    assert output.read_bytes() == (copied / "report" / NAME / "report.html").read_bytes()
    done("report", "-w", copied, "--output", output)  # an earlier report may be replaced
    output.write_text("my own page", encoding="utf-8")
    refused(ara("report", "-w", copied, "--output", output), 1, "is no report of ara")
    assert output.read_text(encoding="utf-8") == "my own page"
    done("report", "-w", copied, "--output", output, "--force")
    assert listing(output.parent) == {"page.html"}
    refused(ara("report", "-w", copied, "--output", tmp_path), 1, "is a folder")


@pytest.mark.parametrize("place", ["page.html", f"truncate/{NAME}/checkpoint/README.md"])
@pytest.mark.parametrize("flag", ["--output", "--model-card"])
def test_nothing_is_put_into_the_workspace(copied, place, flag):
    before = contents(copied)
    refused(ara("report", "-w", copied, flag, copied / place, "--force"), 1, "is in the workspace")
    assert contents(copied) == before


def test_the_model_card(copied, tmp_path):
    card = tmp_path / "README.md"
    first = (copied / "truncate" / NAME / "checkpoint" / "README.md").read_text(encoding="utf-8")
    done("report", "-w", copied, "--model-card", card)
    shared = [line for line in first.splitlines() if line.startswith("|")]
    assert shared and set(shared) <= set(card.read_text(encoding="utf-8").splitlines())
    text = card.read_text(encoding="utf-8")
    perplexity = document(copied).evaluations[0].texts[0].models[NAME].perplexity
    assert f"{perplexity:,.2f}" in text and f'"value": {perplexity}' in text
    assert str(copied) not in text and str(tmp_path) not in text
    assert (copied / "truncate" / NAME / "checkpoint" / "README.md").read_text(encoding="utf-8") == text
    refused(ara("report", "-w", copied, "--model-card", card), 1, "is there already")
    done("report", "-w", copied, "--model-card", card, "--force")


def test_the_card_in_the_checkpoint_makes_nothing_stale_and_nothing_damaged(copied):
    from export.stage import source_hash

    folder = copied / "truncate" / NAME / "checkpoint"
    card = folder / "README.md"
    exported, first = source_hash(folder), card.read_bytes()
    done("report", "-w", copied)
    full = card.read_bytes()
    assert full != first and source_hash(folder) == exported
    assert {view.state for view in Workspace.open(copied).views()} == {"done"}
    Workspace.open(copied).require("checkpoint", NAME)  # all checksums fit
    # What somebody has written over it, or removed, comes back; nothing is left beside it.
    for damage in (lambda: card.write_text("mine"), card.unlink):
        damage()
        assert "is there already" in done("report", "-w", copied).stderr
        assert card.read_bytes() == full
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_a_card_under_checksums_stays_as_it_is(copied):
    path = copied / "truncate" / NAME
    view = Workspace.open(copied).view(f"truncate/{NAME}")
    files = {**view.manifest.files, "checkpoint/README.md": file_record(path / "checkpoint" / "README.md")}
    old = view.manifest.model_copy(update={"files": files}).sealed()
    (path / "manifest.json").write_text(old.model_dump_json(), encoding="utf-8")
    before = contents(path)
    assert "is not changed" in done("report", "-w", copied).stderr
    assert contents(path) == before
    Workspace.open(copied).require("checkpoint", NAME)


def test_the_card_of_an_earlier_report(copied, tmp_path):
    done("report", "-w", copied)
    done("report", "-w", copied, "--model-card", tmp_path / "card.md")
    assert document(copied).title in (tmp_path / "card.md").read_text(encoding="utf-8")


def test_a_damaged_spectrum_is_found(copied):
    path = copied / "decompose" / "two-sided" / "layer-001.safetensors"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    start, _ = header["model.layers.1.mlp.up_proj.spectrum"]["data_offsets"]
    flip(path, 8 + length + start)
    refused(ara("report", "-w", copied, "-q"), 1, "model.layers.1.mlp.up_proj.spectrum does not match its checksum")
    path.write_bytes(b"x")
    refused(ara("report", "-w", copied, "-q"), 1, "cannot be read")
    assert not (copied / "report").exists() or not os.listdir(copied / "report")


def test_edited_ranks_are_found(copied):
    path = copied / "allocate" / NAME / "ranks.json"
    flip(path, -20)
    refused(ara("report", "-w", copied, "-q"), 1, "does not match its checksum")


def test_a_damaged_report_is_not_handed_out(copied, tmp_path):
    done("report", "-w", copied)
    flip(copied / "report" / NAME / "report.html", 3000)
    refused(ara("report", "-w", copied, "--output", tmp_path / "page.html", "-q"), 1, "does not match its checksum")
    assert not (tmp_path / "page.html").exists()


def test_no_checkpoint_no_report(copied):
    shutil.rmtree(copied / "truncate")
    refused(ara("report", "-w", copied), 1, "no result of ara truncate yet")
    refused(ara("report", "-w", copied.parent / "none"), 1, "there is no workspace")


def test_name_and_checkpoint(two_budgets):
    done("report", "-w", two_budgets, "--checkpoint", "energy-0.50", "--name", "half")
    assert document(two_budgets, "half").checkpoint.name == "energy-0.50"
    refused(ara("report", "-w", two_budgets, "--checkpoint", "energy-0.5"), 1, "did you mean energy-0.50")


def test_the_page_names_no_folder_but_in_commands(copied):
    done("report", "-w", copied)
    report = document(copied)
    model = Workspace.open(copied).model["location"]
    text = report.model_copy(update={"work": (), "missing": ()}).model_dump_json()
    text = text.replace(json.dumps(report.base.requested), "")  # as it was typed
    assert str(Path(model).parent) not in text
