"""The tuning context: model, calibration windows and earlier results, for all methods that use the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ara.masks.table_cache import LayerTable, TableCache
from ara.progress import SILENT, Reporter

if TYPE_CHECKING:
    from ara.masks.model import MaskedModel
    from ara.masks.rank_losses import LearnedLosses


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

    def cached_table(
        self,
        settings: Mapping[str, str | int],
        sizes: Mapping[str, int],
        make: Callable[[], dict[str, torch.Tensor]],
        what: str = "sensitivity table",
    ) -> LayerTable:
        """Return a table of the model, from the cache if it is there.

        Args:
            settings: what determines the table besides model and windows.
            sizes: module path → number of entries.
            make: computes the entries.
            what: the table is called so in reports.
        """

        def timed() -> LayerTable:
            """Make the table and measure the time."""
            begun = time.monotonic()
            return LayerTable(make(), time.monotonic() - begun)

        if self.table_cache is None:
            return timed()
        circumstances: dict[str, str | int] = {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "device": str(self.model.device),
            "dtype": str(self.model.model.dtype),
        }
        return self.table_cache.get(self.train, {**settings, **circumstances}, sizes, timed, what)
