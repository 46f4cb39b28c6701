"""What a training goes on from, read back from a checkpoint that somebody else may have written."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from ara.masks.state import LogRow, TrainingState


def plain(**changes: Any) -> dict[str, Any]:
    state = TrainingState(step=2, best={"x": 3, "y": None}, best_held_out=math.inf, log=[LogRow(0, None, 0.8, 1, 0.5)])
    state.log.append(LogRow(1, math.nan, 0.8, 1, 0.7, 3.5))
    return {**json.loads(json.dumps(state.plain())), **changes}


def test_a_state_comes_back_from_json() -> None:
    tensors = {"theta": torch.ones(3), "best:theta": torch.zeros(3)}
    state = TrainingState.from_plain(plain(), tensors)
    assert state.step == 2 and state.best == {"x": 3, "y": None} and math.isinf(state.best_held_out)
    assert isinstance(state.log[1], LogRow) and state.log[1].held_out == 3.5
    assert state.all_tensors().keys() == tensors.keys()


@pytest.mark.parametrize(
    "changes", [{"step": "x"}, {"log": []}, {"log": [{"step": 0}]}, {"best": []}, {"more": 1}, {"seconds": None}]
)
def test_anything_else_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        TrainingState.from_plain(plain(**changes), {})
    with pytest.raises(ValueError):
        TrainingState.from_plain({}, {})
