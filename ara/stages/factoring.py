"""Factor the layers of a model for ``ara decompose`` and store the factors, block by block.

Several processes share the windows and the layers. Process 0 gets the factors of the others and stores them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ara.artifacts.factors import layer_file, moments_file
from ara.calibration.chunks import ChunkReader, GradientReading, split_into_chunks
from ara.calibration.gradients import GradientStats
from ara.calibration.moments import InputStats
from ara.config import DecomposeConfig
from ara.decomposition.base import Decomposition, refuse_nonfinite
from ara.decomposition.parallel import cost, map_layers
from ara.decomposition.two_sided import TwoSidedOptions
from ara.distributed.group import Group
from ara.distributed.sharing import share_out
from ara.errors import NumericalError
from ara.models.memory import available_bytes
from ara.models.placement import torch_dtype
from ara.models.weights import LinearSpec, by_block
from ara.stages.common import Run
from ara.stages.expert_tokens import ExpertTokens
from ara.stages.moments import packed_moments
from ara.workspace.writer import StageWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ara.data.tokens import TokenWindows


def refuse_nonfinite_weights(model: PreTrainedModel, linears: Sequence[LinearSpec]) -> None:
    """Check the weights of all layers.

    Raises:
        NumericalError: one holds NaN or infinity.
    """
    for spec in linears:
        with _naming(spec):
            refuse_nonfinite(spec.weight.read(model))


def unfinished(linears: Sequence[LinearSpec], stage: StageWriter) -> list[LinearSpec]:
    """Return the layers of blocks that no interrupted run has finished."""
    finished = set(stage.finished)
    return [spec for spec in linears if layer_file(spec.layer) not in finished]


def factor_layers(
    model: PreTrainedModel,
    linears: Sequence[LinearSpec],
    method: Decomposition,
    windows: TokenWindows | None,
    owners: Mapping[str, str],
    moments: Mapping[str, str] | None,
    config: DecomposeConfig,
    stage: StageWriter | None,
    run: Run,
    spill: Path,
) -> None:
    """Collect statistics for as many layers as fit into memory, factor and store them; repeat.

    Args:
        model: with the dense weights.
        linears: its layers to factor; blocks that an interrupted run has finished are skipped.
        method: of decomposition.
        windows: calibration text; ``None`` for a method that reads none.
        owners: module path → the first layer of the model with the same input; empty if no text is read.
        moments: :attr:`FactorsResults.moments`; ``None`` if no second moments are kept.
        config: batch size, seed, memory for moments, and the resolved dtype of the factors.
        stage: takes the factors of every finished block; ``None`` in processes that do not write.
        run: reporter and group.
        spill: folder for outputs of blocks that do not fit into memory.

    Raises:
        NumericalError: a factor is not finite, or the method fails on a layer.
        DiskFullError: the factors could not be written.
    """
    group = run.group
    todo = linears if stage is None else unfinished(linears, stage)
    if len(todo) < len(linears):
        ready = len(by_block(linears)) - len(by_block(todo))
        run.report.fact(f"resuming after an interruption: {ready} blocks are done")
    if config.moment_memory is None:
        moment_bytes = available_bytes(model.device) // 4
    else:
        moment_bytes = int(config.moment_memory * 2**30)
    # The memory of process 0 decides: all processes need the same chunks.
    chunks = group.broadcast(split_into_chunks(todo, owners, method.needs_gradients, moment_bytes))
    reader = None
    if windows is not None and chunks:
        gradients = _gradient_reading(method, len(windows.ids), config.seed)
        if gradients is not None:
            model.requires_grad_(False)
        text = windows.ids, config.batch_size
        every = config.calibrate_all_experts
        reader = ChunkReader(model, chunks, owners, *text, gradients, run.report, spill, group, every)
    device = "cpu" if model.device.type == "mps" else model.device.type
    seen = ExpertTokens()
    for chunk in chunks:
        blocks = by_block(chunk)
        factored_by = share_out(({spec.name: cost(spec) for spec in block} for block in blocks), group.size)
        inputs, outputs = reader.read(chunk, factored_by) if reader is not None else ({}, {})
        seen.add(chunk, owners, inputs)
        with run.report.bar(f"Factoring blocks {chunk[0].layer + 1} to {chunk[-1].layer + 1}", len(chunk)) as bar:
            for block in blocks:
                work = [
                    (spec, (inputs.get(owners.get(spec.name, "")), outputs.get(spec.name)))
                    for spec in block
                    if factored_by[spec.name] == group.rank
                ]
                layer = block[0].layer
                if moments is not None:
                    # Before the factors: with these the block is finished.
                    found = {spec.name: stats for spec, (stats, _) in work if stats is not None}
                    _store(moments_file(layer), packed_moments(found, moments), stage, group)
                tensors: dict[str, torch.Tensor] = {}
                for factors in map_layers(
                    partial(_factor, model, method, torch_dtype(config.factors_dtype)), work, device
                ):
                    tensors |= factors
                    bar.advance()
                _store(layer_file(layer), tensors, stage, group)
                bar.advance(len(block) - len(work))
    seen.warn(run.report)


def _store(file: str, tensors: dict[str, torch.Tensor], stage: StageWriter | None, group: Group) -> None:
    """Store what all processes have for one file."""
    gathered = group.gather(tensors)
    if stage is not None:
        stage.tensors(file, gathered)


def _gradient_reading(method: Decomposition, windows: int, seed: int) -> GradientReading | None:
    """Return how many windows the method reads backward, and how; ``None`` if it needs no gradients."""
    if not method.needs_gradients:
        return None
    assert isinstance(method.options, TwoSidedOptions)
    return GradientReading(max(1, round(method.options.gradient_share * windows)), method.options.targets, seed)


def _factor(
    model: PreTrainedModel,
    method: Decomposition,
    dtype: torch.dtype,
    spec: LinearSpec,
    statistics: tuple[InputStats | None, GradientStats | None],
) -> dict[str, torch.Tensor]:
    """Factor one layer; return A (k, n) and B (m, k) in ``dtype``, and the spectrum (r) in float64.

    k is the largest rank to be stored.
    """
    weight = spec.weight.read(model)
    if weight.device.type == "mps":
        # Apple GPUs have no float64.
        weight = weight.cpu()
    with _naming(spec):
        factors = method.decompose(weight, *statistics)
    stored = {
        f"{spec.name}.A": factors.a[: spec.stored_rank].to(dtype).cpu(),
        f"{spec.name}.B": factors.b[:, : spec.stored_rank].to(dtype).cpu(),
        f"{spec.name}.spectrum": factors.spectrum.cpu(),
    }
    for key, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            raise NumericalError(f"{key} holds NaN or infinity in {tensor.dtype}", "try --factors-dtype float32")
    return stored


@contextmanager
def _naming(spec: LinearSpec) -> Iterator[None]:
    """Put the layer's name in front of numerical errors."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{spec.name}: {error}", error.hint) from None
