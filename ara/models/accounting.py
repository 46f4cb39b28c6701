"""Counting parameters and bytes, with tied weights counted once."""

from __future__ import annotations

from torch import nn

from ara.layouts.modeling_ara import CompressedLinear, RoundedMatrix


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters of ``model``; a tied weight counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters, of indices, and of matrices of few bits; a tied weight counts once."""
    layers = [module for module in model.modules() if isinstance(module, (CompressedLinear, RoundedMatrix))]
    others = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *others])
