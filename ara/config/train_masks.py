"""Config of ``ara train-masks``, and the options that it shares with the allocator ``ara``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from ara import bounds
from ara.config.allocate import BudgetConfig, TuningConfig
from ara.config.base import MethodOptions
from ara.config.flags import Flag


class MaskTrainingOptions(MethodOptions):
    """How ARA's masks are trained: options of ``--method ara`` and of ``ara train-masks``."""

    objective: Literal["priced", "paper"] = Field(
        "priced",
        description="priced: every step meets the budget exactly; paper: budget penalty and guidance, rescaled at the "
        "end",
    )
    loss: Literal["kl", "ce"] = Field(
        "kl", description="kl: KL divergence from the dense model; ce: cross-entropy of the text"
    )
    start: Literal["sensitivity", "uniform"] = Field("sensitivity", description="allocation to start from")
    optimiser: Literal["newton", "adam"] = Field(
        "newton",
        description="newton: re-estimate the loss of every rank; adam: move mask scores (objective priced)",
    )
    steps: int = Field(12, ge=0, le=bounds.MAX_STEPS, description="training steps per budget")
    batch: int = Field(16, ge=1, le=bounds.MAX_WINDOWS, description="calibration windows per training step")
    rate: float = Field(
        0.3, gt=0, le=1, description="weight of the newest step in the running estimates (optimiser newton)"
    )
    trust: float = Field(
        0.02,
        gt=0,
        le=1,
        description="largest fraction of all parameters that the first step moves; falls to a quarter (optimiser "
        "newton)",
    )
    damping: float = Field(
        1.0,
        ge=0,
        le=bounds.MAX_WEIGHT,
        description="factor on the curvature; larger moves fewer ranks (optimiser newton)",
    )
    learning_rate: float = Field(
        0.05,
        ge=bounds.MIN_RATE,
        le=bounds.MAX_RATE,
        description="initial learning rate of Adam; falls to a tenth (not with optimiser newton)",
    )
    temperature: float = Field(
        1.0,
        ge=bounds.MIN_SLOPE,
        le=bounds.MAX_SLOPE,
        description="temperature of the softmax over candidate ranks (optimiser adam); lower changes fewer at once",
    )
    atoms: int = Field(
        64, ge=2, le=bounds.MAX_ATOMS, description="atoms: candidate ranks per layer (not with optimiser newton)"
    )
    average: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="decay of the moving average of the scores; 0: use the last step (not with optimiser newton)",
    )
    budget_weight: float = Field(
        100.0, ge=0, le=bounds.MAX_WEIGHT, description="weight of the budget penalty (objective paper)"
    )
    guidance_weight: float = Field(
        10.0, ge=0, le=bounds.MAX_WEIGHT, description="weight of the guidance loss (objective paper)"
    )
    check_every: int = Field(
        2,
        ge=1,
        le=bounds.MAX_STEPS,
        description="training steps between checks on held-out text; the best state is kept",
    )


class TrainMasksConfig(TuningConfig, BudgetConfig, MaskTrainingOptions):
    """``ara train-masks``: learn what every rank of every layer is worth."""

    keep: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Flag(metavar="FLOAT")] = Field(
        (0.8,),
        min_length=1,
        description="budget: fraction of the factorised layers' parameters to keep, in (0, 1]; may be repeated: the "
        "largest is trained first, and the others can start from its result",
    )
    save_every: int = Field(
        1, ge=1, le=bounds.MAX_STEPS, description="training steps between saved states for resuming"
    )
    tensorboard: bool = Field(False, description="also write TensorBoard events (requires the tensorboard package)")

    @field_validator("keep")
    @classmethod
    def _largest_first(cls, keep: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(keep), reverse=True))
