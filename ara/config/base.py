"""What all configs share: base classes, common fields, and how a config is built from values."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ara import bounds
from ara.config.flags import Flag
from ara.errors import ProblemsError

Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], Flag(choices=False)]
Method = Annotated[str, Flag(short="-m")]
MethodValues = Annotated[dict[str, str], Flag(name="option", short="-O", metavar="NAME=VALUE")]
Exclude = Annotated[tuple[str, ...], Flag(metavar="PATTERN")]
ShareExperts = Annotated[
    bool,
    Field(
        description="in a mixture of experts, give the experts of a block one factor A for what maps up (gate and up): "
        "one layer, with one rank",
    ),
]
MaxKeep = Annotated[
    float | None,
    Field(
        gt=0,
        le=1,
        description="store no ranks that need more than this fraction of a layer's parameters in two factors; 1: the "
        "factors take no more disk than the layers [default: all ranks]",
    ),
]
SeqLen = Annotated[
    int | None,
    Field(
        ge=2,
        le=bounds.MAX_TOKENS,
        description="tokens per evaluation window [default: 2048, or the model's limit if that is less]",
    ),
]
MaxWindows = Annotated[
    int | None,
    Field(ge=1, le=bounds.MAX_COUNT, description="evaluate only the first N windows of each text [default: all]"),
]


class Settings(BaseModel):
    """Base of all configs: frozen, unknown names refused, only finite numbers and storable text."""

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
    """Base of the options of one method."""


class PlacementConfig(StageConfig):
    """Where and in which precision a model runs."""

    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps; auto takes CUDA if available")
    dtype: Dtype = Field(
        "auto",
        description="precision of the model: auto, float32, bfloat16 or float16; auto takes bfloat16 if the hardware "
        "supports it natively",
    )


def build(config: type[Any], /, **values: Any) -> Any:
    """Build ``config`` from ``values``.

    Raises:
        ProblemsError: lists all values that are out of range or have the wrong type, and all unknown names.
    """
    try:
        return config(**values)
    except ValidationError as error:
        raise problems(config.__name__, error) from None


def problems(title: str, error: ValidationError) -> ProblemsError:
    """Turn pydantic's findings into one error: field, problem, value."""
    lines = []
    found = error.errors(include_url=False, include_context=False)
    refused_items = {item["loc"][0] for item in found if len(item["loc"]) > 1}
    for item in found:
        if item["type"] == "too_short" and item["loc"][0] in refused_items:
            continue  # only because its items were refused, which has its own line
        name = ".".join(bounds.shown(str(part), quoted=False) for part in item["loc"]) or title
        said = item["msg"].removeprefix("Value error, ")
        lines.append(f"{name.replace('_', '-')}: {said[0].lower()}{said[1:]}, got {bounds.shown(item['input'])}")
    return ProblemsError("these settings cannot be used", lines)


def method_options(options_type: type[Any], values: dict[str, str]) -> Any:
    """Build a method's own options from ``NAME=VALUE`` strings; errors as of :func:`build`."""
    return build(options_type, **values)
