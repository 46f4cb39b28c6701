"""``ara compare --size``: every form of the model at some sizes, and how the report shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ara.allocation.forms import FORMS
from ara.artifacts.checkpoint import CHECKPOINT
from ara.artifacts.comparison import ComparisonResults, SizedModel
from ara.config import CompareConfig
from ara.models.checkpoint import load
from ara.models.likelihood import nll_of_model
from ara.reporting.document import Report
from ara.stages.common import Run
from ara.stages.recovered_forms import FormRepairs
from ara.workspace.store import Workspace
from tests.commands import ara, done, refused
from tests.integration.test_size import FEW, size

SIZED = [name for name, form in FORMS.items() if form.sized]


def models_of(root: Path, name: str) -> dict[str, SizedModel]:
    """Return the models of a comparison."""
    found = ComparisonResults.read(Workspace.open(root).view(f"compare/{name}")).models
    assert found is not None
    return dict(found)


def test_every_form_is_measured_and_the_report_names_the_best(copied: Path) -> None:
    small, large = size(copied, 0.12), size(copied, 0.35)
    words = ("compare", "--size", f"{large},{small}", *FEW, "--block", 16, "-w", copied)
    result = done(*words)
    name = f"sizes-{large}-{small}"
    found = models_of(copied, name)
    fixed = [name for name in FORMS if name not in SIZED]
    assert list(found) == [*fixed, *(f"{form}-{one}" for one in (large, small) for form in SIZED)]
    for key, model in found.items():
        if model.size is not None and model.error is None:
            assert model.bytes is not None and model.limit is not None and model.bytes <= model.limit, key
    assert "smallest choices" in str(found[f"mixed-{small}"].error) and found[f"joint-{small}"].held_out
    assert (
        found["int4"].bytes == found["int4-nearest"].bytes and found["int4"].held_out != found["int4-nearest"].held_out
    )
    dense, int8 = found["dense"], found["int8"]
    assert dense.held_out is not None and int8.held_out == pytest.approx(dense.held_out, abs=0.01)
    folder = copied / "compare" / name
    assert {"sizes.svg", "results.json", "dense.json", f"joint-{large}.json"} <= {one.name for one in folder.iterdir()}
    sentence = next(line for line in result.stdout.splitlines() if line.startswith("Best on held-out"))
    assert f"for {large} " in sentence and f"for {small} " in sentence
    assert "is there already" in done(*words).stderr
    assert "Best on held-out" in done("status", "-w", copied).stdout
    done("report", "-w", copied)
    report = Report.model_validate_json(next((copied / "report").rglob("report.json")).read_text(encoding="utf-8"))
    assert [front.verdict for front in report.size_fronts] == [sentence] and report.comparisons == ()
    page = next((copied / "report").rglob("report.html")).read_text(encoding="utf-8")
    assert "Ranks and bits for a size" in page and sentence in page and "size of the weight files, MB" in page


def test_a_comparison_that_was_killed_resumes_to_the_same_figures(copied: Path, killed: Any) -> None:
    words = [str(word) for word in ("compare", "--size", size(copied, 0.35), *FEW, "-w", copied)]
    done(*words, "--name", "one")
    killed("ara.stages.compare_sizes:_measured", 6, "before", *words, "--name", "two")
    again = done(*words, "--name", "two")
    assert again.stderr.count("was measured by an interrupted run") == 5
    assert models_of(copied, "two") == models_of(copied, "one")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--keep", 0.5), "--size and --keep are given together"),
        (("--tasks", "c4", "--masks", "x"), "--size and --tasks, --masks are given together"),
        (("--methods", "uniform"), "--size and --methods are given together"),
    ],
)
def test_settings_of_the_other_comparison_are_refused(words: tuple[Any, ...], message: str, copied: Path) -> None:
    refused(ara("compare", "--size", "90MB", *words, "-w", copied), 2, message)


def test_sizes_that_mean_nothing_are_refused(copied: Path) -> None:
    assert "--size 1KB allows 1,000" in ara("compare", "--size", "90MB,1KB", *FEW, "-w", copied).stderr
    refused(ara("compare", "--size", "small", "-w", copied), 2, "size", hint=False)
    assert not (copied / "compare").exists() or not any((copied / "compare").iterdir())


def test_a_comparison_of_allocators_has_the_settings_of_before(copied: Path, tiny_text: str) -> None:
    words = ("--keep", 0.7, "--methods", "uniform", "--tasks", tiny_text, "--max-windows", 1, "--eval-seq-len", 24)
    name = json.loads(done("compare", *words, *FEW, "-w", copied, "--json").stdout)["name"]
    config = json.loads((copied / "compare" / name / "manifest.json").read_text())["config"]
    assert not {"size", "block", "zero_points", "embedding_bits"} & set(config)


def test_the_embedding_of_rounded_models_may_have_few_bits(copied: Path) -> None:
    one = size(copied, 0.35)
    words = ("compare", "--size", one, *FEW, "--block", 16, "-w", copied)
    done(*words)
    done(*words, "--embedding-bits", 4)
    plain, small = models_of(copied, f"sizes-{one}"), models_of(copied, f"sizes-{one}-embedding4")
    for key, model in small.items():
        before = plain[key]
        if key in ("dense", f"ranks-{one}"):
            assert model == before, key
        elif model.error is None:
            assert model.held_out != before.held_out, key
    for key in ("int8", "int4"):
        fewer, more = small[key].bytes, plain[key].bytes
        assert fewer is not None and more is not None and fewer < more


def test_repaired_forms_stand_beside_the_others(copied: Path) -> None:
    one = size(copied, 0.2)
    words = ("compare", "--size", one, *FEW, "--block", 16, "--recover", "closed", "-w", copied)
    result = done(*words)
    found = models_of(copied, f"sizes-{one}-closed")
    dense = found["dense"].dense_layers
    # Only ranks are repaired: closed cannot train the scales of a dense model.
    ranks = [key for key, model in found.items() if model.recovered is None and model.dense_layers not in (None, dense)]
    assert {f"ranks-{one}", f"ranks-int8-{one}"} <= set(ranks)
    assert [key for key in found if key.endswith("-recovered")] == [f"{key}-recovered" for key in ranks]
    for key in ranks:
        frozen, after = found[key], found[f"{key}-recovered"]
        assert list(found).index(f"{key}-recovered") == 1 + list(found).index(key)
        assert after.recovered in ((), ("closed",)) and after.title == f"{frozen.title}, recovered"
        assert (after.bytes, after.layers, after.dense_layers) == (frozen.bytes, frozen.layers, frozen.dense_layers)
        assert after.held_out is not None and frozen.held_out is not None
        assert len(after.window_nlls) == len(frozen.window_nlls)
        assert bool(after.recovered) <= (after.held_out != frozen.held_out)
    assert found[f"ranks-{one}-recovered"].recovered == ("closed",)
    assert f"for {one} " in next(line for line in result.stdout.splitlines() if line.startswith("Best on held-out"))
    done("report", "-w", copied)
    page = next((copied / "report").rglob("report.html")).read_text(encoding="utf-8")
    assert "ranks in int8, recovered" in page and "repaired by" in page


def test_a_model_in_memory_is_the_one_that_the_stages_make(copied: Path) -> None:
    """Ranks, repair and rounding of the comparison are those of truncate, recover and quantise."""
    one = size(copied, 0.2)
    few = (*FEW, "--block", 16)
    done("compare", "--size", one, *few, "--recover", "closed", "--name", "sizes", "-w", copied)
    compared = models_of(copied, "sizes")[f"ranks-int8-{one}-recovered"]
    done("allocate", "--size", one, "--bits", 8, "--no-guard", *few, "--name", "few", "-w", copied)
    done("truncate", "--allocation", "few", "-w", copied)
    done("recover", "--checkpoint", "few", *FEW, "-w", copied)
    done("quantise", "--from", "recover/few-closed", *FEW, "--tolerance", 9, "--name", "few", "-w", copied)
    repairs = FormRepairs(
        CompareConfig(size=(one,), recover="closed", samples=6, held_out=4, device="cpu", dtype="float32"),
        Workspace.open(copied).view("decompose/two-sided"),
        Workspace.open(copied),
        Run(copied),
    )
    model = load(copied / "quantise" / "few" / CHECKPOINT, "cpu", "float32")
    losses = nll_of_model(model, repairs.texts.fresh, 4)
    assert losses.tolist() == pytest.approx(list(compared.window_nlls), rel=1e-6)


def test_dense_models_of_few_bits_are_repaired_after_the_rounding(copied: Path, killed: Any) -> None:
    words = ("compare", "--size", size(copied, 0.35), *FEW, "--block", 16, "--recover", "block", "-w", copied)
    done(*words, "--name", "one")
    found = models_of(copied, "one")
    assert "dense-recovered" not in found and {"int8-recovered", "int4-nearest-recovered"} <= set(found)
    frozen, after = found["int4-nearest"], found["int4-nearest-recovered"]
    assert after.recovered == ("block",) and after.bytes == frozen.bytes
    assert after.window_nlls != frozen.window_nlls
    # In the repair of the third model, after its first level or in the middle of it.
    killed("ara.stages.recovery_parts:LevelParts.finish_part", 5, "after", *map(str, words), "--name", "two")
    done(*words, "--name", "two")
    assert models_of(copied, "two") == found
    assert [one.name for one in sorted((copied / "compare" / "two").iterdir())] == [
        one.name for one in sorted((copied / "compare" / "one").iterdir())
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "90MB", "--recover", "more"), "unknown recovery level 'more'"),
        (("--size", "90MB", "--recover", "closed", "--samples", 1), "needs 2 windows"),
        (("--recover", "closed"), "--recover closed is given without --size"),
    ],
)
def test_repairs_that_are_not_possible_are_refused(words: tuple[Any, ...], message: str, copied: Path) -> None:
    refused(ara("compare", *words, "-w", copied), 2, message, hint=False)
