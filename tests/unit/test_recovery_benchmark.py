"""The rows and tables of ``benchmarks/recovery.py``, and the whole script on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.recovery import main
from benchmarks.recovery_rows import DIRECT, ORDER, Row, gap_closed, wanted
from benchmarks.recovery_table import cost, parsed, quality
from benchmarks.text_losses import TEXTS
from tests.tiny import save_tiny


def row(perplexity: float, **others: Any) -> dict[str, Any]:
    """Return a finished row."""
    figures = {"empty": 1, "conversations": 8, "repeating": 0.25, "seconds": 60.0, "peak_memory_bytes": 2**31}
    return {"texts": dict.fromkeys(TEXTS, math.log(perplexity)), **figures, **others}


@pytest.fixture
def rows() -> dict[str, dict[str, Any]]:
    level = {"before": 1.0, "after": 0.5, "kept": True, "tokens": 9000, "seconds": 90.0}
    chat = {"chat_kl": 0.5, "agreement": 0.75}
    return {
        "dense": row(20),
        "mixed/whitened/0.6": row(160, **chat),
        "mixed/ara/0.6/0/closed": row(40, level=level, **chat),
        "mixed/ara/0.6/1/closed": row(20 * math.sqrt(2), level=level, **chat),
        "mixed/ara/0.6/0/frozen": row(80, **chat),
    }


def test_the_gap_is_a_share_of_log_perplexity(rows: dict[str, Any]) -> None:
    first = Row("mixed", "ara", 0.6, 0, "closed")
    assert gap_closed(rows, first, "c4") == pytest.approx(2 / 3)
    assert gap_closed(rows, Row("mixed", "ara", 0.8, 0, "closed"), "c4") is None


def test_every_level_is_wanted_for_learned_and_uniform_ranks() -> None:
    found = list(wanted([0.8, 0.6, 0.4], 3))
    assert len(found) == len(set(found)) and all(parsed(one.key) == one for one in found)
    for keep, seeds in ((0.8, 1), (0.6, 3), (0.4, 1)):
        mixed = [one for one in found if one.keep == keep and one.calibration == "mixed" and one.layout == "pivoted"]
        assert len(mixed) == 2 * len(ORDER) * seeds
    assert {one.repairs for one in found if one.level == DIRECT} == {("closed", "distill")}
    assert [one.level for one in found if one.layout == "factors"] == list(ORDER)
    assert {one.level for one in found if one.calibration == "c4"} == set(ORDER)


def test_tables_show_means_with_the_range(rows: dict[str, Any]) -> None:
    lines = quality(rows)
    text = " | 34.14 (28.28 – 40) | 75.0 % (66.7 % – 83.3 %)"
    tail = " | 0.500 (0.500 – 0.500) | 75.0% (75.0% – 75.0%) | 1 of 8, 1 of 8 | 25% (25% – 25%) |"
    assert f"| mixed | 0.6 | ara | closed | 2{text * 3}{tail}" in lines
    assert [line.split(" | ")[3] for line in lines[2:]] == ["–", "frozen", "closed", "frozen"]
    assert cost(rows)[2] == "| mixed | 0.6 | ara | 0 | closed | 1.000 → 0.500 | yes | 9,000 | 1.5 | 2.0 |"


def test_a_tiny_model_goes_through_and_a_second_run_measures_nothing(
    benchmark_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.recovery.PROMPT_TOKENS", 12)
    monkeypatch.setattr("benchmarks.recovery.NEW_TOKENS", 9)
    monkeypatch.setattr("benchmarks.recovery.SEQ_LEN", 64)
    model = str(save_tiny(benchmark_data / "model", "llama"))
    words = ["--model", model, "--keep", "0.6", "--only", "mixed/uniform/*", "--windows", "2", "--seq-len", "128"]
    words += ["--conversations", "3", "--prompts", "2", "--samples", "8", "--rank-samples", "4", "--epochs", "1"]
    words += [
        "--steps",
        "2",
        "--batch",
        "2",
        "--seeds",
        "1",
        "--dtype",
        "float32",
        "--workspace",
        str(benchmark_data / "ws"),
    ]
    main(words)
    document = json.loads((benchmark_data / "ws" / "recovery.json").read_text())
    names = [f"mixed/uniform/0.6/0/{level}" for level in ORDER]
    assert list(document["rows"]) == ["dense", "mixed/whitened/0.6", *names]
    assert all(set(found["texts"]) == set(TEXTS) for found in document["rows"].values())
    assert "| mixed | 0.6 | uniform | distill | 1 |" in capsys.readouterr().out
    monkeypatch.setattr("benchmarks.recovery.Judge", None)
    main(words)
    with pytest.raises(SystemExit, match="other settings"):
        main([*words[:-1], str(benchmark_data / "ws"), "--steps", "3"])
