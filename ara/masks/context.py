"""The tuning context: model, calibration windows and earlier results, for all methods that use the model."""

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
    """Input of an allocator that uses the model.

    Attributes:
        model: all layers are dense; an allocator may change their ranks.
        train: (w, t) int64 calibration windows to learn from.
        held_out: (w, t) int64 calibration windows to compare candidates on, at least one window away from ``train``.
        batch_size: windows per pass.
        seed: of everything random.
        report: progress.
        learned: results of ``ara train-masks``, one per budget; ``None`` without a training.
        table: the sensitivity table of that training; ``None`` if it needed none.
        table_cache: where tables of layers are stored; ``None``: they are always computed.
        moments: module path → second moment G (n, n) of the layer's inputs in the dense model; ``None``: who needs them
            reads ``train``.
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
    moments: Mapping[str, torch.Tensor] | None = None
