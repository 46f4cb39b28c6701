"""Config of ``ara generate``."""

from __future__ import annotations

from pydantic import Field

from ara import bounds
from ara.config.base import PlacementConfig


class GenerateConfig(PlacementConfig):
    """``ara generate``: continue a text, greedily."""

    backend: str = Field("torch", description="torch: the checkpoint; onnx: the exported graph")
    max_new_tokens: int = Field(200, ge=1, le=bounds.MAX_TOKENS, description="length of the answer, in tokens")
    chat: bool = Field(True, description="put the text into the model's chat template, where it has one")
