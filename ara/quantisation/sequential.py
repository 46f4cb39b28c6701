"""Rounds the matrices of a model in the order of its computation, each to the inputs that it really gets.

Block by block, and in a block through the groups of layers with the same input. The inputs are those of the model whose
earlier matrices are rounded already. The dense model is not needed: what is rounded is the weight as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from ara.calibration.moments import InputAccumulator, averages, input_groups
from ara.layouts.grid import Grid
from ara.layouts.modeling_ara import CompressedLinear, RoundedLinear, linear_with, packed, replace_linear
from ara.models.blocks import Stream, independent_starts
from ara.models.weights import LinearSpec, WeightRef, bias_of, find_blocks
from ara.progress import SILENT, Reporter
from ara.quantisation.calibrated import round_calibrated, round_product
from ara.quantisation.nearest import Rounded, round_to_nearest


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
    model: nn.Module,
    specs: Sequence[LinearSpec],
    grids: Mapping[str, Grid],
    windows: torch.Tensor | None,
    batch_size: int,
    parts: Parts,
    report: Reporter = SILENT,
) -> dict[str, RoundedLinear]:
    """Round layers of a model in place; afterwards it computes with the rounded numbers, in its own dtype.

    Args:
        model: a causal language model in evaluation mode, dense or compressed.
        specs: its linear layers.
        grids: name of a layer → grid; the other layers stay.
        windows: token ids (w, t) int64 to calibrate with; ``None`` rounds every number to the nearest one.
        batch_size: windows per pass.
        parts: finished blocks of an interrupted run.
        report: progress.

    Returns:
        Path of a matrix → module of few bits in its place, for a checkpoint.

    Raises:
        NumericalError: weights or inputs hold NaN or infinity, or a scale is beyond float16.
    """
    blocks = find_blocks(model)[1]
    device = next(model.parameters()).device
    wanted = [spec for spec in specs if spec.name in grids]
    found: dict[str, RoundedLinear] = {}
    if windows is None:
        for spec in wanted:
            found |= _round(model, spec, grids[spec.name], None)
        return found
    first = windows[:1].to(device)
    groups = input_groups(model, wanted, first)
    independent = len(independent_starts(model, first, range(1, len(blocks)))) == len(blocks) - 1
    stream = Stream(model, windows, batch_size, independent)
    with report.bar("Rounding blocks", len(blocks)) as bar:
        for layer in range(len(blocks)):
            name = f"block-{layer:03d}"
            file = parts.part(name)
            stored = load_file(file) if file is not None else {}
            done: dict[str, RoundedLinear] = {}
            for group in groups.get(layer, []):
                moment = None if file is not None else _moment(stream, group[0])
                for spec in group:
                    done |= _round(model, spec, grids[spec.name], moment, stored)
            if file is None and done:
                parts.finish_part(name, _named(done))
            found |= done
            if layer + 1 < len(blocks):
                stream.advance(stream.outputs())
            bar.advance()
    return found


def _moment(stream: Stream, leader: LinearSpec) -> torch.Tensor:
    """Return the second moment (n, n) of the inputs of a group."""
    module = leader.weight.owner(stream.model)
    sums = InputAccumulator(leader.n, next(stream.model.parameters()).device)
    for index in range(len(stream.batches)):
        sums.add(stream.input_of(index, module))
    return averages({leader.name: sums}, "inputs of")[leader.name].second_moment


def _round(
    model: nn.Module,
    spec: LinearSpec,
    grid: Grid,
    moment: torch.Tensor | None,
    stored: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, RoundedLinear]:
    """Round the matrices of one layer, or take them from a finished block, and put the numbers into the model."""
    paths = matrices_of(model, spec)
    modules = [model.get_submodule(path) for path in paths]
    weights = [WeightRef(path).read(model) for path in paths]
    results: Sequence[Rounded | None]
    if stored:
        results = [None] * len(paths)
    elif moment is None:
        results = [round_to_nearest(weight, grid) for weight in weights]
    elif len(weights) == 2:
        results = round_product(weights[0], weights[1], moment, grid)
    else:
        results = [round_calibrated(weights[0], moment, grid)]
    found = {}
    for path, module, weight, result in zip(paths, modules, weights, results, strict=True):
        transposed = type(module).__name__ == "Conv1D"
        m, n = weight.shape
        bias = bias_of(module)
        one = RoundedLinear(n, m, grid.bits, grid.block, grid.zero_points, bias is not None, transposed)
        if result is not None:
            one.load_state_dict(numbers_of(result), strict=False, assign=True)
        elif stored is not None:
            numbers = {key: stored[f"{path}.{key}"] for key, _ in one.named_buffers()}
            one.load_state_dict(numbers, strict=False, assign=True)
        if bias is not None:
            one.bias = nn.Parameter(bias, requires_grad=False)
        replace_linear(model, path, linear_with(one.weight.to(weight), bias, transposed))
        found[path] = one
    return found


def numbers_of(rounded: Rounded) -> dict[str, torch.Tensor]:
    """Return the tensors of :class:`RoundedLinear` for a rounded weight, on the CPU."""
    grid = rounded.grid
    m, n = rounded.steps.shape
    # The last block is padded with steps that decode to zero.
    zero = torch.full((m, 1), grid.middle) if rounded.zeros is None else rounded.zeros[:, -1:]
    missing = grid.blocks(n) * grid.block - n
    full = torch.cat([rounded.steps, zero.to(rounded.steps).expand(m, missing)], 1)
    found = {"steps": packed(full, grid.bits), "scales": rounded.scales}
    if rounded.zeros is not None:
        found["zeros"] = packed(rounded.zeros, grid.bits)
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def _named(modules: Mapping[str, RoundedLinear]) -> dict[str, torch.Tensor]:
    return {f"{path}.{key}": value for path, one in modules.items() for key, value in one.named_buffers()}
