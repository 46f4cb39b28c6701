"""Second moments of the gradients at the outputs of linear layers, streamed over calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ara.calibration.moments import InputAccumulator
from ara.errors import NumericalError
from ara.models.losses import sampled_targets, token_losses
from ara.models.weights import LinearSpec, find_blocks
from ara.progress import SILENT, Reporter

Targets = Literal["model", "text"]


@dataclass(frozen=True)
class GradientStats:
    """What a decomposition may know of the gradients g = ∂L/∂y at the outputs y of a layer.

    Attributes:
        second_moment: H = (1/t) Σ g gᵀ, (m, m) float32; L is the summed loss of a window, in nats.
        tokens: t, the number of positions seen.
    """

    second_moment: torch.Tensor
    tokens: int


def collect_gradients(
    model: nn.Module,
    linears: Sequence[LinearSpec],
    windows: torch.Tensor,
    batch_size: int,
    *,
    targets: Targets = "model",
    seed: int = 0,
    report: Reporter = SILENT,
) -> dict[str, GradientStats]:
    """Stream text forward and backward through ``model`` and return the gradient statistics of the ``linears``.

    No weight gets a gradient, and the backward pass ends at the first block that holds one of the layers.

    Args:
        model: a causal language model in eval mode whose parameters do not require gradients.
        linears: the layers wanted.
        windows: token ids (samples, seq_len) int64.
        batch_size: windows per pass.
        targets: cross-entropy against tokens drawn from the model's own predictions (``model``: H is then the Fisher
            information at the outputs) or against the text itself (``text``).
        seed: of the drawing.
        report: progress.

    Returns:
        Statistics by layer name.

    Raises:
        NumericalError: an output or a gradient is NaN or infinite.
    """
    device = next(model.parameters()).device
    sums = {spec.name: InputAccumulator(spec.m, device) for spec in linears}
    generator = torch.Generator().manual_seed(seed)
    first = min(spec.layer for spec in linears)

    def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # The input of the first block wanted is where the graph begins.
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    handles = [find_blocks(model)[1][first].register_forward_pre_hook(start, with_kwargs=True)]
    for spec in linears:

        def hook(module: nn.Module, args: object, output: torch.Tensor, name: str = spec.name) -> None:
            if output.requires_grad:
                output.register_hook(sums[name].add)

        handles.append(model.get_submodule(spec.name).register_forward_hook(hook))
    try:
        label = f"Reading gradients of blocks {first + 1} to {max(spec.layer for spec in linears) + 1}"
        with report.bar(label, windows.shape[0]) as bar, torch.enable_grad():
            for batch in windows.split(batch_size):
                ids = batch.to(device)
                logits = model(input_ids=ids, use_cache=False).logits
                if not logits.isfinite().all():
                    raise _overflow(model, ids)
                drawn = sampled_targets(logits, generator) if targets == "model" else ids
                loss = token_losses(logits, drawn).sum()
                del logits
                loss.backward()
                bar.advance(batch.shape[0])
    finally:
        for handle in handles:
            handle.remove()
    for name, accumulator in sums.items():
        if not accumulator.is_finite:
            raise NumericalError(
                f"the gradients at {name} hold NaN or infinity",
                "try --dtype float32; if it stays, the model itself is broken",
            )
    results = {}
    for name in list(sums):
        stats = sums.pop(name).result()
        results[name] = GradientStats(stats.second_moment, stats.tokens)
    return results


@torch.no_grad()
def _overflow(model: nn.Module, ids: torch.Tensor) -> NumericalError:
    """Return an error that names the first module whose output is NaN or infinite, found by reading ``ids`` again."""
    found: list[str] = []

    def hook(module: nn.Module, args: object, output: object, name: str) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if not found and isinstance(value, torch.Tensor) and not value.isfinite().all():
            found.append(name)

    handles = [module.register_forward_hook(partial(hook, name=name)) for name, module in model.named_modules() if name]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return NumericalError(
        f"the outputs of {found[0] if found else 'the model'} hold NaN or infinity",
        "try --dtype float32; if it stays, the model itself is broken",
    )
