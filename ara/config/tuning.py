"""What the stages share that choose ranks: windows to learn from, and limits of the ranks."""

from __future__ import annotations

from pydantic import Field

from ara import bounds
from ara.config.base import Exclude, PlacementConfig, StageConfig
from ara.layout_names import DEFAULT_LAYOUT, LayoutName


class TuningConfig(PlacementConfig):
    """What every stage shares that looks at the model while it chooses ranks.

    The text is that of the decomposition, but other windows of it, so that factors are not judged on what they were
    fitted to.
    """

    samples: int = Field(128, ge=1, le=bounds.MAX_WINDOWS, description="calibration windows to learn ranks from")
    held_out: int = Field(
        32, ge=1, le=bounds.MAX_WINDOWS, description="further calibration windows that candidates are compared on"
    )
    batch_size: int = Field(4, ge=1, le=bounds.MAX_BATCH, description="windows per forward and backward pass")
    seed: int = Field(0, ge=0, lt=bounds.SEED_LIMIT, description="seed of everything random")


class BudgetConfig(StageConfig):
    """What limits the ranks of every layer, and what a rank costs, beside the budget itself."""

    layout: LayoutName = Field(
        DEFAULT_LAYOUT,
        description="storage of a layer of rank k: factors (A and B, k(m+n) parameters) or pivoted "
        "(k rows of BA, the others as combinations of them, k(m+n-k))",
    )
    rank_multiple: int = Field(
        1, ge=1, le=bounds.MAX_RANK, description="ranks are multiples of this (8, 16, 32 or 64 suit GPUs)"
    )
    min_rank: int = Field(1, ge=1, le=bounds.MAX_RANK, description="least rank of a layer")
    min_keep: float = Field(0.0, ge=0, le=1, description="least share of its parameters that each layer keeps")
    exclude: Exclude = Field(
        (), description="shell pattern of layers that stay dense within the budget, such as '*.down_proj'"
    )
