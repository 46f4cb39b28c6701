"""``ara train-masks``: learned ranks. Registered; the training is not there yet."""

from __future__ import annotations

from ara.config import TrainMasksConfig
from ara.errors import UnavailableError
from ara.stage_view import StageView
from ara.stages.common import Run


def train_masks(config: TrainMasksConfig, run: Run) -> StageView:
    """Refuse politely.

    Raises:
        UnavailableError: always, for now.
    """
    raise UnavailableError(
        "ara train-masks is not there yet: it arrives with learned ranks (ara allocate --method ara)",
        "until then: ara allocate --method energy, or --method uniform",
    )
