"""Config of ``ara bench``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ara import bounds
from ara.config.base import PlacementConfig
from ara.config.flags import Flag

_Tokens = Annotated[int, Field(ge=1, le=bounds.MAX_TOKENS)]
_Rows = Annotated[int, Field(ge=1, le=bounds.MAX_BATCH)]


class BenchConfig(PlacementConfig):
    """``ara bench``: speed, memory and size of the dense and the chosen model."""

    prefill: Annotated[tuple[_Tokens, ...], Flag(metavar="LENGTHS", commas="length", may_be_empty=True)] = Field(
        (128, 512),
        max_length=bounds.MAX_CASES,
        description="tokens that are read at once; several with commas, '' for none",
    )
    decode: Annotated[tuple[_Tokens, ...], Flag(metavar="LENGTHS", commas="length", may_be_empty=True)] = Field(
        (512,),
        max_length=bounds.MAX_CASES,
        description="context lengths (tokens in the KV cache) at which one token is decoded; several with commas, "
        "'' for none",
    )
    batch: Annotated[tuple[_Rows, ...], Flag(metavar="SIZES", commas="size")] = Field(
        (1, 4), min_length=1, max_length=bounds.MAX_CASES, description="rows at once; several with commas"
    )
    # The range of five values covers a median with 94 % at most, that of six with 97 %.
    rounds: int = Field(
        9, ge=6, le=bounds.MAX_ROUNDS, description="measurements of every model in every case; one more warms up"
    )
    threads: int | None = Field(
        None, ge=1, le=bounds.MAX_THREADS, description="threads of the CPU [default: as many as torch takes]"
    )
    backend: str = Field(
        "torch", description="onnx: the exported graphs in ONNX Runtime, placed as the export says (see ara export)"
    )
