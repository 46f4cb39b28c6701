"""Passes of a mixture of experts on tensors without numbers, where no router can choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ara.layouts.modeling_ara import SeparateExperts, SortedExperts, expert_parameters
from ara.models.forwards import replacing_forward


@contextmanager
def first_expert_for_all(model: nn.Module) -> Iterator[dict[str, float]]:
    """Within this context the first expert of a block runs on what the router sends to all of them.

    A pass then has the FLOPs and the activations of a real one, whatever the router does.

    Yields:
        Path of a list with one layer of all experts → the share of the tokens that an expert sees on average. Passes
        fill it.
    """
    shares: dict[str, float] = {}
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if isinstance(module, SeparateExperts):
                forward = _forward(path, module, shares)
                stack.enter_context(replacing_forward([module], partial(_instead, forward)))
        yield shares


def _instead(forward: Callable[..., torch.Tensor], _: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    return forward


def _forward(path: str, experts: SeparateExperts, shares: dict[str, float]) -> Callable[..., torch.Tensor]:
    def note(chosen: int) -> None:
        for name in expert_parameters(experts):
            shares[f"{path}.{name}"] = chosen / experts.num_experts

    def routed(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        chosen = index.shape[1]
        note(chosen)
        made = experts.run_expert(0, x.repeat_interleave(chosen, 0)) * weights.flatten()[:, None]
        return made.view(len(x), chosen, -1).sum(1).to(x.dtype)

    def sorted_by_expert(x: torch.Tensor) -> torch.Tensor:
        note(1)  # Llama 4 sends every token to one expert
        sent = len(x) // experts.num_experts
        return torch.cat([experts.run_expert(0, x[:sent]), torch.zeros_like(x[sent:])])

    return sorted_by_expert if isinstance(experts, SortedExperts) else routed
