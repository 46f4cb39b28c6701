"""The shape of a model without numbers, against the model with numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ara.calibration.moments import shared_inputs
from ara.errors import UnsupportedModelError, UsageError
from ara.layouts.modeling_ara import separate_experts
from ara.models.accounting import parameter_count
from ara.models.recompute import distinct_bytes, keeping_graph
from ara.models.weights import find_blocks, find_linears
from ara.planning.shape import trace
from tests.shapes import TOKENS, shape_of
from tests.tiny import FAMILIES, MIXTURES, save_tiny, tiny_config, tiny_model


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Return one family after the other."""
    return str(request.param)


def test_counts_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    shape, model = shape_of(tmp_path), tiny_model(family)
    linears = find_linears(model)
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    assert shape.specs == tuple(linears)
    assert shape.owners == shared_inputs(model, linears, ids)
    assert shape.parameters == parameter_count(model)
    assert shape.linear == sum(spec.dense_cost for spec in linears)
    ends = {id(one.weight): one.weight.numel() for one in (model.get_input_embeddings(), model.get_output_embeddings())}
    assert shape.embeddings == sum(ends.values())
    blocks = find_blocks(model)[1]
    assert (shape.blocks, shape.block) == (3, max(map(parameter_count, blocks)))
    assert (shape.hidden, shape.vocabulary) == (60, len(model.get_output_embeddings().weight))


def test_a_pass_without_numbers_takes_what_a_pass_with_numbers_takes(family: str, tmp_path: Path) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    window, model = shape_of(tmp_path).window, tiny_model(family).requires_grad_(False)
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    with FlopCounterMode(display=False) as flops:
        model(input_ids=ids, use_cache=False)
    products = flops.get_flop_counts()["Global"]
    counted = sum(count for operation, count in products.items() if "scaled_dot" not in str(operation))
    assert window.products + window.head == counted
    # Half of q kᵀ and of its product with v.
    queries = {"gpt2": 60, "opt": 60, "phi": 60, "phi3": 60, "qwen2": 60}.get(family, 84)
    assert window.attention == 3 * 2 * TOKENS * TOKENS * queries
    # The graph begins at the embeddings, and a tied head has no gradient.
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.get_input_embeddings().weight.requires_grad_(True)
    with torch.enable_grad(), keeping_graph() as saved:
        model(input_ids=ids, use_cache=False)
    assert window.kept == distinct_bytes(saved, model)


def test_a_pass_of_more_windows_and_other_lengths() -> None:
    model = tiny_model("llama").to("meta").requires_grad_(False)
    window, *_ = trace(model, find_linears(model), TOKENS, "llama")
    one, more = window.forward(1), window.forward(3, 2 * TOKENS)
    assert (one.products, one.attention) == (window.products + window.head, window.attention)
    assert (more.products, more.attention) == (6 * one.products, 12 * one.attention)
    assert more.moved == 6 * one.moved
    assert window.forward(1, head=False).products == one.products - window.head
    longer, *_ = trace(tiny_model("llama").to("meta"), find_linears(model), 2 * TOKENS, "llama")
    assert longer.products == 2 * window.products and longer.attention == 4 * window.attention


def test_layers_that_are_excluded_or_stored_otherwise(tiny_llama: Path) -> None:
    whole, less = shape_of(tiny_llama), shape_of(tiny_llama, exclude=("*.down_proj",), layout="pivoted")
    assert less.specs == tuple(replace(spec, layout="pivoted") for spec in whole.specs if spec.kind != "mlp.down_proj")
    assert less.parameters == whole.parameters
    with pytest.raises(UsageError, match="matches no linear layer"):
        shape_of(tiny_llama, exclude=("nothing",))


def test_a_model_that_looks_at_its_numbers_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward

    def looking(self: Any, x: torch.Tensor) -> torch.Tensor:
        assert bool((x > 0).any())
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", looking)
    folder = save_tiny(tmp_path / "llama", "llama")
    with pytest.raises(UnsupportedModelError, match="its forward pass needs numbers"):
        shape_of(folder)


@pytest.mark.parametrize("family", [*MIXTURES, "llama4_text"])
def test_an_expert_sees_its_share_of_the_tokens(family: str, tmp_path: Path) -> None:
    """A pass without numbers has the products that a pass with numbers has, whatever the router does."""
    tiny_config(family).save_pretrained(tmp_path)
    shape, model = shape_of(tmp_path), separate_experts(tiny_model(family)).requires_grad_(False)
    chosen = 1 if family == "llama4_text" else 2
    experts = [spec for spec in shape.specs if spec.pool is not None]
    assert {spec.name for spec in experts} == {spec.name for spec in find_linears(model) if spec.pool is not None}
    assert {shape.share(spec) for spec in experts} == {chosen / 5}
    assert all(shape.owners[spec.name] == spec.name for spec in experts)
    assert {shape.share(spec) for spec in shape.specs if spec.pool is None} == {1.0}
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(input_ids=torch.arange(3, 3 + TOKENS)[None], use_cache=False)
    products = flops.get_flop_counts()["Global"]
    counted = sum(count for operation, count in products.items() if "scaled_dot" not in str(operation))
    assert shape.window.products + shape.window.head == counted
