"""What the guard makes of losses that are not numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ara.allocation.guard import compare_candidates
from ara.errors import NumericalError
from ara.masks.context import TuningContext
from ara.solver.problem import Allocation
from tests.toy import toy_problem


@pytest.fixture
def context(tmp_path: Path) -> TuningContext:
    return toy_problem(tmp_path, [(20, 14), (14, 20)])[1]


def _candidates(context: TuningContext) -> dict[str, Allocation]:
    specs = context.model.specs
    return {
        name: Allocation.of_ranks(specs, dict.fromkeys((spec.name for spec in specs), rank))
        for name, rank in (("ara", 3), ("uniform", 6))
    }


def test_nan_never_wins(context: TuningContext, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0, float("nan"), 2.0])
    monkeypatch.setattr(context.model, "nll", lambda *_: torch.full((4,), next(losses)))
    assert compare_candidates(_candidates(context), context).winner == "uniform"


def test_candidates_that_are_all_nan_are_refused(context: TuningContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context.model, "nll", lambda *_: torch.full((4,), float("nan")))
    with pytest.raises(NumericalError, match="NaN or infinity: ara, uniform"):
        compare_candidates(_candidates(context), context)
    assert all(layer.rank is None for layer in context.model.layers.values())
