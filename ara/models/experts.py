"""Passes through models whose experts are separate layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ara.layouts.modeling_ara import RoutedExperts, SeparateExperts


@contextmanager
def every_expert_sees_all(model: nn.Module) -> Iterator[None]:
    """Within this context every expert runs on all tokens, so whoever observes its layers sees all of them.

    The outputs of the model stay those of the experts that the router chooses.
    """
    experts = _experts(model)
    for module in experts:
        module.every_token = True
    try:
        yield
    finally:
        for module in experts:
            module.every_token = False


def run_one_by_one(model: nn.Module) -> None:
    """Run the experts of a model one after the other from now on.

    Products of all experts at once have stacks of the weights in memory. Their rounding may differ.
    """
    for module in _experts(model):
        module.config._experts_implementation = "eager"


# Experts of every token (t, c), and their weights (t, c).
Routes = tuple[torch.Tensor, torch.Tensor]


def has_routes(block: nn.Module) -> bool:
    """Tell whether the experts of a block get the routes of their tokens, which Llama 4 keeps to its router."""
    return all(isinstance(module, RoutedExperts) for module in _experts(block))


@contextmanager
def recording_routes(block: nn.Module) -> Iterator[list[Routes]]:
    """Collect where the routers of a block send the tokens of a pass: one entry per module of experts."""
    routes: list[Routes] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        routes.append((args[1], args[2]))

    with ExitStack() as hooks:
        for module in _experts(block):
            hooks.enter_context(module.register_forward_pre_hook(note))
        yield routes


@contextmanager
def replaying_routes(block: nn.Module, routes: list[Routes]) -> Iterator[None]:
    """Send the tokens of a pass where another pass sent them, in a block of the same shape."""
    left = iter(routes)

    def send(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0], *next(left))

    with ExitStack() as hooks:
        for module in _experts(block):
            hooks.enter_context(module.register_forward_pre_hook(send))
        yield


def _experts(model: nn.Module) -> list[SeparateExperts]:
    return [module for module in model.modules() if isinstance(module, SeparateExperts)]
