"""Settings of the objective ``latency``: where and how the time of a rank is measured."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from ara import bounds
from ara.config.base import StageConfig
from ara.config.flags import Flag

# What the fraction of a budget refers to.
Objective = Literal["parameters", "latency"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


class LatencyConfig(StageConfig):
    """What a budget limits, and how the time of layers is measured."""

    objective: Objective = Field(
        "parameters",
        description="what --keep is a fraction of: the parameters of the factorised layers, or the time that they take "
        "on this machine, which is measured (latency)",
    )
    latency_tokens: int = Field(
        128,
        ge=1,
        le=bounds.MAX_TOKENS,
        description="with latency: number of tokens in the input of a timed layer; 1 is a decoding step",
    )
    latency_backend: str = Field(
        "torch",
        description="with latency: where layers are timed: torch, on --device in --dtype, or onnx, in ONNX Runtime on "
        "the CPU",
    )
    latency_precision: Literal["fp32", "int8"] | None = Field(
        None, description="with --latency-backend onnx: precision of the layers [default: fp32]"
    )
    latency_threads: int = Field(
        1,
        ge=1,
        le=bounds.MAX_THREADS,
        description="with latency: CPU threads; with one, processor time is measured, which other work on the machine "
        "changes little, else elapsed time",
    )
    latency_machine: Annotated[str | None, Flag(hidden=True)] = Field(
        None, description="machine and library on which layers were timed"
    )
