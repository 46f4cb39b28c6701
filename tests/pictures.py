"""Tiny random models that read pictures, and inputs with a picture for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.families.configs import tiny_config
from tests.tiny import VOCABULARY, random_model, save_with_tokenizer

# Files of other names in Gemma 3 and Mistral 3 than in memory; a tied head in Gemma 3; positions of three axes and
# pictures that enter between blocks in Qwen3-VL.
KINDS = ("gemma3", "mistral3", "qwen3_vl")
# A picture has 16 patches, of which every model makes 4 tokens.
_PATCHES, _TOKENS = 16, 4


def picture_model(kind: str) -> PreTrainedModel:
    """Return a random float32 model of one of ``KINDS``."""
    return random_model(tiny_config(kind))


def save_picture_model(path: Path, kind: str) -> Path:
    """Save a random model of one of ``KINDS`` with a tokenizer and a file of its processor; returns the folder."""
    folder = save_with_tokenizer(path, picture_model(kind))
    (folder / "preprocessor_config.json").write_text('{"do_resize": false}\n', encoding="utf-8")
    return folder


def picture_inputs(model: PreTrainedModel, seed: int = 0) -> dict[str, Any]:
    """Return inputs of ``model``: a text of 20 tokens with a random picture in it."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    picture = getattr(config, "image_token_id", None) or config.image_token_index
    ids = torch.randint(20, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(1))
    ids[ids == picture] = 19
    ids[0, 5 : 5 + _TOKENS] = picture
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if config.model_type.startswith("qwen"):
        seen = config.vision_config
        width = seen.in_channels * seen.temporal_patch_size * seen.patch_size**2
        pixels = torch.randn(_PATCHES, width, generator=generator)
        inputs |= {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
        return inputs | {"mm_token_type_ids": (ids == picture).int()}
    side = config.vision_config.image_size
    inputs["pixel_values"] = torch.randn(1, 3, side, side, generator=generator)
    if config.model_type == "mistral3":
        inputs["image_sizes"] = torch.tensor([[side, side]])
    return inputs


@torch.no_grad()
def logits_of(model: PreTrainedModel, seed: int = 0) -> torch.Tensor:
    """Return the logits (20, v) for the inputs of :func:`picture_inputs`."""
    logits: torch.Tensor = model(**picture_inputs(model, seed)).logits
    return logits[0]
