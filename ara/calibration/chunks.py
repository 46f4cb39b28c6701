"""Reads statistics in chunks of blocks that fit into memory; a chunk starts from the outputs of the one before.

Several processes share the windows. Their sums are added up in the processes that factor the layers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ara.calibration.gradients import GradientStats, Targets, collect_gradients, gradient_bytes
from ara.calibration.moments import InputAccumulator, InputStats, collect_moments
from ara.distributed.group import ALONE, Group
from ara.models.blocks import BlockRunner, independent_starts
from ara.models.experts import every_expert_sees_all
from ara.models.weights import LinearSpec, by_block
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
        group: Group = ALONE,
        all_experts: bool = False,
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
            group: the processes that share the windows.
            all_experts: whether the inputs of every expert are those of all tokens.
        """
        self._owners, self._gradients, self._report, self._group = owners, gradients, report, group
        self._inputs_of = every_expert_sees_all if all_experts else nullcontext
        ends = [chunk[-1].layer + 1 for chunk in chunks[:-1]]
        starts = independent_starts(model, windows[:1], ends)
        if len(starts) < len(ends):
            report.fact(
                "every chunk of blocks is read from the embeddings, which takes longer: blocks of this model reuse "
                "results of earlier blocks"
            )
        rows = group.share(len(windows), batch_size)
        self._inputs = BlockRunner(model, windows[rows], batch_size, starts, report, folder)
        if gradients is not None:
            self._rows = group.share(gradients.windows, batch_size)
            self._outputs = BlockRunner(model, windows[self._rows], batch_size, starts, report, folder)

    def read(
        self, chunk: Sequence[LinearSpec], factored_by: Mapping[str, int]
    ) -> tuple[dict[str, InputStats], dict[str, GradientStats]]:
        """Return input statistics by leading layer, and gradient statistics by layer (empty if not wanted).

        Args:
            chunk: layers of consecutive blocks.
            factored_by: layer → the process that needs its statistics; each process gets those of its layers.

        Raises:
            NumericalError: an input, output or gradient is NaN or infinite.
        """
        leaders: dict[str, set[int]] = {}
        layers: dict[str, set[int]] = {}
        for spec in chunk:
            rank = factored_by[spec.name]
            leaders.setdefault(self._owners[spec.name], set()).add(rank)
            layers[spec.name] = {rank}
            if spec.pool is not None:
                for wanted in (leaders, layers):
                    wanted.setdefault(spec.pool, set()).add(rank)
        with self._inputs_of(self._inputs.model):
            inputs = collect_moments(self._inputs, chunk, self._owners, self._report, partial(self._total, leaders))
        if self._gradients is None:
            return inputs, {}
        outputs = collect_gradients(
            self._outputs,
            chunk,
            targets=self._gradients.targets,
            seed=self._gradients.seed,
            rows=self._rows.tolist(),
            report=self._report,
            total=partial(self._total, layers),
        )
        return inputs, outputs

    def _total(self, ranks: Mapping[str, Collection[int]], sums: dict[str, InputAccumulator]) -> None:
        """Add up the sums of all processes; leave those that this process needs."""
        for name in list(sums):
            sums[name].sum_over(self._group, ranks[name])
            if self._group.rank not in ranks[name]:
                del sums[name]


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
    for block in by_block(linears):
        inputs = {owners.get(spec.name): spec.n for spec in block if owners}
        inputs |= {spec.pool: spec.n for spec in block if owners and spec.pool}
        outputs = {name: gradient_bytes(spec) for spec in block if gradients for name in (spec.name, spec.pool) if name}
        needed = sum(map(InputAccumulator.bytes_for, inputs.values())) + sum(outputs.values())
        if not chunks or used + needed > limit:
            chunks.append([])
            used = 0
        chunks[-1] += block
        used += needed
    return chunks
