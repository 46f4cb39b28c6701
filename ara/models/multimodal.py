"""Models that read pictures or sound as well as text: only the language model inside them is compressed.

Everything else in them, such as vision tower and projector, stays as it is. All passes of ARA read text alone, so these
parts are never called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ara.errors import AraError, UnsupportedModelError, first_line, is_out_of_memory

if TYPE_CHECKING:
    from torch import nn


def is_multimodal(model_type: str | None) -> bool:
    """Tell whether transformers knows models of this type that read pictures or sound and write text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES


def auto_class(model_type: str | None) -> Any:
    """Return the ``AutoModel`` class that loads a model of this type, with everything that it reads."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    return AutoModelForMultimodalLM if is_multimodal(model_type) else AutoModelForCausalLM


def auto_name(architecture: str | None) -> str:
    """Return the name of the ``AutoModel`` class with which users load models of a class of transformers."""
    from transformers.models.auto import modeling_auto as tables

    if architecture in tables.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        return "AutoModelForImageTextToText"
    if architecture in tables.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values():
        return "AutoModelForMultimodalLM"
    return "AutoModelForCausalLM"


def reads_text_alone(architecture: str | None) -> bool:
    """Tell whether models of a class of transformers read nothing but text."""
    return auto_name(architecture) == "AutoModelForCausalLM"


def language_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return path → module of the language model inside ``model``: of all its modules if it reads only text.

    A part of a model of transformers has the config that it was made from. The language model has the text config, a
    vision tower has another one. Where the whole model has one config (GIT, Phi-4 multimodal), projections count as
    parts of the language model.
    """
    from transformers import PreTrainedConfig

    config = getattr(model, "config", None)
    if not is_multimodal(getattr(config, "model_type", None)):
        return dict(model.named_modules())
    assert isinstance(config, PreTrainedConfig)
    text, found = type(config.get_text_config()), dict[str, Any]()

    def walk(path: str, module: nn.Module, inside: bool) -> None:
        own = getattr(module, "config", None)
        if isinstance(own, PreTrainedConfig):
            inside = type(own) is text
        if inside:
            found[path] = module
        for name, child in module.named_children():
            walk(f"{path}.{name}".removeprefix("."), child, inside)

    walk("", model, False)
    return found


def kept_parts(model: Any) -> dict[str, int]:
    """Return path → parameters of the parts of ``model`` outside the language model, its embedding and its head."""
    inside = set(language_modules(model).values())
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    found: dict[str, int] = {}

    def walk(path: str, module: nn.Module) -> None:
        if module in ends:
            return
        if inside.isdisjoint(module.modules()):
            if count := sum(parameter.numel() for parameter in module.parameters()):
                found[path] = count
            return
        for name, child in module.named_children():
            walk(f"{path}.{name}".removeprefix("."), child)

    walk("", model)
    return found


@contextmanager
def reading_text_alone(model: nn.Module) -> Iterator[None]:
    """Refuse a multimodal model whose forward pass fails without pictures or sound.

    Raises:
        UnsupportedModelError: it does; out-of-memory errors, OSError and our own errors pass unchanged.
    """
    try:
        yield
    except Exception as error:  # the model's own code may raise anything
        known = isinstance(error, AraError | OSError) or is_out_of_memory(error)
        if known or not is_multimodal(getattr(getattr(model, "config", None), "model_type", None)):
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} does not read text alone ({type(error).__name__}: {first_line(error)})",
            "ARA compresses models whose forward pass needs nothing but tokens",
        ) from error
