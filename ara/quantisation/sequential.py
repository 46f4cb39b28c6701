"""Rounds the matrices of a model in the order of its computation, each to the inputs that it really gets.

The embedding first, then block by block, and in a block through the groups of layers with the same input, and the head
last. The inputs are those of the model whose earlier matrices are rounded already. The dense model is not needed: what
is rounded is the weight as it is.

If second moments of the inputs are known already, such as those in the dense model, no text is read for the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from ara.calibration.moments import InputAccumulator, averages, input_groups, pooled, priors, steps_of
from ara.layouts import layout_named
from ara.layouts.grid import Grid
from ara.layouts.modeling_ara import CompressedLinear, RoundedMatrix
from ara.models.blocks import Stream, independent_starts
from ara.models.embeddings import Embeddings, find_embeddings
from ara.models.weights import LinearSpec, WeightRef, find_blocks
from ara.progress import SILENT, Reporter
from ara.quantisation.calibrated import mixed_basis, round_calibrated, round_product
from ara.quantisation.embeddings import round_head
from ara.quantisation.nearest import Rounded, round_to_nearest
from ara.quantisation.storing import named, numbers_at, numbers_of, put_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Parts(Protocol):
    """Storage of finished blocks, so that an interrupted run can resume."""

    def part(self, name: str) -> Path | None:
        """Return the safetensors file of a finished block, or ``None``."""

    def finish_part(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the tensors of a finished block."""


def matrices_of(model: nn.Module, spec: LinearSpec) -> list[str]:
    """Return the paths of the matrices of a layer: the layer itself, or A and B (or C) of a low-rank one."""
    owner = spec.weight.owner(model)
    if not isinstance(owner, CompressedLinear):
        return [spec.name]
    return [f"{spec.name}.{name}" for name, child in owner.named_children() if isinstance(child, nn.Linear)]


def round_model(
    model: PreTrainedModel,
    specs: Sequence[LinearSpec],
    grids: Mapping[str, Grid],
    windows: torch.Tensor | None,
    batch_size: int,
    parts: Parts,
    report: Reporter = SILENT,
    moments: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, RoundedMatrix]:
    """Round matrices of a model in place; afterwards it computes with the rounded numbers, in its own dtype.

    Args:
        model: a causal language model in evaluation mode, dense or compressed.
        specs: its linear layers.
        grids: name of a layer, or path of the embedding and of a head that is not tied to it → grid; all other matrices
            stay.
        windows: token ids (w, t) int64 to calibrate with; ``None`` rounds every number for which there are no
            ``moments`` to the nearest one.
        batch_size: windows per pass.
        parts: finished blocks of an interrupted run.
        report: progress.
        moments: name of a layer → second moment (n, n) float32 of its inputs, in place of those on the windows. The
            windows are then read for the head alone.

    Returns:
        Path of a matrix → module of few bits in its place, for a checkpoint.

    Raises:
        NumericalError: weights or inputs hold NaN or infinity, or a scale is beyond float16.
    """
    wanted = [spec for spec in specs if spec.name in grids]
    ends = find_embeddings(model) if len(grids) > len(wanted) else None
    found: dict[str, RoundedMatrix] = {}
    if ends is not None and not ends.tied:
        path, grid = ends.embedding, grids[ends.embedding]
        found |= put_in(model, path, numbers_of(round_to_nearest(WeightRef(path).read(model), grid)), grid)
    stream = None if windows is None or (moments is not None and ends is None) else _stream(model, windows, batch_size)
    if stream is None and moments is None:
        for spec in wanted:
            found |= _round(model, spec, grids[spec.name], None)
    else:
        found |= _round_blocks(model, stream, moments, wanted, grids, parts, report)
    if ends is not None:
        found |= _round_head(model, ends, grids[ends.matrices[-1]], stream, parts)
    return found


def _stream(model: nn.Module, windows: torch.Tensor, batch_size: int) -> Stream:
    blocks, first = find_blocks(model)[1], windows[:1].to(next(model.parameters()).device)
    independent = len(independent_starts(model, first, range(1, len(blocks)))) == len(blocks) - 1
    return Stream(model, windows, batch_size, independent)


def _round_blocks(
    model: nn.Module,
    stream: Stream | None,
    moments: Mapping[str, torch.Tensor] | None,
    wanted: Sequence[LinearSpec],
    grids: Mapping[str, Grid],
    parts: Parts,
    report: Reporter,
) -> dict[str, RoundedMatrix]:
    """Round the layers of all blocks by known moments or by those of a stream, which then is at the last block."""
    blocks, device = len(find_blocks(model)[1]), next(model.parameters()).device
    groups: dict[int, list[list[LinearSpec]]] = {}
    if moments is None:
        assert stream is not None
        groups = input_groups(model, wanted, stream.batches[0][:1].to(device))
    else:
        for spec in wanted:
            groups.setdefault(spec.layer, []).append([spec])

    def moments_of(step: Sequence[LinearSpec]) -> dict[str, torch.Tensor]:
        if moments is not None:
            return {spec.name: moments[spec.name].to(device) for spec in step}
        assert stream is not None
        if step[0].pool is not None:
            return _expert_moments(stream, model, step)
        moment = _moment(stream, step[0].weight.owner(model), step[0].n, step[0].name)
        return {spec.name: moment for spec in step}

    found: dict[str, RoundedMatrix] = {}
    with report.bar("Rounding blocks", blocks) as bar:
        for layer in range(blocks):
            name = f"block-{layer:03d}"
            stored = _stored(parts, name)
            done: dict[str, RoundedMatrix] = {}
            for step in groups.get(layer, []) if moments is not None else steps_of(groups.get(layer, [])):
                found_moments = {} if stored else moments_of(step)
                for spec in step:
                    done |= _round(model, spec, grids[spec.name], found_moments.get(spec.name), stored)
            if done and not stored:
                parts.finish_part(name, named(done))
            found |= done
            if stream is not None and layer + 1 < blocks:
                stream.advance(stream.outputs())
            bar.advance()
    return found


def _round_head(
    model: nn.Module, ends: Embeddings, grid: Grid, stream: Stream | None, parts: Parts
) -> dict[str, RoundedMatrix]:
    """Round the head, on the inputs that the last block gives now."""
    path, name = ends.matrices[-1], "head"
    if stored := _stored(parts, name):
        return put_in(model, path, numbers_at(path, stored), grid)
    moment = None if stream is None else _moment(stream, model.get_submodule(ends.head), ends.n, ends.head)
    rounded = round_head(WeightRef(path).read(model), ends, grid, moment)
    found = put_in(model, path, numbers_of(rounded), grid)
    parts.finish_part(name, named(found))
    return found


def _stored(parts: Parts, name: str) -> dict[str, torch.Tensor]:
    """Return the numbers of a finished part; none if it is not finished."""
    file = parts.part(name)
    return {} if file is None else load_file(file)


def _moment(stream: Stream, module: nn.Module, n: int, name: str) -> torch.Tensor:
    """Return the second moment (n, n) of the inputs of a module in the current block, or after the last one."""
    sums = InputAccumulator(n, next(stream.model.parameters()).device)
    for index in range(len(stream.batches)):
        sums.add(stream.input_of(index, module))
    return averages({name: sums}, "inputs of")[name].second_moment


def _expert_moments(stream: Stream, model: nn.Module, specs: Sequence[LinearSpec]) -> dict[str, torch.Tensor]:
    """Return the second moments (n, n) of the inputs of one layer of all experts, shrunk towards each other."""
    device = next(stream.model.parameters()).device
    modules = {spec.weight.owner(model): spec.name for spec in specs}
    sums = {spec.name: InputAccumulator(spec.n, device) for spec in specs}
    for index in range(len(stream.batches)):
        for module, x in stream.inputs_of(index, list(modules)).items():
            sums[modules[module]].add(x)
    prior = priors(pooled(sums, specs), specs)
    return {name: stats.second_moment for name, stats in averages(sums, "inputs of", prior).items()}


def _round(
    model: nn.Module,
    spec: LinearSpec,
    grid: Grid,
    moment: torch.Tensor | None,
    stored: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, RoundedMatrix]:
    """Round the matrices of one layer, or take them from a finished block, and put the numbers into the model."""
    paths = matrices_of(model, spec)
    weights = [WeightRef(path).read(model) for path in paths]
    rounded: Sequence[Rounded]
    if stored:
        numbers = [numbers_at(path, stored) for path in paths]
    else:
        if moment is None:
            rounded = [round_to_nearest(weight, grid) for weight in weights]
        elif len(weights) == 2:
            a, b = weights
            if layout_named(spec.layout).free_basis:
                a, b = mixed_basis(a, b, moment)
            rounded = round_product(a, b, moment, grid)
        else:
            rounded = [round_calibrated(weights[0], moment, grid)]
        numbers = [numbers_of(one) for one in rounded]
    found: dict[str, RoundedMatrix] = {}
    for path, one in zip(paths, numbers, strict=True):
        found |= put_in(model, path, one, grid)
    return found
