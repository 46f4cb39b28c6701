"""Recomputed activations: the same gradients with less memory."""

from __future__ import annotations

import pytest
import torch

from ara.models import recompute as module
from ara.models.recompute import blocks_to_recompute, graph_bytes, recomputed
from ara.models.weights import find_blocks
from tests.recorder import Recorder
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
    """The estimate from one block is near what a whole pass saves for its backward pass."""
    model = tiny_model("llama")
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(input_ids=IDS, use_cache=False).logits
    own = {parameter.untyped_storage().data_ptr() for parameter in (*model.parameters(), *model.buffers())}
    kept = sum(size for address, size in saved.items() if address not in own) + logits.nbytes
    found = graph_bytes(model, IDS)
    assert found == pytest.approx(kept, rel=0.15)
    assert graph_bytes(model, IDS[:1]) == pytest.approx(found / 2, rel=0.05)
    # Matrices without a gradient need no inputs kept.
    assert logits.nbytes < graph_bytes(model.requires_grad_(False), IDS) < found


def test_activations_are_kept_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, report = tiny_model("llama"), Recorder()
    needed = 5 * graph_bytes(model, IDS[:1]) + 7
    monkeypatch.setattr(module, "available_bytes", lambda device: 2 * needed)
    assert blocks_to_recompute(model, IDS[:1], 5, report, extra=7) == []
    assert not report.facts
    monkeypatch.setattr(module, "available_bytes", lambda device: 2 * needed - 2)
    assert blocks_to_recompute(model, IDS[:1], 5, report, extra=7) == list(find_blocks(model)[1])
    assert "computed again in the backward pass" in report.facts[0]
