"""Configs of the commands that run a compressed model: ``ara generate`` and ``ara chat``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from ara import bounds
from ara.config.base import PlacementConfig
from ara.config.flags import Flag
from ara.prompts import check_prompt


class AnswerConfig(PlacementConfig):
    """How a model answers: backend, length, sampling, system prompt."""

    backend: str = Field("torch", description="torch: the checkpoint; onnx: the exported graph")
    max_new_tokens: int = Field(200, ge=1, le=bounds.MAX_TOKENS, description="largest length of an answer, in tokens")
    temperature: float = Field(
        0.0,
        ge=0,
        le=bounds.MAX_SLOPE,
        description="0: always the most likely token; above 0: draw tokens, the more freely the higher",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="draw only among the likeliest tokens that together have this share of the probability",
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=bounds.SEED_LIMIT,
        description="random seed of the drawn tokens [default: another one every time, which is printed]",
    )
    system: Annotated[str | None, Flag(metavar="TEXT")] = Field(
        None, description="system prompt: instructions ahead of the conversation, for models with a chat template"
    )

    @field_validator("top_p")
    @classmethod
    def _drawn(cls, value: float, info: ValidationInfo) -> float:
        if value < 1 and info.data.get("temperature") == 0:
            raise ValueError("without a temperature above 0 no token is drawn")
        return value

    @field_validator("system")
    @classmethod
    def _system(cls, value: str | None) -> str | None:
        return None if value is None else check_prompt(value, "the system prompt")


class GenerateConfig(AnswerConfig):
    """``ara generate``: answer or continue a text."""

    chat: bool = Field(True, description="apply the model's chat template, if it has one")

    @field_validator("chat")
    @classmethod
    def _template(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and info.data.get("system") is not None:
            raise ValueError("a system prompt needs the chat template")
        return value


class ChatConfig(AnswerConfig):
    """``ara chat``: a conversation with history."""

    max_new_tokens: int = Field(512, ge=1, le=bounds.MAX_TOKENS, description="largest length of an answer, in tokens")
