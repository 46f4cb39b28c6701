"""Recomputed activations: the same gradients with less memory."""

from __future__ import annotations

import pytest
import torch

from ara.models.recompute import graph_bytes, recomputed
from ara.models.weights import find_blocks
from tests.tiny import FAMILIES, tiny_model

IDS = torch.arange(2 * 12).view(2, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradients_are_the_same_bit_for_bit(family):
    model = tiny_model(family)
    model(IDS).logits.square().sum().backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    blocks = find_blocks(model)[1]
    with recomputed(blocks):
        model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not any("forward" in vars(block) for block in blocks)


def test_the_bytes_that_a_graph_keeps():
    model = tiny_model("llama")
    whole = graph_bytes(model, IDS)
    assert graph_bytes(model, IDS[:1]) == pytest.approx(whole / 2, rel=0.05)
    with recomputed(find_blocks(model)[1]):
        less = graph_bytes(model, IDS)
    logits = model(IDS).logits.nbytes
    # The inputs of 3 blocks and little more.
    assert logits + 3 * 2 * 12 * 60 * 4 <= less < whole / 4
    assert graph_bytes(model.requires_grad_(False), IDS) == logits
