"""Config of ``ara truncate``."""

from __future__ import annotations

from pydantic import Field, field_validator

from ara import bounds
from ara.config.base import Dtype, StageConfig
from ara.config.sizes import SIZE_PATTERN, bytes_in


class TruncateConfig(StageConfig):
    """``ara truncate``: write the compressed checkpoint."""

    dtype: Dtype = Field("auto", description="precision of the checkpoint; auto takes the precision of the factors")
    densify: bool = Field(
        False, description="multiply the factors into dense weights, for tools without low-rank layers"
    )
    check: bool = Field(
        False,
        description="first compare the dense model with one that has factors of full rank in one block of each kind, "
        "on two prompts; needs the model in memory",
    )
    max_shard_size: str = Field(
        "5GB",
        pattern=SIZE_PATTERN,
        description="largest size of one safetensors file, such as 500MB or 5GB",
    )

    @field_validator("max_shard_size")
    @classmethod
    def _some_bytes(cls, size: str) -> str:
        if not bounds.MIN_SHARD_BYTES <= bytes_in(size) <= bounds.MAX_SHARD_BYTES:
            raise ValueError("expected a size from 1KB to 1000TB")
        return size
