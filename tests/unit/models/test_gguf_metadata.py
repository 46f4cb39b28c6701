"""Every key of a GGUF file that changes the function of the model is read right, or the file is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ara.errors import AraError, ModelError, UnsupportedModelError
from ara.models.gguf_metadata import gguf_config
from ara.models.gguf_parts import read_contents
from ara.models.gguf_rope import llama3_factors
from ara.models.sources import resolve
from tests.gguf_files import More, gguf_model, write_gguf

WIDE = {"head_dim": 14}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
    "rope.scaling.yarn_beta_fast": 20.0,
}
SHORT, LONG = [1.0, 1.25], [2.0, 2.5]
# Longer than all windows and all original contexts below.
IDS = torch.tensor([[(7 * i * i + 3 * i) % 250 + 5 for i in range(90)]])


def rope(kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **more}}


def factors(**tensors: list[float]) -> More:
    def more(writer: gguf.GGUFWriter) -> None:
        for name, values in tensors.items():
            writer.add_tensor(f"{name}.weight", np.array(values, np.float32))

    return more


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
GEMMA2 = {"query_pre_attn_scalar": 14, "sliding_window": 30, "final_logit_softcapping": 3.0, **rope()}
GEMMA2_KEYS = {"attention.sliding_window": 30, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 0.0}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
GEMMA3 = {"num_hidden_layers": 7, "query_pre_attn_scalar": 14, "sliding_window": 30, "rope_parameters": GEMMA3_ROPE}
LONGROPE = rope("longrope", partial_rotary_factor=0.4, short_factor=SHORT, long_factor=LONG, attention_factor=1.2)
LONGROPE_KEYS = {
    "rope.dimension_count": 4,
    "rope.scaling.attn_factor": 1.2,
    "rope.scaling.original_context_length": 64,
    "attention.sliding_window": 40,
}

NO_NORM = {"attention.layer_norm_epsilon": None}
MAMBA = {"state_size": 5, "time_step_rank": 7, "intermediate_size": 120, "layer_norm_epsilon": 0.1}
MAMBA_KEYS = {
    "attention.layer_norm_rms_epsilon": 0.1,
    **NO_NORM,
    "attention.head_count": 0,
    "attention.head_count_kv": None,
    "feed_forward_length": 0,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 120,
    "ssm.state_size": 5,
    "ssm.time_step_rank": 7,
}
QWEN35 = {
    "num_hidden_layers": 4,
    "head_dim": 20,
    "full_attention_interval": 2,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 7,
    "linear_value_head_dim": 9,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    **rope(partial_rotary_factor=0.4, mrope_section=[2, 1, 1], mrope_interleaved=True),
}
QWEN35_KEYS = {
    "full_attention_interval": 2,
    "rope.dimension_count": 8,
    "rope.dimension_sections": [2, 1, 1, 0],
    "ssm.conv_kernel": 3,
    "ssm.group_count": 2,
    "ssm.inner_size": 18,
    "ssm.state_size": 7,
    "ssm.time_step_rank": 2,
}

# architecture, model type, its config, keys and tensors that say the same in the file
READ: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], More | None]] = {
    "plain": ("llama", "llama", WIDE, {"rope.dimension_count": 14, "expert_count": 0}, None),
    "default heads": ("llama", "llama", {}, {"attention.key_length": None, "attention.value_length": None}, None),
    "biases": ("llama", "llama", {**WIDE, "attention_bias": True, "mlp_bias": True}, {}, None),
    "linear": (
        "llama",
        "llama",
        WIDE | rope("linear", factor=4.0),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        None,
    ),
    "linear, old key": ("llama", "llama", WIDE | rope("linear", factor=4.0), {"rope.scale_linear": 4.0}, None),
    "no scaling": (
        "llama",
        "llama",
        WIDE | rope(),
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        None,
    ),
    "yarn": (
        "qwen2",
        "qwen2",
        rope("yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=20.0),
        YARN_KEYS,
        None,
    ),
    "llama 3.1": (
        "llama",
        "llama",
        WIDE | rope("llama3", **LLAMA3),
        {},
        factors(rope_freqs=llama3_factors(LLAMA3, 500.0, 14)),
    ),
    "any factors": (
        "llama",
        "llama",
        WIDE | rope("longrope", short_factor=[1.5] * 7, long_factor=[1.5] * 7, attention_factor=1.0),
        {},
        factors(rope_freqs=[1.5] * 7),
    ),
    "longrope": (
        "phi3",
        "phi3",
        {**LONGROPE, "original_max_position_embeddings": 64, "sliding_window": 40},
        LONGROPE_KEYS,
        factors(rope_factors_short=SHORT, rope_factors_long=LONG),
    ),
    "head width": ("qwen3", "qwen3", WIDE | rope(), {}, None),
    "gemma2": ("gemma2", "gemma2", {**WIDE, **GEMMA2, "attn_logit_softcapping": None}, GEMMA2_KEYS, None),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        WIDE | GEMMA3,
        {"attention.sliding_window": 30, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        None,
    ),
    "base and epsilon": ("starcoder2", "starcoder2", {"norm_epsilon": 0.1, **rope()}, {}, None),
    "part of each head": (
        "stablelm",
        "stablelm",
        {**rope(partial_rotary_factor=0.6), "layer_norm_eps": 0.1, "use_parallel_residual": True},
        {"rope.dimension_count": 6, "use_parallel_residual": True},
        None,
    ),
    "nemotron": (
        "nemotron",
        "nemotron",
        {**WIDE, "norm_eps": 0.1, **rope(partial_rotary_factor=6 / 14)},
        {"rope.dimension_count": 6},
        None,
    ),
    "bloom": (
        "bloom",
        "bloom",
        {"n_layer": 3, "n_head": 6, "layer_norm_epsilon": 0.1},
        {"feed_forward_length": 240},
        None,
    ),
    "mamba": ("mamba", "mamba", MAMBA, MAMBA_KEYS, None),
    "lfm2": (
        "lfm2",
        "lfm2",
        {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False, **rope()},
        {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.head_count_kv": [0, 2, 0],
            "shortconv.l_cache": 3,
            **NO_NORM,
        },
        None,
    ),
    "qwen3.5": ("qwen35", "qwen3_5_text", QWEN35, QWEN35_KEYS, None),
    "gpt2": ("gpt2", "gpt2", {"n_inner": 92, "layer_norm_epsilon": 0.1}, {"attention.head_count_kv": None}, None),
    "falcon": (
        "falcon",
        "falcon",
        {"num_kv_heads": 1, "ffn_hidden_size": 92, "layer_norm_epsilon": 0.1, **rope()},
        {"tensor_data_layout": "jploski", "attention.head_count_kv": 1},
        None,
    ),
}


def log_probabilities(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits.log_softmax(-1)
    return found


@pytest.mark.parametrize("case", READ)
def test_the_model_is_the_one_that_was_written(case: str, cache: Path, tmp_path: Path) -> None:
    architecture, kind, config, keys, more = READ[case]
    model = gguf_model(kind, **config)
    path = write_gguf(tmp_path / "model.gguf", model, architecture, keys, more)
    found = resolve(str(path)).load_model(torch.float32)
    assert torch.allclose(log_probabilities(found), log_probabilities(model), atol=1e-4, rtol=0)


def test_llama_settings_are_recovered(tmp_path: Path) -> None:
    settings = {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}
    more = factors(rope_freqs=llama3_factors(settings, 500000.0, 14))
    path = write_gguf(tmp_path / "a.gguf", gguf_model("llama", **WIDE), "llama", {"rope.freq_base": 500000.0}, more)
    config = gguf_config("a", read_contents((path,)))
    assert config.rope_parameters == {"rope_type": "llama3", "rope_theta": 500000.0, **settings}


def test_the_scale_of_the_largest_gemma_is_known_by_its_blocks(tmp_path: Path) -> None:
    for layers, expected in ((46, 10), (45, 14)):
        model = gguf_model("gemma2", **WIDE, num_hidden_layers=layers, intermediate_size=3)
        path = write_gguf(tmp_path / f"{layers}.gguf", model, "gemma2", {"attention.sliding_window": 30})
        assert gguf_config("a", read_contents((path,))).query_pre_attn_scalar == expected


def _replace(writer: gguf.GGUFWriter, name: str, value: list[Any]) -> None:
    writer.kv_data[0].pop(f"tokenizer.ggml.{name}")
    writer.add_array(f"tokenizer.ggml.{name}", value)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return gguf_model("llama", **WIDE)


def refusal(path: Path) -> AraError:
    with pytest.raises(AraError) as caught:
        gguf_config(str(path), read_contents((path,)))
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.causal", False),
        ("attention.clamp_kqv", 8.0),
        ("attention.max_alibi_bias", 8.0),
        ("attention.scale", 0.5),
        ("attention.sliding_window", 64),
        ("attention.value_length", 12),
        ("attn_logit_softcapping", 50.0),
        ("embedding_scale", 12.0),
        ("expert_count", 8),
        ("feed_forward_length", [92, 92, 60]),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.0625),
        ("residual_scale", 0.22),
        ("rope.dimension_count", 8),
        ("rope.dimension_sections", [4, 2, 1, 0]),
        ("rope.scaling.attn_factor", 1.19),
        ("rope.scaling.type", "quadratic"),
        ("rope.scaling.yarn_attn_factor", 1.2),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("something_new", 1),
        ("use_parallel_residual", True),
    ],
)
def test_what_cannot_be_read_is_named(key: str, value: Any, llama: PreTrainedModel, tmp_path: Path) -> None:
    error = refusal(write_gguf(tmp_path / "model.gguf", llama, "llama", {key: value}))
    assert isinstance(error, UnsupportedModelError)
    assert key in str(error)
    assert (f"{value:g}" if isinstance(value, float) else repr(value)) in str(error)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("attention.head_count", None, "attention.head_count is 'missing'"),
        ("attention.head_count", 0, "is 0, expected a positive integer"),
        ("attention.head_count", "6", "is '6', expected a positive integer"),
        ("attention.head_count", True, "is True, expected a positive integer"),
        ("attention.layer_norm_rms_epsilon", None, "expected a number"),
        ("attention.layer_norm_rms_epsilon", float("nan"), "is nan, expected a number"),
        ("block_count", 10_000_000, "block_count is 10000000, but it holds tensors of 3 blocks"),
        ("embedding_length", 2**31, r"token_embd\.weight has shape \[260, 60\], expected \[vocabulary, 2147483648\]"),
        ("rope.freq_base", 0.0, "expected a number above 1"),
        ("rope.scaling.factor", "four", "expected a number"),
        ("vocab_size", 32000, "expected 260, the rows of token_embd"),
    ],
)
def test_keys_that_cannot_be(key: str, value: Any, words: str, llama: PreTrainedModel, tmp_path: Path) -> None:
    error = refusal(write_gguf(tmp_path / "model.gguf", llama, "llama", {key: value}))
    with pytest.raises(ModelError, match=words):
        raise error


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (lambda writer: writer.add_string("adapter.type", "lora"), "adapter.type = 'lora'"),
        (lambda writer: writer.add_uint32("qwen2.block_count", 3), "qwen2.block_count = 3"),
        (lambda writer: writer.add_type("mmproj"), "general.type is 'mmproj'"),
        (lambda writer: _replace(writer, "tokens", ["a" * 5000]), "a token has 5,000 characters"),
        (lambda writer: _replace(writer, "tokens", [1, 2]), "expected a list of strings"),
        (lambda writer: _replace(writer, "token_type", [1, 1]), "token_type does not fit the 260 tokens"),
        (lambda writer: _replace(writer, "merges", [1]), "merges does not fit"),
        (factors(rope_freqs=[1.0] * 6), "expected float32, [7]"),
        (factors(rope_freqs=[0.0] * 7), "not positive"),
        (factors(rope_factors_short=[1.0] * 7), "only rope_factors_short.weight"),
    ],
)
def test_other_namespaces_tokens_and_tensors(
    more: Callable[[gguf.GGUFWriter], None], words: str, llama: PreTrainedModel, tmp_path: Path
) -> None:
    assert words in str(refusal(write_gguf(tmp_path / "model.gguf", llama, more=more)))


def test_keys_of_no_consequence_are_passed_over(llama: PreTrainedModel, tmp_path: Path) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_string("mradermacher.quantized_by", "somebody")
        writer.add_string("quantize.imatrix.file", "imatrix.dat")
        writer.add_name("mistral")

    path = write_gguf(tmp_path / "model.gguf", llama, more=more, keys={"attention.sliding_window": 256})
    assert gguf_config("a", read_contents((path,))).num_hidden_layers == 3


def test_tensors_that_the_model_has_no_place_for(llama: PreTrainedModel, cache: Path, tmp_path: Path) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.1.attn_q_norm.weight", np.ones(14, np.float32))

    path = write_gguf(tmp_path / "model.gguf", llama, more=more)
    with pytest.raises(UnsupportedModelError, match=r"holds 1 tensors .* no place for: blk\.1\.attn_q_norm\.weight"):
        resolve(str(path)).load_model(torch.float32)
