"""Replaces the forward functions of modules for a while, and ends forward passes early."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn


@contextmanager
def replacing_forward(modules: Sequence[nn.Module], replace: Callable[[Callable[..., Any]], Any]) -> Iterator[None]:
    """Within this context the forward function of each module is ``replace`` of its own."""
    # A module may already have a forward of its own, for instance from accelerate's hooks.
    before = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            vars(module)["forward"] = replace(module.forward)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward


class PassEnded(Exception):
    """Ends a forward pass after the last block of interest."""


@contextmanager
def ending_after(block: nn.Module) -> Iterator[list[Any]]:
    """End a pass after ``block``; yields a list that then holds its output."""
    outputs: list[Any] = []

    def end(module: nn.Module, args: object, output: Any) -> None:
        outputs.append(output)
        raise PassEnded

    with block.register_forward_hook(end), suppress(PassEnded):
        yield outputs


@contextmanager
def ending_before_head(model: nn.Module) -> Iterator[None]:
    """End a pass before the head, whose logits nobody reads. Without a linear layer as head it runs to its end."""
    head = getattr(model, "get_output_embeddings", lambda: None)()

    def end(module: nn.Module, args: object) -> None:
        raise PassEnded

    if not isinstance(head, nn.Linear):
        yield
        return
    with head.register_forward_pre_hook(end), suppress(PassEnded):
        yield
