"""From rounded weights to the tensors and modules that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ara.layouts.grid import Grid
from ara.layouts.modeling_ara import NUMBERS, RoundedLinear, RoundedMatrix, packed, rounded_like
from ara.models.weights import WeightRef, bias_of
from ara.quantisation.nearest import Rounded


def numbers_of(rounded: Rounded) -> dict[str, torch.Tensor]:
    """Return the tensors of :class:`RoundedMatrix` for a rounded weight, on the CPU."""
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


def put_in(model: nn.Module, path: str, numbers: Mapping[str, torch.Tensor], grid: Grid) -> dict[str, RoundedMatrix]:
    """Overwrite a matrix of a model by a rounded one, in the dtype of the model.

    Args:
        model: in which the weight is overwritten.
        path: of the linear layer or embedding.
        numbers: from :func:`numbers_of`.
        grid: that they lie on.

    Returns:
        Path → module of few bits, for a checkpoint.
    """
    owner, weight = model.get_submodule(path), WeightRef(path)
    module = rounded_like(owner, grid.bits, grid.block, grid.zero_points)
    module.load_state_dict(dict(numbers), strict=False, assign=True)
    if isinstance(module, RoundedLinear) and (bias := bias_of(owner)) is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    weight.replace(model, module.dense(weight.read(model).dtype))
    return {path: module}


def named(modules: Mapping[str, RoundedMatrix]) -> dict[str, torch.Tensor]:
    """Return the numbers of modules under ``<path>.<name>``."""
    return {
        f"{path}.{key}": numbers
        for path, one in modules.items()
        for key in NUMBERS
        if (numbers := getattr(one, key)) is not None
    }


def numbers_at(path: str, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return those of the tensors :func:`named` that belong to the module at ``path``."""
    return {key: stored[f"{path}.{key}"] for key in NUMBERS if f"{path}.{key}" in stored}
