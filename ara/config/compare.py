"""Config of ``ara compare``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ara import bounds
from ara.config.flags import Flag
from ara.config.tuning import BudgetConfig, TuningConfig


class CompareConfig(TuningConfig, BudgetConfig):
    """``ara compare``: every allocator at one budget, on the same factors and text."""

    keep: Annotated[float, Flag(removable=True)] = Field(
        0.8, gt=0, le=1, description="fraction of the factorised layers' parameters that stays"
    )
    methods: Annotated[tuple[str, ...], Flag(metavar="NAMES", commas="allocator", example="uniform,ara")] = Field(
        (), description="allocators to compare, several with commas [default: all]"
    )
    tasks: Annotated[tuple[str, ...], Flag(metavar="TASKS", commas="task", example="wikitext2")] = Field(
        ("wikitext2", "c4"),
        min_length=1,
        description="wikitext2, c4, python-docs or file:PATH[#FIELD]; several with commas",
    )
    eval_seq_len: int | None = Field(
        None,
        ge=2,
        le=bounds.MAX_TOKENS,
        description="tokens per evaluation window [default: 2048, or the model's limit if that is less]",
    )
    max_windows: int | None = Field(
        None, ge=1, le=bounds.MAX_COUNT, description="evaluate only the first N windows of each text"
    )
    eval_batch_size: int = Field(1, ge=1, le=bounds.MAX_BATCH, description="evaluation windows per forward pass")
