"""Config of ``ara export``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ara import bounds
from ara.config import StageConfig
from ara.config.flags import Flag


class ExportConfig(StageConfig):
    """``ara export``: write the chosen checkpoint for another runtime.

    Some fields apply to one target only. A target refuses values that it does not support.
    """

    target: str = Field("onnx", description="runtime to write for")
    precision: Annotated[Literal["fp32", "fp16", "int8", "int4"] | None, Flag(choices=False)] = Field(
        None,
        description="precision of the weights, in int8 also of inputs: fp32, fp16, int8 [default: on CPU int8 for "
        "checkpoints of ara quantise, else fp32; on CUDA fp16]",
    )
    execution_provider: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the graph will run: cpu, cuda, or auto (CUDA if available)"
    )
    merge_shared_inputs: bool = Field(
        False, description="compute the first products of q, k, v as one, and those of gate, up as another"
    )
    rewrite: Annotated[str | None, Flag(metavar="DENSE.onnx", user_path=True)] = Field(
        None, description="put the factors into this ONNX graph of the dense model instead of building one"
    )
    last_logits: bool = Field(
        False, description="output only the logits of the last position: for generation, not for evaluation"
    )
    parity_tokens: int = Field(
        96,
        ge=16,
        le=bounds.MAX_TOKENS,
        description="tokens per text in the comparison; a model's sliding window is tested only if shorter",
    )
    parity: bool = Field(
        True,
        description="compare the graph with the checkpoint in torch on real text; fail if the difference is too large",
    )
