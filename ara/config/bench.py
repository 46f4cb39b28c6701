"""Config of ``ara bench``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ara import bounds
from ara.config.base import PlacementConfig
from ara.config.flags import Flag

_Lengths = Annotated[
    tuple[Annotated[int, Field(ge=1, le=bounds.MAX_TOKENS)], ...],
    Flag(metavar="LENGTHS", commas="length", may_be_empty=True),
]
_Rows = Annotated[int, Field(ge=1, le=bounds.MAX_BATCH)]


class BenchConfig(PlacementConfig):
    """``ara bench``: speed, memory and size of the dense and the chosen model."""

    prefill: _Lengths = Field(
        (128, 512),
        max_length=bounds.MAX_CASES,
        description="prompt lengths in tokens, separated by commas; '' measures no prefill",
    )
    decode: _Lengths = Field(
        (512,),
        max_length=bounds.MAX_CASES,
        description="context lengths (tokens in the KV cache) at which one token is decoded, separated by commas; "
        "'' measures no decoding",
    )
    batch: Annotated[tuple[_Rows, ...], Flag(metavar="SIZES", commas="size")] = Field(
        (1, 4), min_length=1, max_length=bounds.MAX_CASES, description="batch sizes, separated by commas"
    )
    # The range of five values covers a median with 94 % at most, that of six with 97 %.
    rounds: int = Field(
        9, ge=6, le=bounds.MAX_ROUNDS, description="measurements per model and case, after one warm-up round"
    )
    threads: int | None = Field(
        None, ge=1, le=bounds.MAX_THREADS, description="CPU threads [default: torch's own choice]"
    )
    backend: str = Field(
        "torch",
        description="torch, or onnx: the exported graphs in ONNX Runtime, on the device of the export (see ara "
        "export), or vllm: requests to both models in vLLM",
    )
    concurrency: Annotated[tuple[_Rows, ...], Flag(metavar="NUMBERS", commas="number")] = Field(
        (1, 8, 32),
        min_length=1,
        max_length=bounds.MAX_CASES,
        description="vllm: numbers of requests at once, separated by commas",
    )
    prompt_tokens: int = Field(512, ge=1, le=bounds.MAX_TOKENS, description="vllm: length of the prompts, in tokens")
    new_tokens: int = Field(128, ge=2, le=bounds.MAX_TOKENS, description="vllm: length of the answers, in tokens")
