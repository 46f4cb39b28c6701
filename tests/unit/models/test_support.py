"""Which configs are decoder-only language models."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from ara.errors import UnsupportedModelError
from ara.models.support import architecture_name, check_decoder_only, check_quantization
from tests.tiny import FAMILIES, tiny_config


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_families_pass_with_and_without_architectures(family: str) -> None:
    config = tiny_config(family)
    check_decoder_only(config, family)
    name = architecture_name(config)
    config.architectures = [name]
    check_decoder_only(config, family)
    assert hasattr(transformers, name)


@pytest.mark.parametrize(
    ("config_class", "architecture"),
    [
        ("GPT2Config", "GPT2LMHeadModel"),
        ("LlamaConfig", "LlamaForCausalLM"),
        ("OPTConfig", "OPTForCausalLM"),
        ("GemmaConfig", "GemmaForCausalLM"),
        ("Gemma3TextConfig", "Gemma3ForCausalLM"),
        ("PhiConfig", "PhiForCausalLM"),
        ("Qwen2Config", "Qwen2ForCausalLM"),
        ("Qwen3Config", "Qwen3ForCausalLM"),
        ("GPTNeoXConfig", "GPTNeoXForCausalLM"),
        ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel"),
        ("LlavaConfig", "LlavaForConditionalGeneration"),
        ("Gemma3Config", "Gemma3ForConditionalGeneration"),
        ("Qwen2AudioConfig", "Qwen2AudioForConditionalGeneration"),
    ],
)
def test_decoders_pass(config_class: str, architecture: str) -> None:
    config = getattr(transformers, config_class)(architectures=[architecture])
    check_decoder_only(config, "it")
    assert architecture_name(config) == architecture


@pytest.mark.parametrize(
    ("config_class", "values", "reason"),
    [
        ("BertConfig", {}, "is an encoder"),
        ("BertConfig", {"architectures": ["BertForMaskedLM"]}, "has no head that predicts the next token"),
        ("BertConfig", {"architectures": ["BertModel"]}, "has no head"),
        ("RobertaConfig", {"architectures": ["RobertaForMaskedLM"]}, "has no head"),
        ("ModernBertConfig", {"architectures": ["ModernBertForMaskedLM"]}, "is not a causal language model"),
        ("T5Config", {"architectures": ["T5ForConditionalGeneration"]}, "is an encoder-decoder model"),
        ("BartConfig", {"architectures": ["BartForCausalLM"]}, "is an encoder-decoder model"),
        ("WhisperConfig", {}, "is an encoder-decoder model"),
        ("ViTConfig", {"architectures": ["ViTForImageClassification"]}, "is not a causal language model"),
        ("CLIPConfig", {"architectures": ["CLIPModel"]}, "is a vision or audio model"),
        ("LlavaConfig", {"architectures": ["LlavaModel"]}, "is no LlavaForConditionalGeneration, the class of its"),
        ("Qwen3_5Config", {"architectures": ["Qwen3_5ForCausalLM"]}, "is no Qwen3_5ForConditionalGeneration"),
        ("PaliGemmaConfig", {}, "is no left-to-right model: its attention"),
        ("Qwen2_5OmniConfig", {}, "is two models, a thinker and a talker"),
        ("ShieldGemma2Config", {}, "is a classifier of pictures"),
        ("Blip2Config", {"text_config": {"model_type": "t5"}}, "is an encoder-decoder model"),
        ("MoshiConfig", {}, "is a vision or audio model"),
        ("BertGenerationConfig", {}, "is an encoder"),
        ("CpmAntConfig", {}, "is no left-to-right model: its attention"),
        ("ReformerConfig", {"is_decoder": True}, "is no left-to-right model: later tokens"),
        ("XLNetConfig", {"architectures": ["XLNetLMHeadModel"]}, "is no left-to-right model"),
        ("LlamaConfig", {"architectures": ["LlamaForSequenceClassification"]}, "has no head"),
        ("Gemma3TextConfig", {"use_bidirectional_attention": True}, "is no left-to-right model: its attention"),
        ("Gemma3Config", {"text_config": {"use_bidirectional_attention": True}}, "is no left-to-right model"),
    ],
)
def test_others_are_refused_and_named(config_class: str, values: dict[str, Any], reason: str) -> None:
    config = getattr(transformers, config_class)(**values)
    with pytest.raises(UnsupportedModelError, match=f"^mine {reason}") as caught:
        check_decoder_only(config, "mine")
    message = str(caught.value)
    assert f"model_type {config.model_type}" in message
    assert (values.get("architectures") or ["none named"])[0] in message
    assert "expected a decoder-only language model" in message


def test_a_bert_trained_as_a_decoder_passes() -> None:
    check_decoder_only(transformers.BertConfig(is_decoder=True, architectures=["BertLMHeadModel"]), "it")


def test_own_code_does_not_count() -> None:
    config = transformers.PreTrainedConfig(architectures=["MineModel"])
    config.auto_map = {"AutoModelForCausalLM": "modeling_mine.MineModel"}
    with pytest.raises(UnsupportedModelError):
        check_decoder_only(config, "it")


def test_quantised_and_compressed_are_told_apart() -> None:
    check_quantization({"model_type": "llama", "quantization_config": None}, "it")
    with pytest.raises(UnsupportedModelError, match="already compressed by ARA"):
        check_quantization({"quantization_config": {"quant_method": "ara"}}, "it")
    with pytest.raises(UnsupportedModelError, match=r"already quantised \(gptq\)") as caught:
        check_quantization({"quantization_config": {"quant_method": "gptq"}}, "it")
    assert caught.value.hint == "use the original weights"
    with pytest.raises(UnsupportedModelError, match=r"\(compressed-tensors\)"):
        check_quantization({"compression_config": {"quant_method": "compressed-tensors"}}, "it")
