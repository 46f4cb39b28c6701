"""Every family of the graph builder against torch, and what no graph of a family can have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from ara.errors import ModelError, UnsupportedModelError
from ara.layouts.grid import Grid
from export.onnx.architecture import read_decoder
from export.onnx.config_fields import field_names
from export.onnx.families import FAMILIES, Family
from export.onnx.runner import OnnxDecoder
from tests.decoders import DECODERS, decoder_config
from tests.exportable import exported


def worst(about: dict[str, Any]) -> float:
    assert [case["case"] for case in about["parity"]["cases"]] == ["prefill", "decode", "chunks", "padded"]
    return max(case["difference"] for case in about["parity"]["cases"])


@pytest.mark.parametrize("family", DECODERS)
def test_a_graph_is_the_checkpoint(family: str, checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """One layer of the checkpoint is dense. The text is longer than the windows, also in the steps of decoding."""
    about = exported(checkpoint(family).folder, tmp_path / "out")
    assert worst(about) < 1e-4 and about["ranks"]
    assert all(case["agreement"] == 1 for case in about["parity"]["cases"])


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma3_text", "cohere"])
def test_pivoted_layers_are_the_checkpoint(family: str, checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    assert worst(exported(checkpoint(family, "pivoted").folder, tmp_path / "out")) < 1e-4


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("stablelm", {"use_parallel_residual": False}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("cohere", {"use_qk_norm": False}),
        ("phi", {"qk_layernorm": False}),
        ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("gpt2", {"n_inner": None}),
        ("opt", {"tie_word_embeddings": False, "enable_bias": False}),
    ],
)
def test_variants_are_the_checkpoint(
    family: str, changes: dict[str, Any], checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    plain, changed = checkpoint(family), checkpoint(family, **changes)
    ids = torch.arange(4, 60)[None]
    with torch.inference_mode():
        assert not torch.allclose(plain.model(ids).logits, changed.model(ids).logits, atol=1e-3)
    assert worst(exported(changed.folder, tmp_path / "out")) < 1e-4


def test_eight_bits_of_transposed_weights(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """A weight of (in, out) is rounded along its inputs, like any other, and may be multiplied exactly."""
    about = exported(checkpoint("gpt2", None).folder, tmp_path / "out", precision="int8")
    nodes = [node for node in ir.load(tmp_path / "out" / "model.onnx").graph if node.op_type == "MatMulNBits"]
    shapes = {node.name: (node.attributes["N"].as_int(), node.attributes["K"].as_int()) for node in nodes}
    exact = about["fallback"]["matrices"] if about["fallback"] else {}
    assert len(exact) + len(shapes) == 9  # four in each block, and the head
    for path, size in {"c_fc": (92, 96), "c_proj": (96, 92)}.items():
        name = f"transformer.h.1.mlp.{path}"
        assert name in exact or shapes[f"{name}/MatMulNBits"] == size


def test_few_bits_of_transposed_weights(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    made = checkpoint("gpt2", None, grid=Grid(4, 32, True))
    assert worst(exported(made.folder, tmp_path / "out", precision="fp32")) < 1e-4


@pytest.mark.parametrize("family", ["gpt2", "olmo2"])
def test_merged_inputs_and_last_logits(family: str, checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    made = checkpoint(family)
    about = exported(made.folder, tmp_path / "out", merge_shared_inputs=True, last_logits=True)
    assert max(case["difference"] for case in about["parity"]["cases"]) < 1e-4


@pytest.mark.parametrize(("family", "precision"), [("mixtral", "fp16"), ("mixtral", "int8"), ("glm4_moe", "fp16")])
def test_experts_in_other_precisions(
    family: str, precision: str, checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    about = exported(checkpoint(family).folder, tmp_path / "out", precision=precision)
    assert max(case["kl"] for case in about["parity"]["cases"]) < 0.02


def test_experts_of_few_bits(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    made = checkpoint("olmoe", grid=Grid(4, 32, True))
    assert worst(exported(made.folder, tmp_path / "out", precision="fp32")) < 1e-4


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_dense_mixture_is_the_model(family: str, checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """The files have every expert's matrices by the names of the hub."""
    assert worst(exported(checkpoint(family, None).folder, tmp_path / "out")) < 1e-4


def test_experts_may_all_be_dense_beside_factors(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    about = exported(checkpoint("mixtral", factorised="self_attn").folder, tmp_path / "out")
    assert worst(about) < 1e-4 and all("self_attn" in name for name in about["ranks"])


# -- a record that lacks something ----------------------------------------------------------------------------------


def _lacking(record: Any, default: Any) -> Iterator[tuple[str, Any]]:
    """Yield records that differ from ``record`` in one field, which has its default."""
    for field in dataclasses.fields(record):
        value, usual = getattr(record, field.name), getattr(default, field.name)
        if value == usual:
            continue
        if dataclasses.is_dataclass(value) and type(value) is type(usual):
            for name, inner in _lacking(value, usual):
                yield f"{field.name}.{name}", dataclasses.replace(record, **{field.name: inner})
        else:
            yield field.name, dataclasses.replace(record, **{field.name: usual})


LACKING = [
    pytest.param(family, record, id=f"{family}-{name}")
    for family in DECODERS
    for name, record in _lacking(FAMILIES[family], Family())
    # Modules that do not exist are refused anyway, and the last one is for the comparison of rotary tables.
    if not name.startswith(("names.", "only", "rotation.neighbours"))
]


@pytest.mark.parametrize(("family", "record"), LACKING)
def test_everything_in_a_record_matters(
    family: str, record: Family, checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any one part of it the export is refused, or the logits are others."""
    made = checkpoint(family)
    monkeypatch.setitem(FAMILIES, family, record)
    try:
        exported(made.folder, tmp_path / "out", parity=False)
        decoder = OnnxDecoder(tmp_path / "out", threads=1)
    except ModelError:
        return
    ids = np.arange(4, 60)[None]
    logits, _ = decoder.forward(ids)
    with torch.inference_mode():
        expected = made.model(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(logits - expected).max() > 1e-3


# -- what a config may ask for --------------------------------------------------------------------------------------

# Fields that change nothing that a graph computes.
HARMLESS = {
    *("attention_dropout", "attn_pdrop", "classifier_dropout", "dropout", "embd_pdrop", "embedding_dropout"),
    *("hidden_dropout", "layerdrop", "resid_pdrop", "residual_dropout", "init_std", "initializer_range"),
    *("use_cache", "pretraining_tp", "is_decoder", "reorder_and_upcast_attn", "eos_token_id"),
    *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    # Biases are found among the weights, and the number of positions by read_context.
    *("attention_bias", "attention_out_bias", "enable_bias", "mlp_bias", "use_bias", "use_qkv_bias"),
    *("max_position_embeddings", "n_positions", "original_max_position_embeddings"),
    # The config itself computes layer_types, sliding_window, no_rope_layers and rope_parameters from these.
    *("max_window_layers", "no_rope_layer_interval", "sliding_window_pattern", "_sliding_window_pattern"),
    "partial_rotary_factor",
    "use_sliding_window",
    # Layers that predict further tokens; transformers does not load them.
    "num_nextn_predict_layers",
    # Of training alone.
    *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "qkv_bias"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_a_config_is_read_or_fixed(family: str) -> None:
    """A field that a new version of transformers adds is found here."""
    config, record = AutoConfig.for_model(family), FAMILIES[family]
    aliases = getattr(config, "attribute_map", {})
    read = {aliases.get(name, name) for name in (*field_names(record).values(), *record.only)}
    ignored = HARMLESS | ({"attn_logit_softcapping"} if family == "gemma3_text" else set())  # the model ignores it
    assert set(config.to_dict()) - set(PreTrainedConfig().to_dict()) <= read | ignored


@pytest.mark.parametrize(
    ("family", "changes", "complaint"),
    [
        ("olmo", {"clip_qkv": 8.0}, "clip_qkv of this olmo model is 8.0; the ONNX graph builder knows only None"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm of this stablelm model is True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx of this gpt2 model is"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights of this gpt2 model is False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention of this gpt2 model is True"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before of this opt model is False"),
        ("opt", {"word_embed_proj_dim": 60}, "word_embed_proj_dim of this opt model is 60; .* only 96"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine of this opt model"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "reads text in both directions"),
        (
            "ministral",
            {"layer_types": ["full_attention", "chunked_attention"]},
            "layer_types names 'chunked_attention'",
        ),
        ("stablelm", {"partial_rotary_factor": 0.25}, "heads are 32 wide and 8 of that is rotated"),
        ("arcee", {"hidden_act": "xielu"}, "the activation 'xielu' is not known"),
        ("glm4_moe", {"n_group": 2}, "n_group of this glm4_moe model is 2; .* only 1"),
    ],
)
def test_what_no_graph_can_have_is_refused_by_name(family: str, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnsupportedModelError, match=complaint) as caught:
        read_decoder(decoder_config(family, **changes))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("family", "field", "value", "complaint"),
    [
        ("gemma2", "sliding_window", None, "layer_types names sliding_attention, and sliding_window is missing"),
        ("gemma2", "final_logit_softcapping", 0.0, "final_logit_softcapping: Input should be greater than 0"),
        ("gemma2", "query_pre_attn_scalar", "x", "query_pre_attn_scalar: Input should be a valid number"),
        ("granite", "residual_multiplier", float("nan"), "residual_multiplier: Input should be"),
        ("cohere", "logit_scale", None, "logit_scale: Input should be a valid number"),
        ("smollm3", "no_rope_layers", [1], "it has 2 layers and 1 no_rope_layers"),
        ("smollm3", "no_rope_layers", None, "no_rope_layers is missing"),
        ("olmo3", "layer_types", None, "layer_types is missing"),
        ("gemma3_text", "rope_parameters", {"full_attention": {"rope_theta": 1e4}}, "of sliding_attention: Field requ"),
        ("gemma3_text", "rope_parameters", {"full_attention": {}}, "rope_parameters.full_attention.rope_theta: Field"),
        ("gpt2", "layer_norm_epsilon", "x", "layer_norm_epsilon: Input should be a valid number"),
        ("stablelm", "rope_parameters", None, "rope_parameters: Field required"),
    ],
)
def test_a_field_that_cannot_be_is_named(family: str, field: str, value: Any, complaint: str) -> None:
    config = decoder_config(family)
    # Past the checks of transformers, which are not the same in all its versions.
    config.__dict__[field] = value
    with pytest.raises(ModelError, match=complaint) as caught:
        read_decoder(config)
    assert "config.json cannot be used" in str(caught.value)


def test_fields_of_other_families_are_not_read() -> None:
    """A config may have fields that its model ignores."""
    config = AutoConfig.for_model("llama", sliding_window=16, num_hidden_layers=2, logit_scale=0.5)
    decoder = read_decoder(config)
    assert decoder.windows == (None, None) and decoder.logit_scale == 1
