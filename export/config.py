"""Config of ``ara export``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ara.config import StageConfig


class ExportConfig(StageConfig):
    """``ara export``: write the chosen checkpoint for another runtime."""

    target: Literal["onnx"] = Field("onnx", description="runtime to write for")
    precision: Literal["fp32", "fp16", "int8", "int4"] | None = Field(
        None, description="precision of the weights [default: fp32 on CPU, fp16 on CUDA]"
    )
