"""The dense model's predictions do not depend on what is kept of earlier passes."""

from __future__ import annotations

import pytest
import torch

from ara.recovery import teacher as module
from ara.recovery.teacher import Teacher
from tests.tiny import FAMILIES, gemma_with_shared_keys, tiny_model

IDS = torch.arange(5 * 12).view(5, 12) % 47


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_outputs_give_the_same_bits(family, monkeypatch):
    model = tiny_model(family)
    kept, fresh = Teacher(model, IDS, keep=True), Teacher(model, IDS, keep=False)
    first = kept.logits(torch.tensor([3, 0]))
    torch.testing.assert_close(first, model(IDS[[3, 0]]).logits)
    assert set(kept._outputs) == {3, 0} and not fresh._outputs
    again = kept.logits(torch.tensor([0, 2, 3]))
    assert torch.equal(again, fresh.logits(torch.tensor([0, 2, 3])))


def test_only_what_fits_is_kept(monkeypatch):
    # A quarter of this holds two windows of 12 tokens and 60 float32 numbers.
    monkeypatch.setattr(module, "available_bytes", lambda device: 4 * 2 * 12 * 60 * 4)
    kept = Teacher(tiny_model("llama"), IDS, keep=True)
    kept.logits(torch.arange(5))
    assert set(kept._outputs) == {0, 1}


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_families_whose_blocks_share_more_than_outputs(kind):
    model = gemma_with_shared_keys(kind)
    rows = torch.tensor([1, 4])
    kept = Teacher(model, IDS, keep=True)
    kept.logits(rows)
    torch.testing.assert_close(kept.logits(rows), model(IDS[rows]).logits)
