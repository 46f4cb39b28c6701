"""What everything that chooses ranks by looking at the model works with: model, windows, and what is known already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ara.progress import SILENT, Reporter

if TYPE_CHECKING:
    from ara.masks.model import MaskedModel
    from ara.masks.rank_losses import LearnedLosses
    from ara.masks.table_cache import TableCache


@dataclass(frozen=True, eq=False)
class TuningContext:
    """What an allocator that looks at the model may use.

    Attributes:
        model: with all layers dense; an allocator may cut it as it likes.
        train: (w, t) int64 calibration windows to learn from.
        held_out: (w, t) int64 calibration windows to compare candidates on, at least one window away from ``train``.
        batch_size: windows per pass.
        seed: of everything random.
        report: progress.
        learned: what ``ara train-masks`` has found, by budget; ``None`` when there was no training.
        table: the sensitivity table that it began with; ``None`` where it needed none.
        table_cache: where sensitivity tables are kept; ``None``: every one is made anew.
    """

    model: MaskedModel
    train: torch.Tensor
    held_out: torch.Tensor
    batch_size: int = 4
    seed: int = 0
    report: Reporter = SILENT
    learned: Sequence[LearnedLosses] | None = None
    table: Mapping[str, torch.Tensor] | None = None
    table_cache: TableCache | None = None
