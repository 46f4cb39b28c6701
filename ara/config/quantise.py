"""Config of ``ara quantise``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ara import bounds
from ara.config.allocate import TuningConfig
from ara.config.sizes import EmbeddingBits, GridConfig


class QuantiseConfig(TuningConfig, GridConfig):
    """``ara quantise``: round the matrices of a compressed checkpoint to few bits."""

    samples: int = Field(128, ge=1, le=bounds.MAX_WINDOWS, description="calibration windows to round with")
    held_out: int = Field(32, ge=1, le=bounds.MAX_WINDOWS, description="further windows that judge the result")

    bits: Literal[4, 8] | None = Field(
        None,
        description="bits per weight of all matrices of the decoder blocks [default: those that ara allocate --size "
        "has chosen]",
    )
    embedding_bits: EmbeddingBits | None = Field(
        None,
        description="bits per weight of the embedding and the head, 16: as they are [default: those that ara allocate "
        "--size has set, else 16]",
    )
    method: Literal["calibrated", "nearest"] = Field(
        "calibrated",
        description="calibrated: each rounding error is made up for by the weights that are not rounded yet; nearest: "
        "round every weight for itself",
    )
    inputs: Literal["own", "dense"] = Field(
        "own",
        description="calibrated: the inputs that layers are rounded on: own: those of the model whose earlier matrices "
        "are rounded, read from text; dense: those of the dense model, as kept by ara decompose, without reading text",
    )
    tolerance: float = Field(
        0.5,
        gt=0,
        le=bounds.MAX_WEIGHT,
        description="largest allowed rise of the held-out loss, in nats per token",
    )
