"""What all configs share: immutable, strict about names; placement and method are the same everywhere."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ara import bounds
from ara.config.flags import Flag

Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], Flag(choices=False)]
Method = Annotated[str, Flag(short="-m")]
MethodValues = Annotated[dict[str, str], Flag(name="option", short="-O", metavar="NAME=VALUE")]
Exclude = Annotated[tuple[str, ...], Flag(metavar="PATTERN")]


class Settings(BaseModel):
    """Base of all configs: immutable, strict about names; every number has bounds, every text can be stored."""

    # Validators are built on first use: `ara --help` reads only names and descriptions.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _storable(cls, value: Any) -> Any:
        bounds.check_text(value)
        return value


class StageConfig(Settings):
    """Base of the configs of stages."""


class MethodOptions(Settings):
    """Options of one method; unknown names are refused, every field says its meaning and range."""


class PlacementConfig(StageConfig):
    """Where and in which precision a model runs."""

    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps; auto takes CUDA when there is one")
    dtype: Dtype = Field(
        "auto", description="precision of the model; auto takes bfloat16 where the hardware multiplies it natively"
    )
