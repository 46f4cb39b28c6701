"""Replaces the forward functions of modules for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
