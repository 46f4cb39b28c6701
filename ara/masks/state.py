"""Settings of a training, and the state from which it resumes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from ara.config import MethodOptions
from ara.masks.model import LossKind

# Prefix of the best parameters in a checkpoint.
_BEST = "best:"


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of the training loop; see :class:`ara.config.TrainMasksConfig` for ranges.

    Attributes:
        steps: optimiser steps.
        batch: windows per step.
        learning_rate: of Adam at the start; falls along a cosine to a tenth.
        loss: of the language model.
        average: decay of the moving average of the parameters, which is checked and deployed; 0: no average.
        check_every: steps between checks on held-out text.
        micro_batch: windows per forward and backward pass.
        seed: of batches and of everything random.
    """

    steps: int
    batch: int
    learning_rate: float
    loss: LossKind = "kl"
    average: float = 0.0
    check_every: int = 10
    micro_batch: int = 4
    seed: int = 0

    @classmethod
    def of(cls, options: MethodOptions, micro_batch: int, seed: int) -> TrainingSettings:
        """Return the settings that are fields of a method's ``options``; the others have their defaults."""
        named = {field.name: getattr(options, field.name) for field in fields(cls) if hasattr(options, field.name)}
        assert not {"micro_batch", "seed"} & set(named), "these come from the context"
        return cls(**named, micro_batch=micro_batch, seed=seed)


@dataclass
class LogRow:
    """One step; row 0 is the start. Losses in nats per token, ``seconds`` since the start.

    Attributes:
        loss: of the step's batch; ``None`` in row 0.
        keep: fraction of the dense parameters that the current allocation keeps.
        dense: number of its dense layers.
        held_out: loss on held-out text; ``None`` in steps without a check.
    """

    step: int
    loss: float | None
    keep: float
    dense: int
    seconds: float
    held_out: float | None = None


class _Plain(BaseModel):
    """What :meth:`TrainingState.plain` returns."""

    model_config = ConfigDict(extra="forbid", defer_build=True)
    step: int
    best: dict[str, int | None]
    best_held_out: float
    best_step: int
    log: list[LogRow] = Field(min_length=1)
    seconds: float
    backward_passes: int
    interrupted: bool


@dataclass
class TrainingState:
    """Everything that a training needs to resume.

    Attributes:
        step: finished steps.
        tensors: parameters, their average and the optimiser's moments, by name.
        best: ranks of the best allocation on held-out text so far.
        best_held_out: its mean negative log-likelihood, nats per token.
        best_step: the step that reached it; 0 is the start.
        best_tensors: the family's parameters at that step, by name.
        log: one row per step; row 0 is the start.
        seconds: of training so far.
        backward_passes: windows through a backward pass so far.
        interrupted: whether Ctrl+C ended it.
    """

    step: int = 0
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    best: dict[str, int | None] = field(default_factory=dict)
    best_held_out: float = math.inf
    best_step: int = 0
    best_tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    log: list[LogRow] = field(default_factory=list)
    seconds: float = 0.0
    backward_passes: int = 0
    interrupted: bool = False

    def plain(self) -> dict[str, Any]:
        """Return everything but the tensors as JSON data."""
        values = asdict(replace(self, tensors={}, best_tensors={}))
        del values["tensors"], values["best_tensors"]
        return values

    def all_tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors in one dict, for a checkpoint."""
        return {**self.tensors, **{f"{_BEST}{name}": value for name, value in self.best_tensors.items()}}

    @classmethod
    def from_plain(cls, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> TrainingState:
        """Return the state that :meth:`plain` and :meth:`all_tensors` describe.

        Raises:
            ValueError: they do not describe one.
        """
        _Plain.model_validate(values)
        best = {name.removeprefix(_BEST): value for name, value in tensors.items() if name.startswith(_BEST)}
        rest = {name: value for name, value in tensors.items() if not name.startswith(_BEST)}
        return cls(**{**values, "log": [LogRow(**row) for row in values["log"]]}, tensors=rest, best_tensors=best)
