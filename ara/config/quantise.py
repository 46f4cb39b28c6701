"""Config of ``ara quantise``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ara import bounds
from ara.config.allocate import TuningConfig


class QuantiseConfig(TuningConfig):
    """``ara quantise``: round the matrices of a compressed checkpoint to few bits."""

    bits: Literal[4, 8] = Field(8, description="bits per weight")
    block: Literal[16, 32, 64, 128, 256] = Field(32, description="weights of a row that share a scale")
    zero_points: bool = Field(True, description="store a zero point per block as well")
    method: Literal["calibrated", "nearest"] = Field(
        "calibrated",
        description="calibrated: each rounding error is made up for by the weights that are not rounded yet; nearest: "
        "round every weight for itself",
    )
    tolerance: float = Field(
        0.5,
        gt=0,
        le=bounds.MAX_WEIGHT,
        description="largest allowed rise of the held-out loss, in nats per token",
    )
