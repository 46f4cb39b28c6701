"""The rows and tables of ``benchmarks/bytes.py``, and the whole script on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ara.allocation.forms import FORMS
from benchmarks.bytes import REPAIR, main
from benchmarks.bytes_exported import main as exported
from benchmarks.bytes_rows import SIZES, Row, level_at, wanted
from benchmarks.bytes_table import conclusions, fitting, lead, original, quality
from benchmarks.text_losses import TEXTS
from tests.tiny import random_model, save_tiny, save_with_tokenizer, tiny_config


def row(*losses: float, share: float = 0.3, limit: int | None = 40_000_000) -> dict[str, Any]:
    """Return a finished row with these losses of the windows of every text."""
    means = dict.fromkeys(TEXTS, sum(losses) / len(losses))
    return {
        "limit_bytes": limit,
        "texts": means,
        "windows": {text: list(losses) for text in TEXTS},
        "linear_share": share,
        "file_bytes": 39_000_000,
        "low_rank_layers": 3,
        "layers": {"4": 2, "8": 1},
        "seconds": 90.0,
    }


@pytest.fixture
def rows() -> dict[str, dict[str, Any]]:
    """Return rows of one size, at which joint wins by 0.1 nats with a paired standard error of 0.01."""
    return {
        "twin/dense/-/frozen": row(2.0, 4.0, 3.0, 3.0, share=1.0, limit=None),
        "twin/int4-nearest/-/frozen": row(2.5, 4.5, 3.5, 3.5, share=0.29, limit=None),
        "twin/int4/-/frozen": row(2.2, 4.2, 3.2, 3.2, share=0.29, limit=None),
        "original/int4/-/frozen": row(2.0, 4.0, 3.0, 3.0, share=0.29, limit=None),
        "twin/mixed/33/frozen": row(2.2, 4.2, 3.2, 3.2),
        "twin/joint/33/frozen": row(2.1, 4.1, 3.08, 3.12),
        "twin/ranks/33/frozen": {"limit_bytes": 40_000_000, "error": "too small"},
    }


def test_every_form_is_wanted_at_every_size_and_only_ranks_are_recovered() -> None:
    found = list(wanted(SIZES, True))
    assert len(found) == len(set(found)) and all(Row.parsed(one.key) == one for one in found)
    for name, form in FORMS.items():
        of = [one for one in found if one.form == name and one.model == "twin"]
        levels = {"frozen", "closed"} if form.ranks else {"frozen"}
        assert {one.level for one in of} == levels
        assert {one.size for one in of} == (set(SIZES) if form.sized else {None})
    assert {one.form for one in found if one.model == "original"} == {"dense", "int8", "int4-nearest", "int4"}
    assert {one.level for one in wanted(SIZES, False)} == {"frozen"}
    after = [one for one in wanted((40,), False, True) if one.level == "distilled"]
    forms = ["int8", "int4-nearest", "int4", "mixed", "ranks-int8", "joint"]
    assert [one.form for one in after] == forms and {one.model for one in after} == {"twin"}


def test_a_table_shows_every_form_at_the_level_that_it_can_have() -> None:
    levels = {name: level_at(name, "distilled") for name in FORMS}
    assert levels["dense"] == "frozen" and levels["ranks"] == "closed" and levels["int4"] == "distilled"
    assert level_at("joint", "closed") == "closed" and level_at("int4", "closed") == "frozen"


def test_the_conclusions_say_what_a_repair_after_rounding_changes(rows: dict[str, Any]) -> None:
    more = {
        **rows,
        "twin/int4/-/distilled": row(2.1, 4.1, 3.1, 3.1),
        "twin/joint/33/distilled": row(2.0, 4.0, 3.0, 3.0),
    }
    found = [one for one in conclusions(more) if "repaired after rounding" in one]
    # Joint was not measured as it was before: repaired at the level closed, then rounded.
    (sentence,) = found
    assert sentence.startswith("dense int4, calibrated, repaired after rounding: wikitext2 -0.100 ± 0.000, ")


def test_a_size_shows_what_fits_with_the_paired_difference(rows: dict[str, Any]) -> None:
    assert set(fitting(rows, 33, "frozen")) == {"int4-nearest", "int4", "mixed", "joint"}
    assert set(fitting(rows, 28, "frozen")) == set()
    found = lead(fitting(rows, 33, "frozen"), "c4")
    assert found is not None and found[0] == pytest.approx(-0.1)
    assert found[1] == pytest.approx(math.sqrt(0.0008 / 3) / 2)
    line = quality(rows, "c4", "frozen")[2]
    shown = ["33 %", "40.0", "–", "–", "33.12", "24.53", "24.53", "–", "–", "**22.2**", "ranks and bits"]
    assert line == "| " + " | ".join([*shown, "-0.100 ± 0.008: better"]) + " |"


def test_a_single_window_has_no_standard_error(rows: dict[str, Any]) -> None:
    single = {key: {**row(3.0), "linear_share": 0.3} for key in rows}
    assert lead(fitting(single, 33, "frozen"), "c4") is None


def test_the_conclusions_name_gains_losses_and_what_calibration_saves(rows: dict[str, Any]) -> None:
    sentences = list(conclusions(rows))
    assert sentences[0] == "dense int4, wikitext2: calibrated loses 0.200 nats, nearest 0.500 (40% of it)."
    assert "standard errors at no size; it wins by at least 0.05 nats at 33 % (wikitext2, -0.100)" in sentences[-1]
    worse = {**rows, "twin/joint/33/frozen": row(2.4, 4.4, 3.42, 3.38)}
    assert "standard errors at 33 % (wikitext2, +0.200)" in list(conclusions(worse))[-1]


def test_four_bits_of_the_original_are_no_result(rows: dict[str, Any]) -> None:
    lines = original(rows)
    assert "no result" in lines[2] and lines[-1].startswith("The original model was stored in 4 bits")
    assert original({}) == []


def test_a_tiny_model_goes_through_and_a_second_run_measures_nothing(
    benchmark_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.bytes.SEQ_LEN", 64)
    model = str(save_tiny(benchmark_data / "model", "llama"))
    words = ["--model", model, "--size", "40", "--size", "1", "--recovered", "--windows", "2", "--seq-len", "128"]
    words += ["--samples", "8", "--rank-samples", "4", "--held-out", "2", "--block", "16", "--dtype", "float32"]
    words += ["--distilled", "--workspace", str(benchmark_data / "ws")]
    monkeypatch.setattr("benchmarks.bytes.REPAIR", {**REPAIR, "steps": 2, "batch": 2, "check_every": 1, "rate": 1e-3})
    main(words)
    document = json.loads((benchmark_data / "ws" / "bytes.json").read_text())
    found = document["rows"]
    assert list(found) == [one.key for one in wanted([40, 1], True, True)]
    assert all("smallest choices" in one["error"] for key, one in found.items() if "/1/" in key)
    measured = {key: one for key, one in found.items() if "/1/" not in key}
    assert all(set(one["texts"]) == set(TEXTS) and len(one["windows"]["c4"]) == 2 for one in measured.values())
    for key, one in measured.items():
        if "/40/" in key:
            assert one["linear_share"] <= 0.4 and one["file_bytes"] <= one["limit_bytes"]
    assert found["twin/dense/-/frozen"]["linear_share"] == 1 and found["twin/int8/-/frozen"]["layers"] == {"8": 21}
    assert found["twin/mixed/40/frozen"]["low_rank_layers"] == 0
    assert found["twin/joint/40/frozen"]["texts"] != found["twin/joint/40/closed"]["texts"]
    nearest = [found[f"twin/int4-nearest/-/{level}"] for level in ("frozen", "distilled")]
    assert nearest[0]["texts"] != nearest[1]["texts"] and nearest[0]["file_bytes"] == nearest[1]["file_bytes"]
    assert "| 40 % |" in capsys.readouterr().out
    monkeypatch.setattr("benchmarks.bytes.Compressor", None)
    main(words)
    with pytest.raises(SystemExit, match="other settings"):
        main([*words, "--seed", "1"])


def test_graphs_of_the_models_are_compared_and_timed(
    benchmark_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.bytes.SEQ_LEN", 64)
    config = tiny_config("llama")
    config.head_dim = 16
    workspace, model = benchmark_data / "ws", save_with_tokenizer(benchmark_data / "model", random_model(config))
    keys = [f"twin/{name}/frozen" for name in ("dense/-", "int4/-", "joint/40")]
    words = ["--model", str(model), "--size", "40", "--windows", "1", "--seq-len", "64", "--dtype", "float32"]
    words += ["--samples", "8", "--rank-samples", "4", "--held-out", "2", "--block", "16"]
    main([*words, *(word for key in keys for word in ("--only", key)), "--workspace", str(workspace)])
    words = [word for key in keys for word in ("--model", key)]
    words += ["--windows", "2", "--seq-len", "64", "--prefill", "8", "--decode", "8", "--rounds", "2"]
    words += ["--workspace", str(workspace)]
    capsys.readouterr()
    exported(words)
    path = workspace / "exported.json"
    before, shown = path.read_bytes(), capsys.readouterr().out
    rows = json.loads(before)["rows"]
    assert list(rows)[:3] == keys and len(rows) == 5
    for key in keys:
        losses = rows[key]["losses"]
        assert set(losses) == ({"torch", "fp32"} if "dense" in key else {"torch", "fp32", "int8"})
        assert losses["fp32"] == pytest.approx(losses["torch"], abs=1e-4)
        assert rows[key]["graph_bytes"] > 0 and all(len(rows[time]["seconds"][key]) == 2 for time in list(rows)[3:])
    assert rows[keys[1]]["losses"] != rows[keys[2]]["losses"]
    assert "prefill 8" in shown and "decode at 8" in shown and "times as fast as int4" in shown
    exported(words)
    assert path.read_bytes() == before
    with pytest.raises(SystemExit, match="--only 'twin/joint/33/frozen'"):
        exported(["--model", "twin/joint/33/frozen", *words[6:], "--results", str(workspace / "others.json")])
