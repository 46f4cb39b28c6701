"""The report is what the manifests say: every figure in its place, nothing claimed beyond it, gaps named."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import typer

from ara.artifacts.graph import ParityCase
from ara.reporting.document import Report
from ara.reporting.evaluation_parts import Difference
from ara.reporting.gather import Made, gather, layers
from ara.reporting.summary import differs
from ara.reporting.tables import export_table
from ara_cli.app import COMMANDS, app
from tests.reported import (
    EVIL,
    NAME,
    WINDOWS,
    allocation,
    bare,
    bench,
    decomposition,
    evaluation,
    export,
    manifest,
    modules,
    ranks,
    sources,
    text_rows,
    training,
    truncated,
)

GROUP = typer.main.get_command(app)


def changed(original, **results):
    """Return a manifest with other results."""
    return original.model_copy(update={"results": {**original.results, **results}})


def with_evaluation(**results):
    """Return everything, with an evaluation that was changed."""
    return replace(sources(), current=Made(truncated(), allocation(), (changed(evaluation(), **results),), (bench(),)))


def test_the_document_is_json_and_comes_back():
    report = gather(sources())
    text = report.model_dump_json()
    assert Report.model_validate_json(text) == report
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert EVIL in report.evaluations[0].continuations[0].models[NAME]


@pytest.mark.parametrize("place", ["layers", "exports", "speed_front"])
def test_a_part_with_an_unknown_name_or_nan_is_refused(place):
    data = gather(sources()).model_dump(mode="json")
    part = data["exports"][0]["parity"][0] if place == "exports" else data[place]
    part = part[0] if place == "layers" else part["points"][0]["ratio"] if place == "speed_front" else part
    number = next(name for name, value in part.items() if isinstance(value, float))
    for wrong in ({"unknown": 1}, {number: math.nan}):
        before = dict(part)
        part.update(wrong)
        with pytest.raises(ValueError, match=f"{place}\\."):
            Report.model_validate(data)
        part.clear()
        part.update(before)
    Report.model_validate(data)


def test_figures_are_those_of_the_manifests():
    report = gather(sources())
    assert report.checkpoint.disk_bytes == 200 << 20
    assert report.checkpoint.disk_keep == 0.8
    assert report.allocation.model_keep == pytest.approx(103_457 / 123_457)
    (found,) = report.evaluations
    rows = text_rows(NAME)
    for model, row in found.texts[0].models.items():
        assert row.perplexity == rows[model]["perplexity"] and row.nll == rows[model]["nll"]
        assert row.speed.median == rows[model]["tokens_per_second"]["median"]
    assert found.texts[0].models[NAME].kl == 0.22
    assert found.texts[1].models[NAME].kl is None
    assert found.texts[0].models["dense"].kl is None
    assert found.harness[0].models["uniform"].value == 0.48
    assert found.zero_shot.compared["dense"].p == 0.012
    decode = report.benches[0].cases[1].models[NAME]
    assert (decode.macs, decode.bytes_read) == (int(68_765_432_100 / 1.15), 270.5 * 2**20 / 1.15)
    assert decode.ratio.median == 1.15 and decode.seconds.high == pytest.approx(0.024 / 1.15)
    assert [curve.won for curve in report.training.curves] == pytest.approx([0.12, 0.1])
    assert report.training.curves[0].log[3].loss is None  # it was NaN
    assert report.comparisons[0].methods["tanh"].error == "the loss is nan"
    assert report.exports[0].graph_bytes == 1 << 20
    assert [work.key.partition("/")[0] for work in report.work] == [
        "decompose", "train-masks", "allocate", "truncate", "eval", "bench", "compare", "export"
    ]  # fmt: skip


def test_the_difference_to_uniform_ranks_is_taken_window_by_window():
    rows = text_rows(NAME)
    one, other = np.array(rows[NAME]["window_nlls"]), np.array(rows["uniform"]["window_nlls"])
    found = gather(sources()).evaluations[0].texts[0].over_uniform
    assert found.difference == pytest.approx((one - other).mean())
    assert found.stderr == pytest.approx((one - other).std(ddof=1) / math.sqrt(WINDOWS))


def test_speed_is_relative_to_dense_only_where_models_ran_in_turn():
    ratio = gather(sources()).evaluations[0].texts[0].models[NAME].ratio
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((720 / 700, 650 / 740, 742 / 650))
    apart = gather(with_evaluation(interleaved=False))
    assert all(row.ratio is None for row in apart.evaluations[0].texts[0].models.values())


def test_a_benchmark_of_models_one_after_the_other_compares_no_speeds():
    apart = changed(bench(), interleaved=False)
    report = gather(replace(sources(), current=Made(truncated(), allocation(), (evaluation(),), (apart,))))
    assert {row.ratio for case in report.benches[0].cases for row in case.models.values()} == {None}
    assert "generation" not in report.verdict
    assert report.speed_front.speed == "reading"


def test_every_layer_has_its_rank_and_what_is_cut_off():
    found, spectra = layers(modules(), ranks()), {module.spec.name: module.spectrum.numpy() for module in modules()}
    assert {layer.name: layer.rank for layer in found} == ranks().ranks
    for layer in found:
        spectrum = spectra[layer.name]
        left = 0.0 if layer.rank is None else spectrum[layer.rank :].sum() / spectrum.sum()
        assert layer.left == pytest.approx(left)
        cost = layer.m * layer.n if layer.rank is None else layer.rank * (layer.m + layer.n)
        assert layer.keep == pytest.approx(cost / (layer.m * layer.n))
        assert layer.components[0] == 1 and layer.components[-1] == len(spectrum)
        assert list(layer.components) == sorted(set(layer.components))
        assert layer.rank is None or layer.rank in layer.components
        listed = spectrum[np.array(layer.components) - 1] / spectrum.sum()
        np.testing.assert_allclose(layer.spectrum, listed, rtol=1e-4)


def test_no_folder_of_this_machine_but_in_commands_as_they_were_typed():
    report = gather(sources())
    text = report.model_copy(update={"work": (), "missing": ()}).model_dump_json()
    assert "/home" not in text and "secret" not in text
    assert report.work[0].command == "ara decompose -w /home/me/ws --name two-sided"
    assert report.evaluations[0].texts[1].task == "file:story.jsonl"
    assert report.decomposition.origin == "file c4_rp1.jsonl"


def test_two_files_of_one_name_stay_apart():
    tasks = {f"file:/{folder}/x.txt": evaluation().results["tasks"]["wikitext2"] for folder in "abc"}
    (found,) = gather(with_evaluation(tasks=tasks)).evaluations
    assert [text.task for text in found.texts] == ["file:x.txt", "file:x.txt (2)", "file:x.txt (3)"]


def test_verdict_of_everything():
    assert gather(sources()).verdict == (
        "llama with 83.8% of its parameters (200.0 instead of 250.0 MiB of weights on disk); "
        "perplexity on WikiText-2 20.23 → 30.23 (uniform ranks: 45.05); "
        "perplexity on file:story.jsonl 20.23 → 36.92 (uniform ranks: 45.05); "
        "mean accuracy over 2 zero-shot tasks 61.0% → 57.0% (uniform ranks: 48.0%); "
        "empty answers to 24 conversations of chat:said.jsonl 0 → 17 (uniform ranks: 23); "
        "generation speed in torch (cpu, bfloat16, 2 threads) 1.15 × dense (1.10 – 1.20)."
    )


def test_verdict_names_every_runtime_and_tasks_without_a_mean():
    onnx = changed(bench(ratio=0.9), backend="onnx", precision="int8", threads=1).model_copy(update={"name": "other"})
    tasks = {"piqa": evaluation().results["tasks"]["piqa"]}
    found = changed(evaluation(), tasks=tasks, zero_shot=None)
    report = gather(replace(sources(), current=Made(truncated(), allocation(), (found,), (bench(), onnx))))
    assert report.verdict.endswith(
        "; acc on piqa 61.0% → 57.0% (uniform ranks: 48.0%); "
        "generation speed in torch (cpu, bfloat16, 2 threads) 1.15 × dense (1.10 – 1.20), "
        "generation speed in ONNX Runtime (cpu, int8, 1 thread) 0.90 × dense (0.85 – 0.95)."
    )


@pytest.mark.parametrize("change", [{"device": "cuda"}, {"precision": "float32"}, {"threads": 1}])
def test_speeds_of_other_devices_precisions_and_threads_are_kept_apart(change):
    other = changed(bench(ratio=0.9), **change).model_copy(update={"name": "other"})
    report = gather(replace(sources(), current=Made(truncated(), allocation(), (), (bench(), other))))
    assert "1.15 × dense" in report.verdict and "0.90 × dense" in report.verdict
    far = Made(
        truncated("b"), allocation("b", keep=0.6), (evaluation("b", 0.6),), (changed(bench("b", 1.4), **change),)
    )
    front = gather(sources(others=(far,))).speed_front
    assert {point.checkpoint for point in front.points} == {"dense", NAME}
    assert front.speed == "generating after 512 tokens in torch (cpu, bfloat16, 2 threads)"


def test_speeds_of_another_machine_are_on_no_front():
    far = changed(bench("b", 1.4), machine={**bench().results["machine"], "processor": "C"})
    other = Made(truncated("b"), allocation("b", keep=0.6), (evaluation("b", 0.6),), (far,))
    front = gather(sources(others=(other,))).speed_front
    assert {point.checkpoint for point in front.points} == {"dense", NAME}


def test_the_quality_of_one_precision_is_not_drawn_against_the_speed_of_another():
    int8 = changed(bench(ratio=0.9), precision="int8")
    front = gather(
        replace(sources(others=()), current=Made(truncated(), allocation(), (evaluation(),), (int8,)))
    ).speed_front
    assert front.speed == "reading"


@pytest.mark.parametrize("few", [10, 500])
def test_the_evaluation_with_most_questions_counts_not_the_latest(few):
    tasks = {name: row for name, row in evaluation().results["tasks"].items() if row["kind"] == "harness"}
    tasks = {name: {**row, "examples": few} for name, row in tasks.items()}
    mean = evaluation().results["zero_shot"]
    models = {name: {**row, "mean": 0.1} for name, row in mean["models"].items()}
    later = changed(evaluation(), tasks=tasks, zero_shot={**mean, "models": models})
    report = gather(replace(sources(), current=Made(truncated(), allocation(), (evaluation(), later), ())))
    assert ("over 2 zero-shot tasks 10.0%" in report.verdict) == (few > 400)


@pytest.mark.parametrize(("p", "words"), [(0.3, "48.0%, no significant difference)"), (0.01, "48.0%)")])
def test_verdict_tests_the_difference_to_uniform_ranks(p, words):
    mean = evaluation().results["zero_shot"]
    compared = {**mean["compared"], "uniform": {"difference": 0.09, "p": p, "test": "bootstrap"}}
    verdict = gather(with_evaluation(zero_shot={**mean, "compared": compared})).verdict
    assert f"over 2 zero-shot tasks 61.0% → 57.0% (uniform ranks: {words};" in verdict


def test_verdict_of_nothing():
    assert gather(bare()).verdict == (
        "llama with 83.8% of its parameters (200.0 instead of 250.0 MiB of weights on disk); "
        "its quality was not measured; its speed was not measured."
    )


@pytest.mark.parametrize(
    ("level", "words"),
    [
        (3.4, "(uniform ranks: 45.05)"),
        (3.8, "(uniform ranks: 45.05, no difference beyond the noise)"),
        (4.2, "(uniform ranks: 45.05, which is better)"),
    ],
)
def test_verdict_tells_noise_and_a_loss_to_uniform_ranks(level, words):
    task = {"kind": "text", "text": "", "windows": WINDOWS, "seq_len": 64, "models": text_rows(NAME, level)}
    noisy = [value + (0.01 if i % 2 else -0.01) for i, value in enumerate(task["models"]["uniform"]["window_nlls"])]
    task["models"]["uniform"]["window_nlls"] = noisy
    assert words in gather(with_evaluation(tasks={"c4": task})).verdict


@pytest.mark.parametrize(
    ("difference", "count", "expected"),
    [
        (None, 100, None),
        (Difference(difference=0.31, stderr=0.1), 8, True),
        (Difference(difference=-0.31, stderr=0.1), 8, True),
        (Difference(difference=0.29, stderr=0.1), 8, False),
        (Difference(difference=0.3, stderr=0.1), 3, None),  # too few windows for an error of the mean
        (Difference(difference=0.3), 8, None),
        (Difference(difference=0.3, p=0.04), None, True),
        (Difference(difference=0.3, p=0.06), None, False),
    ],
)
def test_what_counts_as_a_difference(difference, count, expected):
    assert differs(difference, count) is expected


def test_a_checkpoint_that_was_multiplied_back_is_not_called_smaller():
    made = Made(truncated(densified=True, disk_bytes=250 << 20), allocation())
    report = gather(replace(sources(), current=made))
    assert report.title == "llama, cut by ARA to 83.8% of its parameters and multiplied back"
    assert report.verdict.startswith(
        "llama cut to 83.8% of its parameters and multiplied back to all of them (250.0 instead of 250.0 MiB "
    )


def test_exports_say_what_the_report_reads():
    from dataclasses import fields

    from export.onnx.export_report import ExportReport
    from export.onnx.tolerance import Parity

    assert {field.name for field in fields(ParityCase)} <= {field.name for field in fields(Parity)}
    assert set(export().results) <= set(ExportReport.model_fields)


def test_speed_within_its_spread_is_no_difference():
    made = Made(truncated(), allocation(), (), (bench(ratio=1.03),))
    verdict = gather(replace(sources(), current=made)).verdict
    assert "generation speed in torch (cpu, bfloat16, 2 threads) 1.03 × dense (0.98 – 1.08, no difference" in verdict
    reading = gather(replace(sources(), current=Made(truncated(), allocation(), (evaluation(),)))).verdict
    assert "reading speed 1.03 × dense (0.88 – 1.14, no difference beyond the spread)" in reading


def test_fronts_hold_all_checkpoints_that_have_read_the_same_windows():
    report = gather(sources())
    first = report.fronts[0]
    assert (first.task, first.windows, first.seq_len) == ("WikiText-2", WINDOWS, 2048)
    points = {(point.series, round(point.linear_keep, 3)): point for point in first.points}
    assert set(points) == {("ara", 0.8), ("ara", 0.6), ("uniform", 0.799), ("uniform", 0.599)}
    assert [point.checkpoint for point in first.points if point.current] == [NAME]
    assert points["ara", 0.6].perplexity == text_rows("x", 4.0)["x"]["perplexity"]
    speeds = {(point.series, point.checkpoint): point.ratio.median for point in report.speed_front.points}
    assert speeds == {("dense", "dense"): 1, ("ara", NAME): 1.15, ("ara", "ara-0.60"): 1.4}
    assert report.speed_front.measure == "accuracy"


def test_a_later_evaluation_that_others_do_not_share_hides_no_front():
    lonely = evaluation().model_copy(update={"config": {**evaluation().config, "dtype": "float32"}, "name": "later"})
    current = Made(truncated(), allocation(), (evaluation(), lonely))
    report = gather(sources(current=current))
    assert [(front.dtype, len(front.points)) for front in report.fronts] == [("bfloat16", 4), ("bfloat16", 4)]


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"dtype": "float32", "text_sha256": {"wikitext2": "a" * 64}}},
        {"config": {"dtype": "bfloat16", "text_sha256": {"wikitext2": "c" * 64}}},
    ],
    ids=["precision", "text"],
)
def test_what_cannot_be_compared_is_on_no_front(change):
    other = Made(truncated("b"), allocation("b", keep=0.6), (evaluation("b", 0.6).model_copy(update=change),))
    front = gather(sources(others=(other,))).fronts[0]
    assert {point.checkpoint for point in front.points} == {NAME, "uniform"}


def test_a_checkpoint_of_the_same_size_does_not_hide_the_current_one():
    twin = Made(truncated("b"), allocation("b", keep=0.8), (evaluation("b", 0.8, 3.6),))
    for front in gather(sources(others=(twin,))).fronts:
        chosen = {point.checkpoint: point.current for point in front.points if point.series == "ara"}
        assert chosen == {NAME: True, "b": False}


@pytest.mark.parametrize(
    ("change", "shared"),
    [({}, True), ({"text_sha256": {"piqa": "d" * 64}}, False), ({"dtype": "float32"}, False)],
    ids=["same", "questions", "precision"],
)
def test_accuracy_over_other_questions_or_in_other_precision_is_on_no_front(change, shared):
    found = evaluation("b", 0.6)
    found = found.model_copy(update={"config": {**found.config, **change}})
    other = Made(truncated("b"), allocation("b", keep=0.6), (found,), (bench("b", 1.4),))
    front = gather(sources(others=(other,))).speed_front
    assert front.measure == "accuracy"
    assert ("b" in {point.checkpoint for point in front.points}) == shared


def test_other_windows_are_on_no_front():
    tasks = {task: {**row, "windows": 7} for task, row in evaluation().results["tasks"].items()}
    other = Made(truncated("b"), allocation("b"), (changed(evaluation("b"), tasks=tasks),))
    assert {point.checkpoint for point in gather(sources(others=(other,))).fronts[0].points} == {NAME, "uniform"}


def test_layout_and_densified_are_series_of_their_own():
    other = Made(truncated("b", densified=True), allocation("b", layout="pivoted"), (evaluation("b", 0.6),))
    series = {point.series for point in gather(sources(others=(other,))).fronts[0].points}
    assert series == {"ara", "uniform", "ara, pivoted, densified", "uniform, pivoted, densified"}


def test_without_zero_shot_tasks_the_speed_front_shows_perplexity():
    tasks = {"wikitext2": evaluation().results["tasks"]["wikitext2"]}
    front = gather(with_evaluation(tasks=tasks, zero_shot=None)).speed_front
    assert (front.measure, front.task, front.speed) == (
        "perplexity",
        "WikiText-2",
        "generating after 512 tokens in torch (cpu, bfloat16, 2 threads)",
    )
    (point,) = [point for point in front.points if point.current]
    assert point.quality == text_rows(NAME)[NAME]["perplexity"]
    assert point.stderr == pytest.approx(point.quality * 0.025)


def test_what_is_missing_comes_with_a_command_that_exists():
    missing = {item.what: shlex.split(item.command) for item in gather(replace(bare(), place=("-w", "a b"))).missing}
    assert set(missing) == {
        "perplexity",
        "zero-shot accuracy",
        "continuations of a prompt",
        "speed and memory",
        "training curves (these ranks are not trained)",
        "a comparison of allocators",
        "an export for other runtimes",
    }
    for words in missing.values():
        assert words[0] == "ara" and words[-2:] == ["-w", "a b"]
        if words[1] in COMMANDS:
            known = {flag for parameter in GROUP.get_command(None, words[1]).params for flag in parameter.opts}
            assert {word for word in words if word.startswith("-")} <= known
    assert gather(sources()).missing == ()
    alone = gather(sources(others=())).missing
    assert [item.what for item in alone] == ["a second budget on the same windows"]


@pytest.mark.parametrize(("repaired_with", "asked"), [("wikitext2", "python-docs"), ("c4", None)])
def test_a_model_is_judged_by_a_text_that_no_repair_has_read(repaired_with, asked):
    part = {"name": repaired_with, "share": 1.0, "origin": repaired_with, "tokens": 512}
    figures = dict.fromkeys(("before", "after", "dense_loss", "loss_before", "loss_after"), 3.0)
    repair = {**figures, "parts": [part], "windows": 8, "held_out": 4, "seq_len": 64, "levels": []}
    tasks = {"wikitext2": evaluation().results["tasks"]["wikitext2"]}
    measured = changed(evaluation(), tasks=tasks, zero_shot=None)
    current = Made(truncated(recovery=repair), allocation(), (measured,), (bench(),))
    missing = {item.what: shlex.split(item.command) for item in gather(replace(sources(), current=current)).missing}
    wanted = missing.get("a text that nothing was fitted to")
    assert (None if wanted is None else wanted[wanted.index("--tasks") + 1]) == asked


def test_stale_results_are_named():
    (first, *_) = gather(sources(stale=(evaluation("old"),))).missing
    assert first.what == "eval/old-all is stale and left out"
    assert first.command == "ara eval -w /home/me/ws --name old-all"


@pytest.mark.parametrize("stage", ["eval", "bench", "compare", "export", "train-masks"])
def test_a_result_in_another_form_is_left_out_and_named(stage):
    strange = manifest(stage, "strange", {"figures": 1}, command="ara (library call)")
    parts = {
        "eval": {"current": Made(truncated(), allocation(), (strange,))},
        "bench": {"current": Made(truncated(), allocation(), (), (strange,))},
        "compare": {"comparisons": (strange,)},
        "export": {"exports": (strange,)},
        "train-masks": {"training": strange},
    }
    report = gather(sources(**parts[stage]))
    (first, *_) = report.missing
    assert first.what == f"{stage}/strange was written in another form and is left out"
    assert first.command == f"ara {stage} --force -w /home/me/ws"


@pytest.mark.parametrize(
    ("key", "value"),
    [("cores", "eight"), ("cores", [2]), ("memory_bytes", "much"), ("memory_bytes", -1), ("gpus", [7]), ("system", {})],
)
def test_a_machine_in_another_form_is_left_out_and_named(key, value):
    strange = changed(bench(), machine={"system": "Linux", "cores": 2, key: value})
    report = gather(replace(sources(), current=Made(truncated(), allocation(), (), (strange,))))
    assert report.benches == () and "written in another form" in report.missing[0].what


def test_a_machine_is_handed_on_as_it_was_recorded():
    machine = {"system": "Linux", "memory_bytes": None, "later": "more"}
    report = gather(
        replace(sources(), current=Made(truncated(), allocation(), (), (changed(bench(), machine=machine),)))
    )
    assert report.model_dump(mode="json")["benches"][0]["machine"] == machine


def test_ranges_may_be_written_either_way():
    rows = bench().results["cases"][1]["models"][NAME]
    assert set(rows["seconds"]) == {"median", "p10", "p90"} and set(rows["ratio"]) == {"median", "low", "high"}
    row = gather(sources()).benches[0].cases[1].models[NAME]
    assert row.ratio.low == pytest.approx(1.1) and row.tokens_per_second.low == pytest.approx(0.8 * 1.15 / 0.02)


def test_an_evaluation_of_one_window_has_no_errors():
    rows = {name: {**row, "nll_stderr": None, "window_nlls": [row["nll"]]} for name, row in text_rows(NAME).items()}
    task = {"kind": "text", "text": "", "windows": 1, "seq_len": 64, "models": rows}
    (found,) = gather(with_evaluation(tasks={"c4": task}, zero_shot=None)).evaluations
    assert found.texts[0].over_uniform.stderr is None
    assert "(uniform ranks: 45.05)" in gather(with_evaluation(tasks={"c4": task}, zero_shot=None)).verdict


def test_without_uniform_ranks_nothing_is_said_of_them():
    rows = {name: row for name, row in text_rows(NAME).items() if name != "uniform"}
    task = {"kind": "text", "text": "", "windows": WINDOWS, "seq_len": 64, "models": rows}
    report = gather(with_evaluation(tasks={"c4": task}, zero_shot=None))
    assert "uniform" not in report.verdict and report.evaluations[0].texts[0].over_uniform is None


def test_versions_that_differ_are_all_named():
    other = training().model_copy(update={"versions": {"ara": "0.2.0", "torch": "2.13.0"}})
    assert gather(sources(training=other)).versions == {"ara": ("0.1.0", "0.2.0"), "torch": ("2.13.0",)}


def test_the_fixture_is_what_the_stages_write(finished):
    """A made-up manifest has no key that a real one lacks, but those of results that are still to come."""
    from ara.workspace.store import Workspace

    views = {view.stage: view.manifest for view in Workspace.open(finished).views()}
    made = {"decompose": decomposition(), "allocate": allocation(), "truncate": truncated(), "eval": evaluation()}
    coming = {"eval": {"zero_shot", "continuations"}}
    for stage, invented in made.items():
        assert set(invented.results) - coming.get(stage, set()) <= set(views[stage].results), stage
        assert set(invented.config) <= set(views[stage].config), stage
    row = next(iter(next(iter(views["eval"].results["tasks"].values()))["models"].values()))
    assert set(text_rows(NAME, divergence=False)[NAME]) <= set(row)
    assert re.fullmatch(r"[0-9a-f]{64}", views["eval"].id)


def test_an_export_says_how_many_matrices_are_in_16_bits():
    fallback = {
        "matrices": {"lm_head": 0.01, "x.A": 0.002},
        "candidates": 7,
        "weights": 9,
        "extra_bytes": 8,
        "kl": 0.04,
    }
    report = gather(sources(exports=(export(precision="int8", fallback=fallback), export())))
    mixed, plain = report.exports
    assert (mixed.exact, mixed.candidates) == (2, 7) and (plain.exact, plain.candidates) == (0, 0)
    assert ": int8 graph with 2 of 7 products exact, 1.0 MiB, ONNX" in export_table(mixed).caption
    assert "exact" not in export_table(plain).caption
