"""The language model inside a model that reads more than text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from ara.errors import ModelError, UnsupportedModelError
from ara.layouts.modeling_ara import separate_experts
from ara.models.multimodal import auto_class, auto_name, kept_parts, language_modules, reading_text_alone
from ara.models.processor import Processor, processor_files
from ara.models.weights import find_blocks, find_linears
from tests.families.configs import tiny_config
from tests.pictures import KINDS, picture_model
from tests.tiny import random_model, tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("kind", "path", "outside"),
    [
        # The picture's encoder is the larger one, and inside the same module.
        ("git", "git.encoder.layer", {"git.image_encoder"}),
        # So are the encoders of pictures and of sound.
        (
            "phi4_multimodal",
            "model.layers",
            {
                "model.embed_tokens_extend.image_embed.img_processor",
                "model.embed_tokens_extend.audio_embed.encoder",
            },
        ),
        ("qwen2_audio", "model.language_model.layers", {"model.audio_tower", "model.multi_modal_projector"}),
        ("llama4", "language_model.model.layers", {"vision_model", "multi_modal_projector"}),
    ],
)
def test_blocks_are_those_of_the_language_model(kind: str, path: str, outside: set[str]) -> None:
    model = separate_experts(random_model(tiny_config(kind)))
    found, blocks = find_blocks(model)
    assert found == path and blocks is model.get_submodule(path)
    parts = kept_parts(model)
    assert set(parts) == outside
    assert parts == {name: sum(weight.numel() for weight in model.get_submodule(name).parameters()) for name in outside}
    assert all(spec.name.startswith(path) for spec in find_linears(model))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_belongs_to_one_side(kind: str) -> None:
    model = picture_model(kind)
    inside = {id(weight) for module in language_modules(model).values() for weight in module.parameters()}
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    inside |= {id(weight) for module in ends for weight in module.parameters()}
    outside = {id(weight) for name in kept_parts(model) for weight in model.get_submodule(name).parameters()}
    assert inside.isdisjoint(outside)
    assert inside | outside == {id(weight) for weight in model.parameters()}


def test_a_model_of_text_has_no_other_parts() -> None:
    model = tiny_model("llama")
    assert language_modules(model) == dict(model.named_modules())
    assert kept_parts(model) == {}
    assert set(language_modules(nn.Linear(3, 4))) == {""}


def test_classes_to_load_with() -> None:
    assert auto_class("llama") is auto_class(None) is AutoModelForCausalLM
    assert auto_class("gemma3") is auto_class("qwen2_audio") is AutoModelForMultimodalLM
    assert auto_name("LlamaForCausalLM") == auto_name(None) == "AutoModelForCausalLM"
    assert auto_name("Gemma3ForConditionalGeneration") == "AutoModelForImageTextToText"
    assert auto_name("Qwen2AudioForConditionalGeneration") == "AutoModelForMultimodalLM"


def test_a_pass_that_needs_more_than_text_is_refused_by_the_class_and_the_error() -> None:
    model = random_model(tiny_config("kosmos-2"))
    said = r"Kosmos2ForConditionalGeneration does not read text alone \(ValueError: .*pixel_values"
    with pytest.raises(UnsupportedModelError, match=said), reading_text_alone(model):
        model(input_ids=torch.arange(9)[None])


def test_errors_of_other_kinds_stay_as_they_are() -> None:
    for model, error in (
        (tiny_model("llama"), ValueError("mine")),
        (picture_model("gemma3"), ModelError("mine")),
        (picture_model("gemma3"), OSError("mine")),
        (picture_model("gemma3"), torch.OutOfMemoryError("mine")),
    ):
        with pytest.raises(type(error), match="mine"), reading_text_alone(model):
            raise error


def test_files_of_a_processor_are_copied_unless_the_tokenizer_writes_them(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    for name in ("preprocessor_config.json", "chat_template.jinja", "notes.txt"):
        (source / name).write_text(f"of the model: {name}")
    processor = Processor(tiny_tokenizer(), processor_files(str(source), None))
    processor.save_pretrained(copy)
    tiny_tokenizer().save_pretrained(tmp_path / "alone")
    assert (copy / "preprocessor_config.json").read_text() == "of the model: preprocessor_config.json"
    written = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    assert "chat_template.jinja" in written
    assert {path.name for path in copy.iterdir()} == {*written, "preprocessor_config.json"}
    assert all((copy / name).read_bytes() == content for name, content in written.items())
