"""Config of ``ara decompose``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ara import bounds
from ara.config.base import Dtype, Exclude, MaxKeep, Method, MethodValues, PlacementConfig, ShareExperts
from ara.config.flags import Flag


class DecomposeConfig(PlacementConfig):
    """``ara decompose``: factor every linear layer once, for every later budget."""

    model: Annotated[str, Flag(argument=True, metavar="MODEL")] = Field(
        description="hub id, local folder, GGUF file or alias (see ara models)"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model [default: main]")
    method: Method = Field("two-sided", description="decomposition (see ara methods)")
    options: MethodValues = Field(default_factory=dict, description="option of the method; may be repeated")
    text: Annotated[str | None, Flag(metavar="TEXT")] = Field(
        None,
        description="calibration text: c4, wikitext2, python-docs, chat, ultrachat, file:PATH[#FIELD] (txt, jsonl, "
        "parquet) or chat:PATH[#FIELD]; or a mixture with shares: c4:0.8,chat:0.2 [default: c4, with a fifth of chat "
        "if the model has a chat template]",
    )
    samples: int = Field(256, ge=1, le=bounds.MAX_WINDOWS, description="calibration windows")
    seq_len: int = Field(512, ge=2, le=bounds.MAX_TOKENS, description="tokens per calibration window")
    batch_size: int = Field(4, ge=1, le=bounds.MAX_BATCH, description="calibration windows per forward pass")
    seed: int = Field(0, ge=0, lt=bounds.SEED_LIMIT, description="random seed for the choice of calibration windows")
    exclude: Exclude = Field(
        (),
        description="shell pattern of layers to leave dense and out of budgets, such as '*.down_proj'",
    )
    calibrate_all_experts: bool = Field(
        False,
        description="in a mixture of experts, let every expert see the inputs of all tokens, instead of those that the "
        "router sends to it",
    )
    share_experts: ShareExperts = False
    factors_dtype: Dtype = Field(
        "auto",
        description="precision of the stored factors, and of the checkpoints made of them; auto: as --dtype, but "
        "bfloat16 if --dtype is auto, the hardware computes in float32, and the model is in bfloat16 or fewer bits",
    )
    max_keep: MaxKeep = None
    moment_memory: Annotated[float | None, Flag(metavar="GIB")] = Field(
        None,
        ge=bounds.MIN_GIB,
        le=bounds.MAX_GIB,
        description="memory for second moments, in GiB; more memory means fewer passes [default: 1/4 of free memory]",
    )
    keep_moments: Literal["auto", "yes", "no"] = Field(
        "auto",
        description="whether to keep the second moments of the layers' inputs beside the factors, so that rounding to "
        "few bits needs no text; auto: if they take at most 1/4 of the free disk",
    )
