"""The kind ``training``: the masks and rank losses that ``ara train-masks`` learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, TypeAdapter

from ara.artifacts.base import LEFT_OUT, Count, Least1, Number, Part, Rank, Results, Settings, Share
from ara.layout_names import DEFAULT_LAYOUT, LayoutName
from ara.workspace.manifest import Manifest
from ara.workspace.view import StageView

TABLE_FILE = "sensitivity.safetensors"
LOG_FILE = "log.csv"
EVENTS_FOLDER = "tensorboard"
# A start of a training: the state learned at the previous budget.
LEARNED = "learned"


def _keep(budget: str) -> str:
    """Refuse a budget that is not a number in (0, 1]."""
    TypeAdapter(Share).validate_python(float(budget), strict=True)
    return budget


# A budget as a key in JSON, such as ``0.8``.
Keep = Annotated[str, AfterValidator(_keep)]


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """The settings that later stages read; see :class:`ara.config.TrainMasksConfig`."""

    objective: Literal["priced", "paper"]
    samples: Least1
    held_out: Least1
    keep: tuple[Share, ...]
    layout: LayoutName = DEFAULT_LAYOUT
    loss: str = ""


@dataclass(frozen=True)
class LoggedStep(Part):
    """One logged step; see :class:`ara.masks.state.LogRow`. Losses in nats per token, ``seconds`` since the start."""

    step: Count
    loss: Number | None
    keep: Number
    dense: Count
    seconds: Number
    held_out: Number | None = None


@dataclass(frozen=True, kw_only=True)
class TrainedBudget(Part):
    """The result of a training at one budget; losses in nats per token on held-out calibration text.

    Attributes:
        ranks: module path → rank or ``"dense"``, of the best step.
        start: initial state of the training; ``None`` in results of earlier versions.
        start_held_out: loss of the first allocation.
        held_out: loss of the best one.
        best_step, steps: step of the best allocation, and number of steps.
        seconds, backward_passes: spent at this budget.
    """

    ranks: Mapping[str, Rank]
    start: str | None = field(default=None, metadata=LEFT_OUT)
    start_held_out: Number
    held_out: Number
    best_step: Count
    steps: Count
    seconds: Number
    backward_passes: Count

    @property
    def won(self) -> float:
        """Decrease of the held-out loss by the training, nats per token."""
        return self.start_held_out - self.held_out


@dataclass(frozen=True)
class TrainingResults(Results):
    """Results of ``ara train-masks``.

    Attributes:
        budgets: keep → result.
        log: keep → logged steps.
        table_seconds, table_windows: seconds and windows spent on the sensitivity table.
        stopped: why the training ended early; ``None`` if it is complete.
    """

    Settings = TrainingSettings
    budgets: Mapping[Keep, TrainedBudget] = field(default_factory=dict)
    log: Mapping[Keep, tuple[LoggedStep, ...]] = field(default_factory=dict)
    table_seconds: Number = 0.0
    table_windows: Count = 0
    stopped: str | None = None

    @classmethod
    def problem(cls, manifest: Manifest) -> str | None:
        """Return what is wrong with settings and results, or ``None``."""
        problem = super().problem(manifest)
        return problem or (None if manifest.results.get("budgets") else "results: budgets: it has none")


def masks_file(keep: float) -> str:
    """Name of the file with the state learned at one budget."""
    return f"masks-{keep:g}.safetensors"


def stopped_early(training: StageView) -> str | None:
    """Return why a training ended before it was complete; ``None`` if it did not."""
    return TrainingResults.read(training).stopped if training.manifest is not None else None


class TrainingCost(NamedTuple):
    """Seconds and backward passes of a training."""

    seconds: float
    backward_passes: int


def training_cost(training: StageView, keep: float) -> TrainingCost:
    """Return the cost of a training up to its budget ``keep``.

    It includes the sensitivity table and the larger budgets whose learned state this budget started from.
    """
    results = TrainingResults.read(training)
    # Earlier versions did not record the start; they started from the learned state unless they learned ranks only.
    unrecorded = LEARNED if TrainingSettings.read(training).objective == "priced" else ""
    seconds, passes = results.table_seconds, results.table_windows
    for budget in sorted((budget for budget in results.budgets if float(budget) >= keep), key=float):
        row = results.budgets[budget]
        seconds, passes = seconds + row.seconds, passes + row.backward_passes
        if (unrecorded if row.start is None else row.start) != LEARNED:
            break
    return TrainingCost(seconds, passes)
