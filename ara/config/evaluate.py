"""Config of ``ara eval``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from ara import bounds
from ara.config.base import PlacementConfig
from ara.config.flags import Flag
from ara.prompts import check_prompt


class EvalConfig(PlacementConfig):
    """``ara eval``: dense, uniform and the chosen model side by side."""

    tasks: Annotated[tuple[str, ...], Flag(commas="task", example="wikitext2")] = Field(
        ("wikitext2",),
        min_length=1,
        description="texts (wikitext2, c4, python-docs, file:PATH[#FIELD]), tasks of lm-eval, zero-shot for seven; "
        "with commas",
    )
    seq_len: int | None = Field(
        None,
        ge=2,
        le=bounds.MAX_TOKENS,
        description="tokens per window [default: 2048, or the model's limit if that is less]",
    )
    max_windows: int | None = Field(
        None, ge=1, le=bounds.MAX_COUNT, description="evaluate only the first N windows of each text"
    )
    limit: int | None = Field(
        None, ge=1, le=bounds.MAX_COUNT, description="ask only N questions of each task, drawn at random"
    )
    seed: int = Field(0, ge=0, lt=bounds.SEED_LIMIT, description="random seed of the questions that --limit draws")
    batch_size: int = Field(1, ge=1, le=bounds.MAX_BATCH, description="windows, or texts of a task, per forward pass")
    include_path: Annotated[tuple[str, ...], Flag(metavar="DIR")] = Field(
        (),
        description="folder with tasks of your own (as lm_eval --include_path); may be repeated; runs the Python code "
        "that these tasks name",
    )
    backend: str = Field("torch", description="onnx: measure the exported graph in ONNX Runtime, too (see ara export)")
    continuations: int = Field(
        3,
        ge=0,
        le=bounds.MAX_CONTINUATIONS,
        description="beginnings of the first text's documents that every model continues greedily",
    )
    prompt: str | None = Field(None, description="continue this text instead")
    max_new_tokens: int = Field(40, ge=1, le=bounds.MAX_TOKENS, description="length of a continuation, in tokens")

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: str | None) -> str | None:
        return None if value is None else check_prompt(value)
