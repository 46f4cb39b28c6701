"""Config of ``ara recover``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ara import bounds
from ara.config.base import PlacementConfig
from ara.config.flags import Flag

# In place of a level.
NO_RECOVERY = "none"
# Windows that a level learns from, at least.
LEAST_SAMPLES = 2


class RecoverConfig(PlacementConfig):
    """``ara recover``: repair the values of a compressed checkpoint; its ranks stay, and whole numbers of few bits."""

    level: str = Field(
        "closed",
        description="closed: linear algebra; block: also train block by block; distill: also train the whole model",
    )
    only: bool = Field(False, description="run this level alone, without the ones before it")
    text: Annotated[str | None, Flag(metavar="TEXT")] = Field(
        None,
        description="text to repair with, such as c4 or c4:0.7,wikitext2:0.3, as for ara decompose "
        "[default: that of the decomposition]",
    )
    samples: int = Field(
        256,
        ge=LEAST_SAMPLES,
        le=bounds.MAX_WINDOWS,
        description="windows that closed and block learn from, each its own",
    )
    held_out: int = Field(
        32, ge=1, le=bounds.MAX_WINDOWS, description="further windows to choose by, and as many to judge by"
    )
    seq_len: int | None = Field(
        None, ge=2, le=bounds.MAX_TOKENS, description="tokens per window [default: that of the decomposition]"
    )
    loss_on: Literal["all", "answers"] = Field(
        "all", description="tokens of conversations that count in training losses: all, or those of answers"
    )
    batch_size: int = Field(4, ge=1, le=bounds.MAX_BATCH, description="windows per forward and backward pass")
    seed: int = Field(0, ge=0, lt=bounds.SEED_LIMIT, description="random seed of windows and batches")
    closed_share: float = Field(
        0.25,
        gt=0,
        le=1,
        description="closed: largest share of a measured error that is corrected; with 1 single layers fit best, but "
        "not the model",
    )
    block_epochs: int = Field(2, ge=1, le=bounds.MAX_STEPS, description="block: passes over the windows")
    block_rate: float = Field(
        5e-4, ge=bounds.MIN_RATE, le=bounds.MAX_RATE, description="block: highest learning rate of AdamW"
    )
    block_metric: Literal["plain", "channels", "full"] = Field(
        "channels",
        description="block: weight of an output error: plain: equal; channels: Fisher information of each channel; "
        "full: Fisher information with its correlations",
    )
    look_ahead: bool = Field(False, description="block: also match the output of the next dense block")
    steps: int = Field(64, ge=1, le=bounds.MAX_STEPS, description="distill: training steps")
    batch: int = Field(
        16, ge=1, le=bounds.MAX_WINDOWS, description="distill: windows per step; each step reads new ones"
    )
    rate: float | None = Field(
        None,
        ge=bounds.MIN_RATE,
        le=bounds.MAX_RATE,
        description="distill: highest learning rate, the root mean square change of a number per step [default: 5e-5, "
        "less if the model is already near the dense one]",
    )
    optimiser: Literal["muon", "adamw"] = Field(
        "muon", description="distill: of matrices; vectors, scales and LoRA adapters have AdamW"
    )
    train: Literal["all", "factors", "lora"] = Field(
        "all",
        description="distill: what is trained: all weights of the blocks, the factors alone, or LoRA adapters "
        "(requires the package peft); rounded checkpoints allow all only",
    )
    lora_rank: int = Field(16, ge=1, le=bounds.MAX_RANK, description="distill: rank of the LoRA adapters")
    keep_adapter: bool = Field(
        False, description="distill: store LoRA as a separate adapter instead of merging it into the factors"
    )
    check_every: int = Field(
        8, ge=1, le=bounds.MAX_STEPS, description="distill: steps between checks on held-out text; the best is kept"
    )
    patience: int = Field(
        4, ge=1, le=bounds.MAX_STEPS, description="distill: stop after this many checks without improvement"
    )
    save_every: int = Field(8, ge=1, le=bounds.MAX_STEPS, description="distill: steps between saved states")
    tensorboard: bool = Field(False, description="also write TensorBoard events (requires the tensorboard package)")
