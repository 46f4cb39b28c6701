"""Counting parameters and bytes, with tied weights counted once."""

from __future__ import annotations

from torch import nn


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters of ``model``; a tied weight counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters of ``model``; a tied weight counts once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
