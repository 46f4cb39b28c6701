"""Config of ``ara plan``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ara import bounds
from ara.config.base import Exclude, MaxKeep, Method, PlacementConfig, ShareExperts
from ara.config.flags import Flag
from ara.config.sizes import SIZE_PATTERN, EmbeddingBits
from ara.layout_names import DEFAULT_LAYOUT, LayoutName


class PlanConfig(PlacementConfig):
    """``ara plan``: what compressing a model will take. Settings that it has no option for have their defaults."""

    model: Annotated[str, Flag(argument=True, metavar="MODEL")] = Field(
        description="hub id, local folder, GGUF file or alias (see ara models); a folder needs no weights"
    )
    keep: Annotated[float | None, Flag(removable=True)] = Field(
        0.8, gt=0, le=1, description="fraction of the factorised layers' parameters to keep, in (0, 1]"
    )
    size: Annotated[str | None, Flag(metavar="SIZE")] = Field(
        None,
        pattern=SIZE_PATTERN,
        description="size of the weight files after ara quantise, such as 4GB, instead of --keep",
    )
    embedding_bits: EmbeddingBits = Field(
        16, description="with a size: bits per weight of the embedding and the head, 16: as they are"
    )
    method: Method = Field("two-sided", description="decomposition (see ara methods)")
    layout: LayoutName = Field(
        DEFAULT_LAYOUT,
        description="how an (m, n) layer of rank k is stored: factors (A and B, k(m+n) parameters) or pivoted "
        "(k rows of BA and coefficients for the others, k(m+n-k) parameters)",
    )
    samples: int = Field(
        256, ge=1, le=bounds.MAX_WINDOWS, description="calibration windows of ara decompose and of ara recover"
    )
    rank_samples: int = Field(128, ge=1, le=bounds.MAX_WINDOWS, description="calibration windows for choosing ranks")
    seq_len: int = Field(512, ge=2, le=bounds.MAX_TOKENS, description="tokens per calibration window")
    batch_size: int = Field(4, ge=1, le=bounds.MAX_BATCH, description="calibration windows per pass")
    eval_tokens: int = Field(
        300_000,
        ge=1,
        le=bounds.MAX_COUNT,
        description="tokens that ara eval reads; the test text of wikitext2 has about 300,000",
    )
    exclude: Exclude = Field(
        (), description="shell pattern of layers to leave dense and out of budgets, such as '*.down_proj'"
    )
    share_experts: ShareExperts = False
    max_keep: MaxKeep = None
    revision: str | None = Field(None, description="branch, tag or commit of a hub model [default: main]")
    probe: bool = Field(True, description="measure this machine for about five seconds, to estimate times")
