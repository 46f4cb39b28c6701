"""What ``benchmarks/quality_table.py`` makes of finished rows, and that README and docs show the published ones."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from ara.errors import NumericalError
from ara.stages import train_masks
from ara_cli.console import Console
from benchmarks.quality import Bench
from benchmarks.quality_rows import METHODS, Row, wanted
from benchmarks.quality_table import (
    PUBLISHED,
    TABLE_KEEPS,
    cells_of,
    curves,
    draw,
    groups_of,
    keeps_of,
    markdown,
    mean_and_range,
    share_closed,
    summary,
)
from tests.tiny import random_model, save_with_tokenizer, tiny_config, tiny_texts

REPOSITORY = Path(__file__).resolve().parents[2]
README = REPOSITORY / "README.md"
PAGE = REPOSITORY / "docs" / "measurements" / "quality.md"


def row(perplexity: float, dense_layers: int = 3) -> dict[str, Any]:
    """Return a finished row."""
    loss = math.log(perplexity)
    facts = {"seconds": 1.0, "backward_passes": 2, "linear_keep": 0.8, "dense_layers": dense_layers}
    return {"wikitext2": loss, "c4": loss, **facts}


@pytest.fixture
def rows() -> dict[str, dict[str, Any]]:
    return {
        "dense": row(20),
        "whitened/uniform/0.8/0": row(160),
        "two-sided/ara/0.8/0": row(40, 10),
        "two-sided/ara/0.8/1": row(20 * math.sqrt(2), 20),
        "two-sided/dp-kl/0.8/0": row(80),
        "two-sided/strs/0.8/0": {"error": "the loss is nan"},
        "two-sided, pivoted/ara/0.8/0": row(20),
    }


def test_gap_closed_is_a_share_of_log_perplexity(rows):
    closed = {key: share_closed(rows, rows[key], 0.8, "wikitext2") for key in rows if "ara" in key or "dp-kl" in key}
    assert closed == pytest.approx(
        {
            "two-sided/ara/0.8/0": 2 / 3,
            "two-sided/ara/0.8/1": 5 / 6,
            "two-sided/dp-kl/0.8/0": 1 / 3,
            "two-sided, pivoted/ara/0.8/0": 1,
        }
    )


def test_rows_are_grouped_by_factors_with_the_best_last_and_failures_left_out(rows):
    groups = groups_of(rows, 0.8)
    names = [("whitened", "uniform"), ("two-sided", "dp-kl"), ("two-sided", "ara"), ("two-sided, pivoted", "ara")]
    assert list(groups) == names
    assert [len(found) for found in groups.values()] == [1, 1, 2, 1]
    assert keeps_of(rows) == [0.8]


def test_cells_are_means_with_the_range(rows):
    line = next(line for line in markdown(rows, [0.8]).splitlines() if "**ara**" in line)
    assert line == (
        "| | two-sided | **ara** | 2 | 34.1 (28.3 – 40.0) | 75.0 % (66.7 – 83.3) "
        "| 34.1 (28.3 – 40.0) | 75.0 % (66.7 – 83.3) | 15 (10 – 20) |"
    )
    assert mean_and_range([3.04, 3.01], lambda value: f"{value:.1f}") == "3.0"


def test_curves_mark_the_best_step(rows):
    rows["two-sided/ara/0.8/0"]["curve"] = [[0, 3.0], [2, 2.5], [4, 2.75]]
    rows["two-sided, pivoted/ara/0.8/0"]["curve"] = [[0, 2.0], [2, 1.9], [4, 1.8]]
    assert curves(rows, [0.8]).splitlines() == [
        "| step | 0 | 2 | 4 |",
        "|---|---:|---:|---:|",
        "| keep 0.8 | 3.0000 | **2.5000** | 2.7500 |",
        "| keep 0.8, pivoted | 2.0000 | 1.9000 | **1.8000** |",
    ]


def test_the_figure_shows_the_best_rival(rows):
    assert b"dp-kl, two-sided factors" in draw(rows)


def test_every_method_is_wanted_at_every_budget_and_learned_ones_with_every_seed():
    found = list(wanted([0.8, 0.6], 3))
    assert len(found) == len(set(found))
    for method in METHODS:
        assert {row.keep for row in found if row.method == method and row.factors == "two-sided"} == {0.8, 0.6}
    seeds = {row.method: sum(r.method == row.method and r.keep == 0.6 for r in found) for row in found}
    assert (seeds["tanh"], seeds["strs"], seeds["ara"]) == (3, 1, 6)
    assert Row("two-sided", "ara", 0.6, 2, "pivoted").key == "two-sided, pivoted/ara/0.6/2"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Return a benchmark of a tiny model, with a few sentences as C4 and WikiText-2."""
    sentences = tiny_texts()
    parts = {"c4_sample/c4_rp1": sentences, "c4_sample/c4_rp2": ["Unseen."] * 50, "wikitext2_raw/test": sentences}
    for name, texts in parts.items():
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    monkeypatch.setenv("ARA_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("ARA_CACHE_DIR", str(tmp_path / "cache"))
    config = tiny_config("llama")
    config.max_position_embeddings = 512  # a calibration window
    model = save_with_tokenizer(tmp_path / "model", random_model(config))
    sizes = {"samples": 12, "seq_len": 40, "windows": 2, "steps": 2, "seeds": 2, "keep": [0.8, 0.6]}
    arguments = argparse.Namespace(model=str(model), workspace=tmp_path / "ws", results=tmp_path / "rows.json", **sizes)
    return Bench(arguments, Console(quiet=True))


def test_trainings_that_stop_early_or_do_not_fit_together(bench, monkeypatch):
    """A budget that a training has left out is a failed row; seeds that were trained otherwise are not averaged."""
    train, calls = train_masks.train, []

    def diverging(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise NumericalError("the training diverges")
        return train(*args, **kwargs)

    monkeypatch.setattr(train_masks, "train", diverging)
    for keep in (0.6, 0.8):
        bench.measure(Row("two-sided", "ara", keep, 0))
    rows = json.loads(bench.file.path.read_text(encoding="utf-8"))["rows"]
    assert rows["two-sided/ara/0.6/0"] == {"error": "not trained: at keep 0.6 the training diverges", "run": 0}
    alike = rows["two-sided/ara/0.8/0"]
    assert alike["trained_at"] == [0.8, 0.6] and alike["options"]["steps"] == 2
    assert 0.7 < alike["linear_keep"] <= 0.8 and len(alike["c4_windows"]) == 2
    for other in ({"trained_at": [0.8]}, {"options": {**alike["options"], "steps": 13}}, {"options": None}):
        bench.rows["two-sided/ara/0.8/0"] = {**alike, **other}
        with pytest.raises(SystemExit, match=r"two-sided/ara/0\.8/0 in .* trained with other settings"):
            bench.measure(Row("two-sided", "ara", 0.8, 1))
    assert len(calls) == 2
    bench.rows["two-sided/ara/0.8/0"] = alike
    bench.measure(Row("two-sided", "ara", 0.8, 1))
    assert len(calls) == 4 and "error" not in bench.rows["two-sided/ara/0.8/1"]


@pytest.mark.skipif(not PUBLISHED.exists(), reason="no published rows")
def test_readme_and_docs_show_the_published_rows():
    rows = json.loads(PUBLISHED.read_text(encoding="utf-8"))["rows"]
    readme, page = README.read_text(encoding="utf-8"), PAGE.read_text(encoding="utf-8")
    assert summary(rows, TABLE_KEEPS) in readme
    assert markdown(rows, TABLE_KEEPS) in page
    assert curves(rows, TABLE_KEEPS) in page
    dense = [f"{math.exp(rows['dense'][task]):.2f}" for task in ("wikitext2", "c4")]
    for text in (readme, page):
        assert f"{dense[0]} on WikiText-2 and {dense[1]} on C4" in " ".join(text.split())


@pytest.mark.skipif(not PUBLISHED.exists(), reason="no published rows")
def test_goals_are_those_of_the_published_rows():
    rows = json.loads(PUBLISHED.read_text(encoding="utf-8"))["rows"]
    goals = re.findall(r"^\| close .*$", (PAGE.parent / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    for keep, goal in zip(TABLE_KEEPS, goals, strict=True):
        for factors, name in (("two-sided", "factors"), ("two-sided, pivoted", "pivoted layers")):
            closed = cells_of(rows, groups_of(rows, keep)[factors, "ara"], keep)[1].partition(" (")[0]
            assert f"{name} {closed}" in goal
