"""Config of ``ara eval``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from ara import bounds
from ara.config.base import MaxWindows, PlacementConfig, SeqLen
from ara.config.flags import Flag
from ara.prompts import check_prompt


class EvalConfig(PlacementConfig):
    """``ara eval``: dense, uniform and the chosen model side by side."""

    tasks: Annotated[tuple[str, ...], Flag(commas="task", example="wikitext2")] = Field(
        ("wikitext2",),
        min_length=1,
        description="what to measure, separated by commas: texts for perplexity (wikitext2, c4, python-docs, "
        "file:PATH[#FIELD]), conversations (chat, ultrachat, chat:PATH), tasks of lm-eval, or zero-shot (seven tasks)",
    )
    seq_len: SeqLen = None
    max_windows: MaxWindows = None
    limit: int | None = Field(
        None,
        ge=1,
        le=bounds.MAX_COUNT,
        description="ask only N randomly drawn questions of each task [default: all]",
    )
    conversations: int = Field(
        64, ge=1, le=bounds.MAX_COUNT, description="measure chat on N randomly drawn conversations"
    )
    seed: int = Field(0, ge=0, lt=bounds.SEED_LIMIT, description="random seed for --limit and --conversations sampling")
    batch_size: int = Field(
        1, ge=1, le=bounds.MAX_BATCH, description="evaluation windows, or texts of a task, per forward pass"
    )
    include_path: Annotated[tuple[str, ...], Flag(metavar="DIR")] = Field(
        (),
        description="folder with your own tasks, as lm_eval --include_path; may be repeated; Python code named in the "
        "tasks is executed",
    )
    backend: str = Field(
        "torch",
        description="torch, or onnx: also measure the exported graph in ONNX Runtime (see ara export), or vllm: all "
        "models in vLLM, one after the other",
    )
    continuations: int = Field(
        3,
        ge=0,
        le=bounds.MAX_CONTINUATIONS,
        description="prompts that every model continues greedily: beginnings of the first text's documents",
    )
    prompt: str | None = Field(
        None, description="prompt that every model continues, instead of the beginnings of documents"
    )
    max_new_tokens: int = Field(
        40,
        ge=1,
        le=bounds.MAX_TOKENS,
        description="largest length of a continuation or of an answer in chat, in tokens",
    )

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: str | None) -> str | None:
        return None if value is None else check_prompt(value)
