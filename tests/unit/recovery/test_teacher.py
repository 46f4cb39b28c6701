"""The dense model's predictions do not depend on what is kept of earlier passes."""

from __future__ import annotations

import pytest
import torch

from ara.models.scores import Whole
from ara.recovery import teacher as module
from ara.recovery.teacher import Teacher
from tests.tiny import FAMILIES, gemma_with_shared_keys, tiny_model

IDS = torch.arange(5 * 12).view(5, 12) % 47


def _logits(teacher: Teacher, rows: torch.Tensor) -> torch.Tensor:
    """Return the logits (b, t, v) of some windows."""
    return torch.cat([one.logits for one in teacher.scores(rows) if isinstance(one, Whole)])


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_outputs_give_the_same_bits(family, monkeypatch):
    model = tiny_model(family)
    kept, fresh = Teacher(model, IDS, keep=True), Teacher(model, IDS, keep=False)
    first = _logits(kept, torch.tensor([3, 0]))
    torch.testing.assert_close(first, model(IDS[[3, 0]]).logits)
    assert set(kept._outputs) == {3, 0} and not fresh._outputs
    again = _logits(kept, torch.tensor([0, 2, 3]))
    assert torch.equal(again, _logits(fresh, torch.tensor([0, 2, 3])))


def test_only_what_fits_is_kept(monkeypatch):
    # A quarter of this holds two windows of 12 tokens and 60 float32 numbers.
    monkeypatch.setattr(module, "available_bytes", lambda device: 4 * 2 * 12 * 60 * 4)
    kept = Teacher(tiny_model("llama"), IDS, keep=True)
    _logits(kept, torch.arange(5))
    assert set(kept._outputs) == {0, 1}


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_families_whose_blocks_share_more_than_outputs(kind):
    model = gemma_with_shared_keys(kind)
    rows = torch.tensor([1, 4])
    kept = Teacher(model, IDS, keep=True)
    _logits(kept, rows)
    torch.testing.assert_close(_logits(kept, rows), model(IDS[rows]).logits)
