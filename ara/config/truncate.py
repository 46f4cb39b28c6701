"""Config of ``ara truncate``."""

from __future__ import annotations

from pydantic import Field, field_validator

from ara import bounds
from ara.config.base import Dtype, StageConfig


class TruncateConfig(StageConfig):
    """``ara truncate``: write the compressed checkpoint."""

    dtype: Dtype = Field("auto", description="precision of the checkpoint; auto takes the precision of the factors")
    densify: bool = Field(
        False, description="multiply the factors into dense weights, for tools without low-rank layers"
    )
    # Few digits, so that the number is exact and finite.
    max_shard_size: str = Field(
        "5GB",
        pattern=r"^[0-9]{1,6}(\.[0-9]{1,3})?[KMGT]B$",
        description="largest size of one safetensors file, such as 500MB or 5GB",
    )

    @field_validator("max_shard_size")
    @classmethod
    def _some_bytes(cls, size: str) -> str:
        count = float(size[:-2]) * 1000 ** (1 + "KMGT".index(size[-2]))
        if not bounds.MIN_SHARD_BYTES <= count <= bounds.MAX_SHARD_BYTES:
            raise ValueError("expected a size from 1KB to 1000TB")
        return size
