"""Counted multiplications and bytes against torch's own counter and against tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MambaConfig, PreTrainedModel

from ara.errors import UnsupportedModelError
from ara.evaluation.cost import Case, Cost, cost_of, count_model
from ara.models.checkpoint import load
from tests.tiny import FAMILIES, tiny_config, tiny_model


def counted_macs(model: PreTrainedModel, case: Case, **options: Any) -> int:
    """Return what torch's counter finds, in plain attention, masked pairs included; rotary angles left out."""
    model.set_attn_implementation("eager")
    ids = torch.randint(4, 200, (case.batch, case.past + case.new))
    with torch.inference_mode():
        cache = model(ids[:, : case.past], use_cache=True).past_key_values if case.past else None
        with FlopCounterMode(display=False) as counter:
            model(ids[:, case.past :], past_key_values=cache, use_cache=True, **options)
    counts = counter.get_flop_counts()
    angles = [sum(found.values()) for name, found in counts.items() if name.endswith("rotary_emb")]
    return (sum(counts["Global"].values()) - sum(angles)) // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoded_token_multiplies_what_torch_counts(family: str) -> None:
    model, case = tiny_model(family), Case(3, 21, 1)
    assert count_model(model, last_logits=True).macs(case) == counted_macs(model, case)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("case", [Case(2, 0, 17), Case(3, 5, 11)])
def test_a_prompt_multiplies_no_pair_that_it_does_not_see(case: Case, last: bool) -> None:
    model = tiny_model("llama")
    masked = case.new * (case.new - 1) // 2
    # 6 query heads of 14 in each of 3 blocks, a score and a weighted value per pair.
    expected = counted_macs(model, case, logits_to_keep=int(last)) - 2 * case.batch * 3 * 84 * masked
    assert count_model(model, last_logits=last).macs(case) == expected


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
def test_low_rank_layers_count_their_parts(checkpoint: Any, layout: str) -> None:
    model = load(checkpoint("llama", layout).folder, "cpu")
    case = Case(2, 9, 1)
    assert count_model(model, last_logits=False).macs(case) == counted_macs(model, case)


@pytest.mark.parametrize("layout", [None, "factors"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_token_multiplies_with_the_experts_that_it_gets(checkpoint: Any, family: str, layout: str | None) -> None:
    model = load(checkpoint(family, layout).folder, "cpu")
    model.config._experts_implementation = "eager"
    cost, case = count_model(model, last_logits=False), Case(4, 9, 1)
    # The ranks of experts differ, and so does their work.
    tolerance = 0 if layout is None else 0.1 * cost.experts * cost.expert_share * case.tokens
    assert cost.experts and cost.macs(case) == pytest.approx(counted_macs(model, case), abs=tolerance)


def test_more_tokens_read_more_experts() -> None:
    shared: dict[str, Any] = {"head": 0, "query_width": 1, "cache_width": 1, "windows": (), "cache_bytes": 1}
    cost = Cost(linear=10, weight_bytes=1, last_logits=False, experts=800, expert_share=0.25, **shared)
    assert [cost.bytes_read(Case(batch, 1, 1)) for batch in (1, 2)] == [10 + 200, 10 + 350]
    assert cost.bytes_read(Case(64, 1, 1)) == pytest.approx(810)
    assert cost.macs(Case(2, 0, 3)) == 6 * (10 + 200)


def test_a_config_without_the_number_of_experts_of_a_token_is_refused() -> None:
    counts: dict[str, Any] = {"linear": 1, "head": 1, "weight_bytes": 2, "cache_bytes": 2, "last_logits": True}
    with pytest.raises(UnsupportedModelError, match="how many a token gets"):
        cost_of(tiny_config("llama"), experts=5, **counts)


def windowed(window: int) -> PreTrainedModel:
    config = tiny_config("mistral")
    config.sliding_window = window
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "window"])
def test_bytes_are_those_of_weights_and_caches(family: str) -> None:
    """Heads of keys and values are fewer than those of queries in llama; a window of 6 keeps 5 positions."""
    model = windowed(6) if family == "window" else tiny_model(family)
    case = Case(3, 21, 1)
    with torch.inference_mode():
        cache = model(torch.randint(4, 200, (case.batch, case.past)), use_cache=True).past_key_values
    caches = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    kinds = (nn.Linear,) if family != "gpt2" else (nn.Linear, type(model.transformer.h[0].mlp.c_fc))
    weights = sum(module.weight.nbytes for module in model.modules() if isinstance(module, kinds))
    cost = count_model(model, last_logits=True)
    assert cost.bytes_read(case) == weights + caches
    half = count_model(model.to(torch.bfloat16), last_logits=True)
    assert half.bytes_read(case) == (weights + caches) / 2
    assert half.macs(case) == cost.macs(case)


def test_a_window_limits_pairs() -> None:
    model = windowed(6)
    assert count_model(model, last_logits=True).macs(Case(2, 21, 1)) == counted_macs(model, Case(2, 21, 1))
    cost = count_model(model, last_logits=True)
    seen = sum(min(position + 1, 6) for position in range(17))
    assert cost.macs(Case(1, 0, 17)) == 17 * cost.linear + cost.head + 2 * 3 * 84 * seen


def test_prompts_are_predicted_by_multiplications_and_tokens_by_bytes() -> None:
    shared: dict[str, Any] = {"head": 10, "query_width": 1, "cache_width": 1, "windows": (None,), "cache_bytes": 4}
    dense = Cost(linear=90, weight_bytes=4, last_logits=False, **shared)
    half = Cost(linear=40, weight_bytes=1, last_logits=False, **shared)
    prompt, token = Case(1, 0, 7), Case(2, 5, 1)
    assert half.predicted_ratio(dense, prompt) == (7 * 100 + 2 * 28) / (7 * 50 + 2 * 28)
    assert half.predicted_ratio(dense, token) == (400 + 2 * 5 * 8) / (50 + 2 * 5 * 8)
    assert dense.predicted_ratio(dense, token) == 1
    assert (prompt.kind, token.kind) == ("prefill", "decode")
    assert (prompt.tokens, token.tokens) == (7, 2)


class _PerLayer:
    """A config whose layers have heads of their own, as that of Gemma 4 has in new versions of transformers."""

    model_type = "per_layer"

    def get_text_config(self) -> _PerLayer:
        return self

    @property
    def num_attention_heads(self) -> int:
        raise RuntimeError("'num_attention_heads' may vary across layers")


@pytest.mark.parametrize("config", [MambaConfig(), _PerLayer()], ids=["mamba", "per layer"])
def test_models_without_heads_of_one_width_are_refused(config: Any) -> None:
    counts: dict[str, Any] = {"linear": 1, "head": 1, "weight_bytes": 2, "cache_bytes": 2, "last_logits": True}
    with pytest.raises(UnsupportedModelError, match=rf"^the work of a {config.model_type} model cannot be counted"):
        cost_of(config, **counts)
