"""The rotated twin of ``benchmarks/off_grid.py``."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.off_grid import ALLOWED, largest_difference, rotate
from tests.tiny import tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_twin_gives_the_same_logits_with_other_weights(family: str) -> None:
    model = tiny_model(family).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand(parameter.shape))
    twin = copy.deepcopy(model)
    rotate(twin)
    ids = torch.arange(3, 43)[None]
    assert largest_difference(ids, model, twin) < ALLOWED
    weights = [one.model.layers[0].mlp.up_proj.weight.detach() for one in (model, twin)]
    assert float((weights[0] - weights[1]).norm()) > 0.1 * float(weights[0].norm())
    assert twin.lm_head.weight is not twin.model.embed_tokens.weight
