"""Config of ``ara train-masks``, and the options that it shares with the allocator ``ara``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from ara import bounds
from ara.config.base import MethodOptions
from ara.config.flags import Flag
from ara.config.tuning import BudgetConfig, TuningConfig


class MaskTrainingOptions(MethodOptions):
    """How ARA's masks are trained; options of ``--method ara`` and of ``ara train-masks``."""

    objective: Literal["priced", "paper"] = Field(
        "priced", description="priced: hard budget in every step; paper: budget penalty, guidance, rescaling at the end"
    )
    loss: Literal["kl", "ce"] = Field(
        "kl", description="KL divergence to the dense model, or cross-entropy of the text"
    )
    start: Literal["sensitivity", "uniform"] = Field("sensitivity", description="allocation to start from")
    optimiser: Literal["newton", "adam"] = Field(
        "newton", description="of the priced form: newton re-linearises the loss of every rank, adam moves scores"
    )
    steps: int = Field(12, ge=0, le=bounds.MAX_STEPS, description="steps per budget")
    batch: int = Field(16, ge=1, le=bounds.MAX_WINDOWS, description="windows per step")
    rate: float = Field(0.3, gt=0, le=1, description="weight of a new step against the old ones (newton)")
    trust: float = Field(
        0.02,
        gt=0,
        le=1,
        description="largest share of all parameters that the first step may move; falls to a quarter (newton)",
    )
    damping: float = Field(
        1.0, ge=0, le=bounds.MAX_WEIGHT, description="multiple of the curvature; more moves fewer ranks (newton)"
    )
    learning_rate: float = Field(
        0.05,
        ge=bounds.MIN_RATE,
        le=bounds.MAX_RATE,
        description="step size of Adam at the start; falls to a tenth",
    )
    temperature: float = Field(
        1.0,
        ge=bounds.MIN_SLOPE,
        le=bounds.MAX_SLOPE,
        description="of the softmax over atoms; lower moves fewer ranks at once",
    )
    atoms: int = Field(64, ge=2, le=bounds.MAX_ATOMS, description="ranks per layer that a mask is made of")
    average: float = Field(
        0.9, ge=0, lt=1, description="decay of the moving average that is deployed; 0: the last step"
    )
    budget_weight: float = Field(
        100.0, ge=0, le=bounds.MAX_WEIGHT, description="weight of the budget penalty (objective paper)"
    )
    guidance_weight: float = Field(
        10.0, ge=0, le=bounds.MAX_WEIGHT, description="weight of the guidance loss (objective paper)"
    )
    check_every: int = Field(
        2, ge=1, le=bounds.MAX_STEPS, description="steps between checks on held-out text; the best one is kept"
    )


class TrainMasksConfig(TuningConfig, BudgetConfig, MaskTrainingOptions):
    """``ara train-masks``: learn what every rank of every layer is worth."""

    keep: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Flag(metavar="FLOAT")] = Field(
        (0.8,),
        min_length=1,
        description="budget to train at, in (0, 1]; may be repeated: largest first, the others may go on from it",
    )
    save_every: int = Field(1, ge=1, le=bounds.MAX_STEPS, description="steps between checkpoints to go on from")
    tensorboard: bool = Field(False, description="also write TensorBoard events (needs the package tensorboard)")

    @field_validator("keep")
    @classmethod
    def _largest_first(cls, keep: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(keep), reverse=True))
