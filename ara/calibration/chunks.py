"""Reads statistics in chunks of blocks that fit into memory; a chunk starts from the outputs of the one before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ara.calibration.gradients import GradientStats, Targets, collect_gradients
from ara.calibration.moments import InputAccumulator, InputStats, collect_moments
from ara.models.blocks import BlockRunner, independent_starts
from ara.models.weights import LinearSpec
from ara.progress import SILENT, Reporter


@dataclass(frozen=True)
class GradientReading:
    """How to read gradients.

    Attributes:
        windows: number of calibration windows, from the front.
        targets: see :func:`ara.calibration.gradients.collect_gradients`.
        seed: of the random targets.
    """

    windows: int
    targets: Targets
    seed: int


class ChunkReader:
    """Reads the statistics of the chunks, in the order of the model."""

    def __init__(
        self,
        model: nn.Module,
        chunks: Sequence[Sequence[LinearSpec]],
        owners: Mapping[str, str],
        windows: torch.Tensor,
        batch_size: int,
        gradients: GradientReading | None = None,
        report: Reporter = SILENT,
        folder: Path | None = None,
    ) -> None:
        """Check at which blocks passes may start.

        Args:
            model: a causal language model in eval mode; with ``gradients``, its parameters must not require any.
            chunks: from :func:`split_into_chunks`.
            owners: from :func:`ara.calibration.moments.shared_inputs`.
            windows: token ids (w, t) int64.
            batch_size: windows per pass.
            gradients: how to read gradients; ``None`` for input statistics alone.
            report: progress, and a note when passes cannot start at a chunk.
            folder: for outputs of blocks that do not fit into memory.
        """
        self._owners, self._gradients, self._report = owners, gradients, report
        ends = [chunk[-1].layer + 1 for chunk in chunks[:-1]]
        starts = independent_starts(model, windows[:1], ends)
        if len(starts) < len(ends):
            report.fact(
                "every chunk of blocks is read from the embeddings, which takes longer: blocks of this model reuse "
                "results of earlier blocks"
            )
        self._inputs = BlockRunner(model, windows, batch_size, starts, report, folder)
        if gradients is not None:
            self._outputs = BlockRunner(model, windows[: gradients.windows], batch_size, starts, report, folder)

    def read(self, chunk: Sequence[LinearSpec]) -> tuple[dict[str, InputStats], dict[str, GradientStats]]:
        """Return input statistics by leading layer, and gradient statistics by layer (empty if not wanted).

        Raises:
            NumericalError: an input, output or gradient is NaN or infinite.
        """
        inputs = collect_moments(self._inputs, chunk, self._owners, self._report)
        if self._gradients is None:
            return inputs, {}
        targets, seed = self._gradients.targets, self._gradients.seed
        return inputs, collect_gradients(self._outputs, chunk, targets=targets, seed=seed, report=self._report)


def split_into_chunks(
    linears: Sequence[LinearSpec], owners: Mapping[str, str], gradients: bool, limit: int
) -> list[list[LinearSpec]]:
    """Split layers into groups of whole blocks whose second moments fit into ``limit`` bytes, at least one block each.

    Args:
        linears: in the order of the model.
        owners: from :func:`ara.calibration.moments.shared_inputs`; empty if no inputs are read.
        gradients: whether second moments of gradients are kept as well.
        limit: bytes.
    """
    chunks: list[list[LinearSpec]] = []
    used = 0
    for layer in dict.fromkeys(spec.layer for spec in linears):
        block = [spec for spec in linears if spec.layer == layer]
        leaders = {owners.get(spec.name): spec.n for spec in block if owners}
        widths = [*leaders.values(), *(spec.m for spec in block if gradients)]
        needed = sum(InputAccumulator.bytes_for(width) for width in widths)
        if not chunks or used + needed > limit:
            chunks.append([])
            used = 0
        chunks[-1] += block
        used += needed
    return chunks
