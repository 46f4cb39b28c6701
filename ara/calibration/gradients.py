"""Second moments of the gradients at the outputs of linear layers, streamed over calibration text.

Those of experts are shrunk as in :mod:`ara.calibration.moments`. Of a layer of all experts only the diagonal is
collected. A token has a gradient at the outputs of its own experts and zero at those of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from ara.calibration.moments import InputAccumulator, InputStats, Total, averages, of_one_process, pooled, priors
from ara.errors import NumericalError
from ara.layouts.modeling_ara import Sent
from ara.models.blocks import BlockRunner
from ara.models.losses import TargetSampler, drawn_targets, losses_at
from ara.models.scores import ChunkLoss, Place
from ara.models.weights import LinearSpec
from ara.progress import SILENT, Reporter

Targets = Literal["model", "text"]


@dataclass(frozen=True)
class GradientStats:
    """Statistics of the gradients g = ∂L/∂y at the outputs y of a layer.

    Attributes:
        second_moment: H = (1/t) Σ g gᵀ, (m, m) float32, or its diagonal (m); L is the summed loss of a window, in
            nats.
        tokens: t, the number of positions.
    """

    second_moment: torch.Tensor
    tokens: int


def collect_gradients(
    runner: BlockRunner,
    linears: Sequence[LinearSpec],
    *,
    targets: Targets = "model",
    seed: int = 0,
    rows: Sequence[int] | None = None,
    report: Reporter = SILENT,
    total: Total = of_one_process,
) -> dict[str, GradientStats]:
    """Run text forward and backward through some blocks and return the gradient statistics of ``linears``.

    Weights get no gradient. The backward pass ends at the first block that contains one of the layers.

    Args:
        runner: holds the windows and the model, whose parameters must not require gradients.
        linears: the layers.
        targets: of the cross-entropy: ``model`` draws tokens from the model's predictions, so that H is the Fisher
            information at the outputs; ``text`` takes the next tokens of the text.
        seed: of the random targets; the same for all layers of a model.
        rows: positions of the runner's windows among all windows, see :class:`ara.models.losses.TargetSampler`; 0, 1,
            2 … by default.
        report: progress.
        total: completes the sums if other processes read further windows.

    Returns:
        Statistics by layer name, of the layers that ``total`` leaves.

    Raises:
        NumericalError: an output or a gradient is NaN or infinite.
    """
    sums = {spec.name: _accumulator(spec)(spec.m, runner.device) for spec in linears}
    first, last = min(spec.layer for spec in linears), max(spec.layer for spec in linears)
    sampler = TargetSampler(seed, range(runner.windows) if rows is None else rows) if targets == "model" else None
    loss = partial(_loss, runner.model, sampler)
    with ExitStack() as hooks:
        for spec in linears:
            hooks.enter_context(spec.weight.on_output(runner.model, partial(_add_gradient, sums[spec.name])))
        with report.bar(f"Reading gradients of blocks {first + 1} to {last + 1}", runner.windows) as bar:
            if runner.windows:
                runner.backward(first, last, loss, bar.advance)
    pools = pooled(sums, linears)
    for part in (sums, pools):
        total(part)
    found = averages(sums, "gradients at", priors(pools, linears))
    return {name: GradientStats(stats.second_moment, stats.tokens) for name, stats in found.items()}


class RowAccumulator(InputAccumulator):
    """Sums the squares of the gradients at each output of a layer of all experts, E m of them."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(0, device)
        self.gram = torch.zeros(width, dtype=torch.float32, device=device)

    @staticmethod
    def bytes_for(width: int) -> int:
        """Return the bytes that one accumulator takes."""
        return 4 * width

    def add_sent(self, sent: Sent, tokens: int, g: torch.Tensor) -> None:
        """Add the gradients ``g`` (s, m) of one batch of ``tokens`` tokens, sent to experts as ``sent`` says."""
        rows = self.gram.view(len(sent.counts), -1)
        for expert, own in enumerate(g.detach().float().split(sent.counts)):
            rows[expert] += own.square().sum(0)
        self.tokens += tokens

    @property
    def is_finite(self) -> bool:
        """Whether no sum is NaN or infinite."""
        return bool(torch.isfinite(self.gram).all())

    def result(self, prior: InputAccumulator | None = None) -> InputStats:
        """Return the averages (E m)."""
        return InputStats(self.gram / max(self.tokens, 1), self.abs_sum, self.tokens)


def _accumulator(spec: LinearSpec) -> type[InputAccumulator]:
    return RowAccumulator if spec.experts > 1 else InputAccumulator


def gradient_bytes(spec: LinearSpec) -> int:
    """Return the bytes of the sums of the gradients at the outputs of a layer."""
    return _accumulator(spec).bytes_for(spec.m)


def _add_gradient(
    accumulator: InputAccumulator, output: torch.Tensor, x: torch.Tensor | None = None, sent: Sent | None = None
) -> None:
    """Add the gradient at ``output`` when the backward pass reaches it."""
    if not output.requires_grad:
        return
    if isinstance(accumulator, RowAccumulator):
        assert x is not None and sent is not None
        output.register_hook(partial(accumulator.add_sent, sent, len(x)))
    else:
        output.register_hook(accumulator.add)


def _loss(model: nn.Module, sampler: TargetSampler | None, ids: torch.Tensor) -> ChunkLoss:
    """Return the loss of a batch (b, t), in nats; a NaN or infinite logit is an error."""
    numbers = None if sampler is None else sampler.numbers(*ids.shape)

    def loss(logits: torch.Tensor, place: Place) -> torch.Tensor:
        if not logits.isfinite().all():
            raise _overflow(model, ids)
        targets = place.of(ids[:, 1:]) if numbers is None else drawn_targets(logits, place.of(numbers))
        return losses_at(logits, targets)

    return loss


@torch.no_grad()
def _overflow(model: nn.Module, ids: torch.Tensor) -> NumericalError:
    """Return an error that names the first module whose output is NaN or infinite, found by a second pass."""
    found: list[str] = []

    def hook(module: nn.Module, args: object, output: object, name: str) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if not found and isinstance(value, torch.Tensor) and not value.isfinite().all():
            found.append(name)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(partial(hook, name=name)))
        model(input_ids=ids, use_cache=False)
    return NumericalError(
        f"the outputs of {found[0] if found else 'the model'} hold NaN or infinity",
        "try --dtype float32; if that fails too, the model is broken",
    )
