"""Config of ``ara allocate``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ara.config.base import Method, MethodValues
from ara.config.flags import Flag
from ara.config.tuning import BudgetConfig, TuningConfig


class AllocateConfig(TuningConfig, BudgetConfig):
    """``ara allocate``: choose a rank, or dense, for every layer under one budget."""

    keep: Annotated[float | None, Flag(removable=True)] = Field(
        0.8, gt=0, le=1, description="fraction of the factorised layers' parameters that stays, in (0, 1]"
    )
    method: Method = Field(
        "auto",
        description="allocator (see ara methods); auto: ara where masks were trained on the factors, else sensitivity",
    )
    options: MethodValues = Field(default_factory=dict, description="options of the method, NAME=VALUE")
    guard: bool = Field(
        True,
        description="let no method that reads text hand out ranks worse on held-out text than uniform or its start",
    )
    ranks_sha256: Annotated[str | None, Flag(hidden=True)] = Field(
        None, description="checksum of the ranks file that was read instead of a method"
    )
