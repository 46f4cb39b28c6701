"""How ``benchmarks/zero_shot.py`` compares our answers with those of lm-eval's command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ara.workspace.view import StageView
from benchmarks.zero_shot import agreeing, answers, samples


def ours(*values: Any) -> list[dict[str, Any]]:
    """Return answers as ``ara eval`` keeps them."""
    return [{"document": 3 * i, "digest": f"h{i}", "metrics": {"acc": value}} for i, value in enumerate(values)]


def theirs(*values: Any, filter: str = "none") -> list[dict[str, Any]]:
    """Return rows as lm-eval's command logs them; their order is its own."""
    rows = [{"doc_id": 3 * i, "doc_hash": f"h{i}", "filter": filter, "acc": value} for i, value in enumerate(values)]
    return rows[::-1]


def test_questions_are_compared_one_by_one() -> None:
    """Two models with the same mean may disagree on every question."""
    assert agreeing(ours(1.0, 0.0, 1.0, 0.0), theirs(1.0, 0.0, 1.0, 0.0), "acc", "piqa") == 4
    assert agreeing(ours(1.0, 0.0, 1.0, 0.0), theirs(0.0, 1.0, 0.0, 1.0), "acc", "piqa") == 0
    assert agreeing(ours(1.0, 0.0, 1.0), theirs(1.0, 0.0, 0.0) + theirs(0.0, 1.0, 1.0, filter="b"), "acc", "x") == 2
    assert agreeing(ours([-100.0, 5], [-100.0, 5], "a"), theirs([-100.05, 5], [-101.0, 5], "a"), "acc", "x") == 2


@pytest.mark.parametrize(
    "other", [theirs(1.0), theirs(1.0, 0.0, 1.0), [{**row, "doc_hash": "x"} for row in theirs(1, 0)]]
)
def test_other_questions_are_an_error(other: list[dict[str, Any]]) -> None:
    with pytest.raises(SystemExit, match="piqa: lm-eval's command was asked other questions"):
        agreeing(ours(1.0, 0.0), other, "acc", "piqa")


def test_files_of_both_are_found(tmp_path: Path) -> None:
    rows = [{**row, "doc": "one\u2028line"} for row in theirs(1.0, 0.0)]
    dumped = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "samples_arc_easy_2026-11-22T22-15-00.1.jsonl").write_text(dumped, encoding="utf-8")
    (tmp_path / "samples_arc_easy_mt_2026-11-22T22-15-00.1.jsonl").write_text("", encoding="utf-8")
    assert samples(tmp_path, "arc_easy") == rows
    (tmp_path / "01-arc_easy.0-dense.json").write_text(json.dumps({"answers": ours(1.0, 0.0)}), encoding="utf-8")
    assert answers(StageView("eval/x", tmp_path, "done"), "arc_easy") == ours(1.0, 0.0)
