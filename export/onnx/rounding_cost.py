"""What 8 bits cost at one matrix: an estimate of the KL divergence, for all matrices in one pass.

An int8 graph rounds a matrix W and its inputs x, so the output y = W x gets an error e = Ŵ x̂ − W x. A matrix that the
checkpoint stores in few bits stays as it is, Ŵ = W. To second order,

    KL(model ‖ rounded model) = ½ E (Σ_t g_t · e_t)²,    g_t = ∂L/∂y_t,

where L is the summed cross-entropy of tokens that are drawn from the model's own predictions: their second moment is
the Fisher information (Martens, arXiv 1412.1193, section 9). Rounding errors of different tokens and matrices are
taken as independent with mean zero, so squares are added over tokens t, and costs over matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ara.models.losses import sampled_targets, token_losses
from export.onnx.quantize import BITS, rounded

# Rows of a matrix that are rounded at once; it limits memory.
_ROWS = 2048
_SEED = 0


class Eight(NamedTuple):
    """What a graph rounds to 8 bits at a matrix.

    Attributes:
        weights: whether its weights.
        inputs: length of the blocks in which its inputs are rounded; ``None``: they are not.
    """

    weights: bool
    inputs: int | None


def rounding_costs(model: nn.Module, ids: torch.Tensor, what: Mapping[str, Eight]) -> dict[str, float]:
    """Return what 8 bits cost at each matrix: path → nats per predicted token.

    Args:
        model: a causal language model of transformers, float32, on the CPU. Its parameters lose their gradients.
        ids: (b, t) int64, calibration text.
        what: path of a linear module to measure → what is rounded there.
    """
    model.requires_grad_(False)
    found: dict[str, float] = {}

    def measure(path: str, module: nn.Linear | Conv1D, args: tuple[torch.Tensor], y: torch.Tensor) -> None:
        """Note the cost when the backward pass reaches the output ``y`` (b, t, m)."""
        x = args[0].detach().flatten(0, -2)

        def reached(gradient: torch.Tensor) -> None:
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            changes = _loss_changes(x, weight, gradient.flatten(0, -2), what[path])
            found[path] = float(changes.double().square().sum()) / 2

        y.register_hook(reached)

    with ExitStack() as hooks:
        # Parameters need no gradients, so the graph for the backward pass starts at the embeddings.
        start = model.get_input_embeddings()  # type: ignore[operator]
        hooks.enter_context(start.register_forward_hook(lambda module, args, output: output.requires_grad_()))
        for path in what:
            hooks.enter_context(model.get_submodule(path).register_forward_hook(partial(measure, path)))
        logits = model(input_ids=ids, use_cache=False).logits
    losses = token_losses(logits, sampled_targets(logits, torch.Generator().manual_seed(_SEED)))
    losses.sum().backward()
    return {path: cost / losses.numel() for path, cost in found.items()}


@torch.no_grad()
def _loss_changes(x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor, what: Eight) -> torch.Tensor:
    """Return g_t · e_t of every token: (t) float32, nats.

    Args:
        x: (t, n) inputs.
        weight: (m, n).
        gradient: (t, m) of the loss at the outputs.
        what: is rounded.
    """
    ours, total = x if what.inputs is None else rounded(x, BITS, what.inputs), torch.zeros(len(x))
    for at in range(0, len(weight), _ROWS):
        rows = weight[at : at + _ROWS]
        errors = ours @ (rounded(rows, BITS) if what.weights else rows).T - x @ rows.T
        total += (errors * gradient[:, at : at + _ROWS]).sum(-1)
    return total
