"""Empty parameters at which vLLM finds how to load the tensors of a compressed layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def add_place(layer: nn.Module, key: str, load: Callable[..., None]) -> None:
    """Add an empty parameter to a layer.

    Args:
        layer: of vLLM.
        key: name of a tensor within the layer, such as ``A.weight``; its parents are added too.
        load: called with the parameter, the tensor, and vLLM's name of the part if the layer has several.
    """
    *parents, name = key.split(".")
    owner = layer
    for parent in parents:
        if not hasattr(owner, parent):
            owner.add_module(parent, nn.Module())
        owner = owner.get_submodule(parent)
    place = nn.Parameter(torch.empty(0), requires_grad=False)
    set_loader(place, load)
    owner.register_parameter(name, place)


def set_loader(parameter: nn.Parameter, load: Callable[..., None]) -> None:
    """Let vLLM load a parameter by ``load``; arguments as in :func:`add_place`."""
    vars(parameter)["weight_loader"] = load


def remove_place(layer: nn.Module, key: str) -> None:
    """Remove an empty parameter, with the parents that were added for it."""
    first = key.partition(".")[0]
    if hasattr(layer, first):
        delattr(layer, first)
