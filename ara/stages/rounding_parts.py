"""Where rounding keeps finished blocks: in the unfinished folder of the stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ara.quantisation.sequential import Parts
from ara.workspace.writer import StageWriter


class RoundingParts(Parts):
    """Finished blocks in the unfinished folder of the stage."""

    def __init__(self, stage: StageWriter, scope: str = "") -> None:
        """Keep the blocks of one model.

        Args:
            stage: the writer.
            scope: beginning of the names of all parts, for a stage that rounds several models.
        """
        self._stage, self._scope = stage, scope

    def part(self, name: str) -> Path | None:
        """See :class:`Parts`."""
        found = self._stage.work(f"{self._scope}{name}")
        return None if found is None else found[0]

    def finish_part(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """See :class:`Parts`."""
        self._stage.finish_work(f"{self._scope}{name}", tensors, {})
