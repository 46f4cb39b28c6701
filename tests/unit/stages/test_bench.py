"""A case of a benchmark as results."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from ara.evaluation.cost import Case, Cost
from ara.stages.bench import case_results


def test_a_case_is_summarised_as_plain_data() -> None:
    shared: dict[str, Any] = {"query_width": 1, "cache_width": 1, "windows": (), "weight_bytes": 4, "cache_bytes": 4}
    costs = {
        "dense": Cost(linear=90, head=10, last_logits=False, **shared),
        "thin": Cost(linear=40, head=10, last_logits=False, **shared),
    }
    seconds = {"dense": [2.0, 4.0, 3.0], "thin": [1.0, 4.0, 2.0]}
    row = case_results(Case(4, 0, 3), seconds, costs, in_turn=True).plain()
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert (row["kind"], row["batch"], row["past"], row["new"]) == ("prefill", 4, 0, 3)
    assert list(row["models"]) == ["dense", "thin"]
    thin = row["models"]["thin"]
    assert thin["seconds"]["median"] == 2
    assert thin["tokens_per_second"]["median"] == 6
    assert thin["tokens_per_second"]["p10"] == pytest.approx(np.percentile([12, 3, 6], 10))
    assert thin["tokens_per_second"]["p90"] == pytest.approx(np.percentile([12, 3, 6], 90))
    assert thin["ratio"] == {"median": 1.5, "low": 1.0, "high": 2.0}
    assert thin["predicted"] == 2
    assert (thin["macs"], thin["bytes_read"]) == (12 * 50, 200)
    assert row["models"]["dense"]["ratio"] == {"median": 1, "low": 1, "high": 1}
    apart = case_results(Case(4, 0, 3), seconds, costs, in_turn=False).plain()["models"]
    assert [figures["ratio"] for figures in apart.values()] == [None, None]
    assert apart["thin"]["seconds"] == thin["seconds"] and apart["thin"]["predicted"] == 2
